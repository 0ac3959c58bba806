-- Writes one chunk of scores from the database into Redis, under the rebuild lock.
--
-- KEYS[1] the lock. ARGV[1] the token that must hold it. ARGV[2] its new life in ms.
-- ARGV[3] MessagePack, flat, four a piece: leaderboard, player, score key, score.
-- Reply   1, or 0 when the lock is another's: then nothing is written.
--
-- What Redis still has of a player is later than the database: it wins, wherever it is found.

if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
local rows = cmsgpack.unpack(ARGV[3])
local score_keys = {}
for i = 1, #rows, 4 do score_keys[#score_keys + 1] = rows[i + 2] end
local stored = redis.call('MGET', unpack(score_keys))
for i = 1, #rows, 4 do
    local leaderboard, player, score_key, score = rows[i], rows[i + 1], rows[i + 2], rows[i + 3]
    local here = stored[(i + 3) / 4]
    local known = tonumber(here) or tonumber(redis.call('ZSCORE', leaderboard, player) or nil) or score
    redis.call('SET', score_key, string.format('%.0f', known))
    redis.call('ZADD', leaderboard, known, player)
end
return 1
