-- Takes an epoch for whoever holds the lock on rebuilding: later than each that was ever taken here.
--
-- KEYS[1] the lock, KEYS[2] the marker, KEYS[3] the last epoch taken.
-- ARGV[1] the token that must hold the lock, ARGV[2] its new life in ms, ARGV[3] an epoch that is known to be taken.
-- Reply   [epoch, Unix time in ms], or false when the lock is another's or nobody's.
--
-- The epoch is recorded at once: a server that is paused before its fence is in Kafka has a lower one than all that
-- come after it. It is the time by this one clock, so that it rises too where Redis has forgotten the record.

if redis.call('GET', KEYS[1]) ~= ARGV[1] then return false end
redis.call('PEXPIRE', KEYS[1], ARGV[2])

local function epoch_of(reply)
    return type(reply) == 'string' and string.match(reply, '^%d+$') and #reply <= 15 and tonumber(reply) or 0
end

local clock = redis.call('TIME')
local now_ms = clock[1] * 1000 + math.floor(clock[2] / 1000)
local verified, taken = epoch_of(redis.pcall('HGET', KEYS[2], 'epoch')), epoch_of(redis.pcall('GET', KEYS[3]))
local epoch = math.max(now_ms, verified + 1, taken + 1, ARGV[3] + 1)
redis.call('SET', KEYS[3], string.format('%.0f', epoch))
return {epoch, now_ms}
