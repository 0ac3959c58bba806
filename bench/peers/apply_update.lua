-- Applies one update: what the peers do in one atomic step. The scoreboard has a script of its own.
--
-- KEYS[1] arrival time of the subject (GCRA); KEYS[2] score of the player; KEYS[3] leaderboard.
-- ARGV    player, delta, interval_us, window_us; an interval of 0 switches the limit off.
-- Reply   {1, new score} or {0, wait in µs}.

local interval_us, window_us = tonumber(ARGV[3]), tonumber(ARGV[4])
if interval_us > 0 then
    local clock = redis.call('TIME')
    local now_us = clock[1] * 1000000 + clock[2]
    local arrival_us = tonumber(redis.call('GET', KEYS[1]) or 0)
    if arrival_us < now_us then arrival_us = now_us end
    arrival_us = arrival_us + interval_us
    if arrival_us > now_us + window_us then
        return {0, arrival_us - now_us - window_us}
    end
    redis.call('SET', KEYS[1], string.format('%.0f', arrival_us), 'PX', math.ceil(window_us / 1000))
end
local score = redis.call('INCRBY', KEYS[2], ARGV[2])
redis.call('ZADD', KEYS[3], score, ARGV[1])
return {1, score}
