-- Runs commands for as long as the lock is their sender's: one who slept past its expiry writes nothing.
--
-- KEYS[1] the lock. ARGV[1] the token that must hold it. ARGV[2] its new life in ms.
-- ARGV[3…] the commands: for each, of how many arguments it consists, its name included, then those.
-- Reply   1, or 0 when the lock is another's or nobody's.
--
-- A command that fails leaves those before it done: whoever takes over begins anew, and the marker comes last.

if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
local at = 3
while at <= #ARGV do
    local last = at + tonumber(ARGV[at])
    redis.call(unpack(ARGV, at + 1, last))
    at = last + 1
end
return 1
