-- Lets a quiet outbox say that it has everything up to about now: its last id is where a replay of Kafka begins.
--
-- KEYS[1] the outbox, KEYS[2] the marker; ARGV[1] the epoch that was verified, ARGV[2] how many ms the last id may be old.
-- Reply   1, or 0 when the id is young enough, or Redis is of another epoch: then it is not known what it has.
--
-- Whoever lost the last updates in a failover lost this too, for it is replicated behind them.

if redis.call('HGET', KEYS[2], 'epoch') ~= ARGV[1] then return 0 end
local clock = redis.call('TIME')
local now_ms = clock[1] * 1000 + math.floor(clock[2] / 1000)
local state = redis.call('XINFO', 'STREAM', KEYS[1])
local last
for i = 1, #state, 2 do
    if state[i] == 'last-generated-id' then last = state[i + 1] end
end
if string.match(last, '%d+') + ARGV[2] >= now_ms then return 0 end
redis.call('XSETID', KEYS[1], string.format('%.0f-0', now_ms))
return 1
