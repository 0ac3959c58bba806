-- Prolongs a lease, but only our own: after a pause it may be somebody else's.
-- KEYS[1] the lease, ARGV[1] our token, ARGV[2] ms from now. Reply: 1, or 0 when it is not ours.
if redis.pcall('GET', KEYS[1]) ~= ARGV[1] then
    redis.pcall('PEXPIRE', KEYS[1], ARGV[2], 'NX') -- what is no lease, of whatever type, would stay for ever
    return 0
end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
