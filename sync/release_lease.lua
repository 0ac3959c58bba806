-- Gives a lease back, but only our own: after a pause it may be somebody else's.
-- KEYS[1] the lease, ARGV[1] our token. Reply: 1, or 0 when it was not ours.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
    return 0
end
return redis.call('DEL', KEYS[1])
