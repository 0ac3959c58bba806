-- Reads the scores of some players of one board, together with the version they have.
--
-- KEYS[1] the outbox. ARGV[1] MessagePack: [ready, leaderboard, players, score keys]; the last two run in parallel.
-- Reply   MessagePack: [epoch, last id, oldest id, scores, members]; false stands for what is not there.
--
-- Nothing runs beside a script: the scores hold every event up to the last id the outbox has given out, and no
-- later one. That makes the last id their version. The oldest id is that of the first entry still owed to Kafka.

local ready, leaderboard, players, score_keys = unpack(cmsgpack.unpack(ARGV[1]))
local last, oldest = false, false
local stream = redis.pcall('XINFO', 'STREAM', KEYS[1])
if not stream.err then
    for i = 1, #stream, 2 do
        if stream[i] == 'last-generated-id' then last = stream[i + 1] end
        if stream[i] == 'first-entry' then oldest = stream[i + 1] and stream[i + 1][1] end
    end
end
local scores, members = {}, {}
if #players > 0 then
    scores = redis.call('MGET', unpack(score_keys))
    members = redis.call('ZMSCORE', leaderboard, unpack(players))
end
return cmsgpack.pack({redis.call('HGET', ready, 'epoch'), last, oldest or false, scores, members})
