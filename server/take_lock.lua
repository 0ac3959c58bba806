-- Takes the lock on rebuilding, unless it is another server's.
--
-- KEYS[1] the lock. ARGV[1] the server, ARGV[2] the number of its attempt, ARGV[3] the lock's life in ms.
-- Reply   the token that holds the lock now, or false when it is another server's.
--
-- An earlier attempt of the same server is over, though Redis may not have learned of its end: nobody waits for it.
-- Its number is lower, so a command of it that arrives late takes nothing.

local holder = redis.pcall('GET', KEYS[1])
if holder then
    -- What is no lock of ours, of whatever type, would stay for ever: it gets an end.
    redis.pcall('PEXPIRE', KEYS[1], ARGV[3], 'NX')
    if type(holder) ~= 'string' then return false end
    local server, attempt = string.match(holder, '^(%x+):(%d+)$')
    if server ~= ARGV[1] or tonumber(attempt) >= tonumber(ARGV[2]) then return false end
end
local token = ARGV[1] .. ':' .. ARGV[2]
redis.call('SET', KEYS[1], token, 'PX', ARGV[3])
return token
