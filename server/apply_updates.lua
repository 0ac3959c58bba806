-- Applies one batch of updates of one board: all of it, or nothing.
--
-- KEYS[1] the outbox; in a cluster it routes the call, and every other key shares its slot.
-- ARGV[1] MessagePack: [ready, session, leaderboard, board, epoch, number, players, score keys, deltas, limits];
--         players, score keys and deltas run in parallel, one place an update. limits is empty, or
--         [limit key, span_us, rules, subjects, which]: rule which[i], an [interval_us, window_us], counts for
--         subjects[i], and 0 stands for none; no window is longer than span_us.
-- Reply   MessagePack, flat: state, then two a piece: outcome, value (as named below).
--
-- It reads and decides first and writes last. Redis does not roll back, so no write may fail behind another:
-- XADD comes first (wrong type, out of memory, read-only replica all show there), and what follows cannot fail.
-- A call costs more than what it does, so their number does not depend on the size of the batch.

local STATE_APPLIED, STATE_COLD, STATE_STALE = 0, 1, 2
local APPLIED, LIMITED, OUT_OF_RANGE, DAMAGED = 0, 1, 2, 3   -- value: new score, wait in µs, old score, 0
local MAX_SCORE = 9007199254740991                           -- 2^53-1: doubles count exactly up to here
local SESSION_TTL_S = 3600
local call = redis.call

local ready, session, leaderboard, board, epoch, number, players, score_keys, deltas, limits =
    unpack(cmsgpack.unpack(ARGV[1]))

if call('HGET', ready, 'epoch') ~= epoch then
    return cmsgpack.pack({STATE_COLD})
end
local last = call('GET', session)                            -- '<number> <reply>' of the last batch
if last then
    local space = string.find(last, ' ', 1, true)
    local last_number = tonumber(string.sub(last, 1, space - 1))
    if number == last_number then return string.sub(last, space + 1) end
    if number < last_number then return cmsgpack.pack({STATE_STALE}) end
end

-- Read.
local stored = call('MGET', unpack(score_keys))
local members = call('ZMSCORE', leaderboard, unpack(players))
local scores = {}                                            -- by player: what this batch has made of it so far
local arrivals = {}                                          -- by subject: theoretical arrival time, µs (GCRA)
local limit_key, span_us, rules, subjects, which = unpack(limits)
local now_us, span
if limit_key then
    -- One hash per span of time. No arrival lies further ahead than a span, so the last two know all of them.
    local clock = call('TIME')
    now_us = clock[1] * 1000000 + clock[2]
    span = math.floor(now_us / span_us)
    local current = call('HMGET', limit_key .. span, unpack(subjects))
    local previous = call('HMGET', limit_key .. span - 1, unpack(subjects))
    for i = 1, #subjects do
        arrivals[subjects[i]] = tonumber(current[i] or previous[i]) or 0
    end
end

-- Decide.
local reply, changes, accepted = {STATE_APPLIED}, {board}, 1
local charged = {}
for i = 1, #players do
    local player, rule = players[i], limit_key and rules[which[i]]
    local outcome, value
    if rule then
        local subject, interval_us, window_us = subjects[i], rule[1], rule[2]
        local arrival = arrivals[subject]
        -- Further ahead than the window means the clock was set back, or the rule was tightened.
        if arrival > now_us + window_us then arrival = now_us + window_us end
        if arrival < now_us then arrival = now_us end
        arrival = arrival + interval_us
        if arrival > now_us + window_us then
            outcome, value = LIMITED, arrival - now_us - window_us
        else
            arrivals[subject] = arrival
            charged[subject] = arrival
        end
    end
    if not outcome then
        local score = scores[player] or tonumber(stored[i])
        -- Key and member must both be there, or neither: else one was evicted, deleted, or is not ours.
        if not stored[i] and not members[i] then score = score or 0
        elseif not score or not members[i] then outcome, value = DAMAGED, 0 end
        if not outcome then
            local new = score + deltas[i]
            if new > MAX_SCORE or new < -MAX_SCORE then
                outcome, value = OUT_OF_RANGE, score
            else
                outcome, value = APPLIED, new
                scores[player] = new
                changes[accepted + 1], changes[accepted + 2], changes[accepted + 3] = player, deltas[i], new
                accepted = accepted + 3
            end
        end
    end
    reply[2 * i], reply[2 * i + 1] = outcome, value
end

-- Write.
if accepted > 1 then
    call('XADD', KEYS[1], '*', 'batch', cmsgpack.pack(changes))
    local totals, ranks, n = {}, {}, 0
    for i = 1, #players do
        local player = players[i]
        local score = scores[player]
        if score then
            scores[player] = nil
            totals[n + 1], totals[n + 2] = score_keys[i], score
            ranks[n + 1], ranks[n + 2] = score, player
            n = n + 2
        end
    end
    -- MSET where one would expect INCRBY: it is one call, and a wrong type under a key cannot stop it.
    call('MSET', unpack(totals))
    call('ZADD', leaderboard, unpack(ranks))
end
if next(charged) then
    local fields, n = {}, 0
    for subject, arrival in pairs(charged) do
        fields[n + 1], fields[n + 2] = subject, arrival
        n = n + 2
    end
    call('HSET', limit_key .. span, unpack(fields))
    call('PEXPIRE', limit_key .. span, math.ceil(3 * span_us / 1000))
    call('UNLINK', limit_key .. span - 2)                    -- expiring it would free it in the foreground
end
local packed = cmsgpack.pack(reply)
call('SET', session, number .. ' ' .. packed, 'EX', SESSION_TTL_S)
return packed
