-- Applies one batch of updates of one board: all of it, or nothing.
--
-- KEYS[1] the outbox; in a cluster it routes the call, and every other key shares its slot.
-- ARGV[1] MessagePack: [ready, session, leaderboard, board, epoch, number, limits, updates], where
--         limits is a list of [interval_us, window_us], and updates is flat, five a piece:
--         player, score key, delta, limit key, index into limits (0: unlimited).
-- Reply   MessagePack, flat: state, then two a piece: outcome, value (as named below).
--
-- It reads and decides first and writes last. Redis does not roll back, so no write may fail behind another:
-- XADD comes first (wrong type, out of memory, read-only replica all show there), and what follows cannot fail.

local STATE_APPLIED, STATE_COLD, STATE_STALE = 0, 1, 2
local APPLIED, LIMITED, OUT_OF_RANGE, DAMAGED = 0, 1, 2, 3   -- value: new score, wait in µs, old score, 0
local MAX_SCORE = 9007199254740991                           -- 2^53-1: doubles count exactly up to here
local STRIDE = 5
local SESSION_TTL_S = 3600

local ready, session, leaderboard, board, epoch, number, limits, updates = unpack(cmsgpack.unpack(ARGV[1]))

if redis.call('HGET', ready, 'epoch') ~= epoch then
    return cmsgpack.pack({STATE_COLD})
end
local last = redis.call('GET', session)                      -- '<number> <reply>' of the last batch
if last then
    local space = string.find(last, ' ', 1, true)
    local last_number = tonumber(string.sub(last, 1, space - 1))
    if number == last_number then return string.sub(last, space + 1) end
    if number < last_number then return cmsgpack.pack({STATE_STALE}) end
end

-- Read: three calls for the whole batch.
local players, score_keys, limit_keys = {}, {}, {}
for i = 1, #updates, STRIDE do
    players[#players + 1] = updates[i]
    score_keys[#score_keys + 1] = updates[i + 1]
    if updates[i + 4] > 0 then limit_keys[#limit_keys + 1] = updates[i + 3] end
end
local stored = redis.call('MGET', unpack(score_keys))
local members = redis.call('ZMSCORE', leaderboard, unpack(players))
local scores = {}                                            -- by player: what this batch has made of it so far
local arrivals = {}                                          -- by limit key: theoretical arrival time, µs (GCRA)
local now_us = 0
if #limit_keys > 0 then
    local clock = redis.call('TIME')
    now_us = clock[1] * 1000000 + clock[2]
    for i, arrival in ipairs(redis.call('MGET', unpack(limit_keys))) do
        arrivals[limit_keys[i]] = tonumber(arrival) or 0
    end
end

-- Decide.
local reply, changes, charged = {STATE_APPLIED}, {board}, {}
for i = 1, #players do
    local at = (i - 1) * STRIDE
    local player, delta, limit_key, limit = players[i], updates[at + 3], updates[at + 4], limits[updates[at + 5]]
    local outcome, value
    if limit then
        local interval_us, window_us = limit[1], limit[2]
        -- A stored time further ahead than the window means the clock was set back: it may lock nobody out.
        local arrival = math.max(math.min(arrivals[limit_key], now_us + window_us), now_us) + interval_us
        if arrival - now_us > window_us then
            outcome, value = LIMITED, arrival - now_us - window_us
        else
            arrivals[limit_key] = arrival
            charged[limit_key] = true
        end
    end
    if not outcome then
        local score = scores[player]
        if not score then
            score = tonumber(stored[i])
            -- Both or neither: a key without its member was evicted, deleted, or is not ours.
            if not score and not stored[i] and not members[i] then score = 0
            elseif not score or not members[i] then outcome, value = DAMAGED, 0 end
        end
        if not outcome then
            local new = score + delta
            if new > MAX_SCORE or new < -MAX_SCORE then
                outcome, value = OUT_OF_RANGE, score
            else
                outcome, value = APPLIED, new
                scores[player] = new
                local n = #changes
                changes[n + 1], changes[n + 2], changes[n + 3] = player, delta, new
            end
        end
    end
    reply[2 * i], reply[2 * i + 1] = outcome, value
end

-- Write.
if #changes > 1 then
    redis.call('XADD', KEYS[1], '*', 'batch', cmsgpack.pack(changes))
    local totals, ranks = {}, {}
    for i, player in ipairs(players) do
        local score = scores[player]
        if score then
            scores[player] = nil
            local n = #totals
            totals[n + 1], totals[n + 2] = score_keys[i], score
            ranks[n + 1], ranks[n + 2] = score, player
        end
    end
    -- MSET where one would expect INCRBY: it is one call, and a wrong type under the key cannot stop it.
    redis.call('MSET', unpack(totals))
    redis.call('ZADD', leaderboard, unpack(ranks))
end
for limit_key in pairs(charged) do
    local arrival = arrivals[limit_key]
    redis.call('SET', limit_key, string.format('%.0f', arrival), 'PX', math.ceil((arrival - now_us) / 1000))
end
local packed = cmsgpack.pack(reply)
redis.call('SET', session, number .. ' ' .. packed, 'EX', SESSION_TTL_S)
return packed
