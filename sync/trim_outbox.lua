-- Deletes from the outbox what Kafka has confirmed, for as long as it counts there.
-- KEYS[1] the outbox, KEYS[2] the marker; ARGV[1] the epoch that the records carry, ARGV[2] the first id to keep.
-- Reply: 1, or 0 when Redis is of another epoch: then a fence may stand before those records, and they are owed still.
if redis.call('HGET', KEYS[2], 'epoch') ~= ARGV[1] then
    return 0
end
redis.call('XTRIM', KEYS[1], 'MINID', ARGV[2])
return 1
