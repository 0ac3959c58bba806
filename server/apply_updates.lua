-- Applies one batch of updates of one board: all of it, or nothing.
--
-- KEYS[1] the outbox; in a cluster it routes the call, and every other key shares its slot.
-- ARGV[1] MessagePack: [ready, session, leaderboard, board, epoch, number, players, score keys, deltas, limits, keyed];
--         players, score keys and deltas run in parallel, one place an update. limits is empty, or
--         [limit key, span_us, rules, subjects, which]: rule which[i], an [interval_us, window_us], counts for
--         subjects[i], and 0 stands for none; no window is longer than span_us. keyed is empty, or
--         [answer key, count key, ttl_s, cap, names, fingerprints, counted]: names[i] is the idempotency key of update
--         i, '' stands for none; counted[i] is whose number of keys may not pass the cap, '' for nobody's.
-- Reply   MessagePack, flat: state, then two a piece: outcome, value (as named below).
--
-- It reads and decides first and writes last. Redis does not roll back, so no write may fail behind another:
-- XADD comes first (wrong type, out of memory, read-only replica all show there), and what follows cannot fail: all
-- its keys have been read, and while a slot moves to another node of a cluster, reading a key that is not here fails.
-- A call costs more than what it does, so their number does not depend on the size of the batch.

local STATE_APPLIED, STATE_COLD, STATE_STALE = 0, 1, 2
local APPLIED, LIMITED, OUT_OF_RANGE, DAMAGED = 0, 1, 2, 3   -- value: new score, wait in µs, old score, 0
local REPLAYED, REUSED, CROWDED = 4, 5, 6                    -- value: the score answered first, 0, 0
local FINGERPRINT = 16                                       -- characters, before the score in a kept answer
local MAX_SCORE = 9007199254740991                           -- 2^53-1: doubles count exactly up to here
local SESSION_TTL_S = 3600
local call = redis.call

local ready, session, leaderboard, board, epoch, number, players, score_keys, deltas, limits, keyed =
    unpack(cmsgpack.unpack(ARGV[1]))

if call('HGET', ready, 'epoch') ~= epoch then
    return cmsgpack.pack({STATE_COLD})
end
local last = call('GET', session)                            -- '<number> <reply>' of the last batch
local space = last and string.find(last, ' ', 1, true)
local last_number = space and tonumber(string.sub(last, 1, space - 1))
if last_number then
    if number == last_number then return string.sub(last, space + 1) end
    if number < last_number then return cmsgpack.pack({STATE_STALE}) end
end

-- Nil for what is no score of ours: it must not come into an event or a reply, which would be none then.
local function score_of(text)
    local score = text and tonumber(text)
    if score and score % 1 == 0 and score >= -MAX_SCORE and score <= MAX_SCORE then return score end
end

-- Read.
local stored = call('MGET', unpack(score_keys))
local members = call('ZMSCORE', leaderboard, unpack(players))
local scores = {}                                            -- by player: what this batch has made of it so far
local arrivals = {}                                          -- by subject: theoretical arrival time, µs (GCRA)
local limit_key, span_us, rules, subjects, which = unpack(limits)
local now_us, span, expired_limits
if limit_key then
    -- One hash per span of time. No arrival lies further ahead than a span, so the last two know all of them.
    local clock = call('TIME')
    now_us = clock[1] * 1000000 + clock[2]
    span = math.floor(now_us / span_us)
    local current, absent, n = call('HMGET', limit_key .. span, unpack(subjects)), {}, 0
    for i = 1, #subjects do
        if current[i] then
            arrivals[subjects[i]] = tonumber(current[i]) or 0
        else
            n = n + 1
            absent[n] = subjects[i]
        end
    end
    if n > 0 then
        local previous = call('HMGET', limit_key .. span - 1, unpack(absent))
        for i = 1, n do arrivals[absent[i]] = tonumber(previous[i]) or 0 end
    end
    expired_limits = call('EXISTS', limit_key .. span - 2) == 1
end
local answer_key, count_key, ttl_s, cap, names, fingerprints, counted = unpack(keyed)
local kept, counts = {}, {}                                  -- by name: answer kept; by subject: how many
local count_span, expired_counts
if answer_key then
    local answer_keys, owners, n = {}, {}, 0
    for i = 1, #names do
        if names[i] ~= '' then
            n = n + 1
            answer_keys[n], owners[n] = answer_key .. names[i], i
        end
    end
    local answers = call('MGET', unpack(answer_keys))
    for j = 1, n do
        local answer = answers[j]
        -- What is no answer of ours is none.
        if answer and score_of(string.sub(answer, FINGERPRINT + 1)) then kept[names[owners[j]]] = answer end
    end
    -- How many answers a subject has kept: those of this span, and of the last one what has not expired if it
    -- made them evenly.
    local now_s = tonumber(call('TIME')[1])
    count_span = math.floor(now_s / ttl_s)
    local current = call('HMGET', count_key .. count_span, unpack(counted))
    local previous = call('HMGET', count_key .. count_span - 1, unpack(counted))
    expired_counts = call('EXISTS', count_key .. count_span - 2) == 1
    local left = 1 - (now_s % ttl_s) / ttl_s
    for i = 1, #counted do
        counts[counted[i]] = {tonumber(current[i]) or 0, (tonumber(previous[i]) or 0) * left}
    end
end

-- Decide.
local reply, changes, accepted = {STATE_APPLIED}, {board}, 1
local charged, fresh, memory = {}, {}, {}
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
            outcome, value = LIMITED, math.ceil(arrival - now_us - window_us)
        else
            arrivals[subject] = arrival
            charged[subject] = arrival
        end
    end
    local name = answer_key and names[i] ~= '' and names[i]
    local count = name and counted[i] ~= '' and counts[counted[i]]
    if name and not outcome then
        local answer = kept[name]
        if answer then
            if string.sub(answer, 1, FINGERPRINT) == fingerprints[i] then
                outcome, value = REPLAYED, tonumber(string.sub(answer, FINGERPRINT + 1))
            else
                outcome, value = REUSED, 0
            end
        elseif count and cap > 0 and count[1] + count[2] >= cap then
            outcome, value = CROWDED, 0
        end
    end
    if not outcome then
        local score = scores[player] or score_of(stored[i])
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
                if name then
                    kept[name] = fingerprints[i] .. string.format('%.0f', new)
                    fresh[#fresh + 1] = name
                    memory[#memory + 1], memory[#memory + 2] = (accepted - 1) / 3, fingerprints[i] .. name
                    if count then count[1] = count[1] + 1 end
                end
                accepted = accepted + 3
            end
        end
    end
    reply[2 * i], reply[2 * i + 1] = outcome, value
end

-- Write.
if accepted > 1 then
    if #fresh > 0 then
        call('XADD', KEYS[1], '*', 'batch', cmsgpack.pack(changes), 'memory', cmsgpack.pack(memory))
    else
        call('XADD', KEYS[1], '*', 'batch', cmsgpack.pack(changes))
    end
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
    if expired_limits then call('UNLINK', limit_key .. span - 2) end  -- expiring would free it in the foreground
end
if #fresh > 0 then
    for _, name in ipairs(fresh) do call('SET', answer_key .. name, kept[name], 'EX', ttl_s) end
    local fields = {}
    for subject, count in pairs(counts) do
        if subject ~= '' then fields[#fields + 1], fields[#fields + 2] = subject, count[1] end
    end
    if #fields > 0 then
        call('HSET', count_key .. count_span, unpack(fields))
        call('EXPIRE', count_key .. count_span, 2 * ttl_s)
        if expired_counts then call('UNLINK', count_key .. count_span - 2) end
    end
end
local packed = cmsgpack.pack(reply)
call('SET', session, number .. ' ' .. packed, 'EX', SESSION_TTL_S)
return packed
