-- Prolongs a lease, but only our own: after a pause it may be somebody else's.
-- KEYS[1] the lease, ARGV[1] our token, ARGV[2] ms from now. Reply: 1, or 0 when it is not ours.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
    return 0
end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
