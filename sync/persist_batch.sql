-- One batch: history, current scores, and the offsets it came from, all or nothing.
--
-- %(board)s … %(score)s   arrays of one length, an event each
-- %(partitions)s %(next_offsets)s %(epochs)s %(tag_epochs)s   arrays of one length, a partition of %(topic)s each
--
-- Every ORDER BY is load-bearing: writers that take row locks in one order cannot deadlock. So is DISTINCT ON:
-- a row may be updated only once in a statement, and of a player's events the latest version has to win.
-- And so is COLLATE: sorting by the order of the database takes as much time as all the rest.
WITH batch AS MATERIALIZED (
    SELECT board COLLATE "C" AS board, player_id COLLATE "C" AS player_id, ver_ms, ver_seq, delta, score, to_timestamp(ver_ms::float8 / 1000) AS at
    FROM unnest(%(board)s::text[], %(player)s::text[], %(ms)s::bigint[], %(seq)s::bigint[],
                %(delta)s::bigint[], %(score)s::bigint[])
         AS t(board, player_id, ver_ms, ver_seq, delta, score)
), history AS (
    INSERT INTO score_events (board, player_id, at, ver_ms, ver_seq, delta, score)
    SELECT board, player_id, at, ver_ms, ver_seq, delta, score
    FROM batch
    ORDER BY board, player_id, ver_ms, ver_seq
    ON CONFLICT DO NOTHING
    RETURNING 1
), current AS (
    INSERT INTO scores AS s (board, player_id, score, ver_ms, ver_seq, updated_at)
    SELECT DISTINCT ON (board, player_id) board, player_id, score, ver_ms, ver_seq, at
    FROM batch
    ORDER BY board, player_id, ver_ms DESC, ver_seq DESC
    ON CONFLICT (board, player_id) DO UPDATE
        SET score = EXCLUDED.score, ver_ms = EXCLUDED.ver_ms, ver_seq = EXCLUDED.ver_seq,
            updated_at = EXCLUDED.updated_at
        WHERE (EXCLUDED.ver_ms, EXCLUDED.ver_seq) > (s.ver_ms, s.ver_seq)
    RETURNING 1
), moved AS (
    INSERT INTO consumer_offsets AS o (consumer_group, topic, partition, topic_id, next_offset, epoch, tag_epochs)
    SELECT %(consumer_group)s, %(topic)s, partition, %(topic_id)s, next_offset, epoch, tag_epochs
    FROM unnest(%(partitions)s::int[], %(next_offsets)s::bigint[], %(epochs)s::bigint[], %(tag_epochs)s::jsonb[])
         AS t(partition, next_offset, epoch, tag_epochs)
    ORDER BY partition
    ON CONFLICT (consumer_group, topic, partition) DO UPDATE
        SET next_offset = EXCLUDED.next_offset, epoch = EXCLUDED.epoch, tag_epochs = EXCLUDED.tag_epochs,
            updated_at = now()
        WHERE EXCLUDED.next_offset > o.next_offset AND EXCLUDED.topic_id = o.topic_id
    RETURNING 1
)
SELECT (SELECT count(*) FROM history) AS new_events,
       (SELECT count(*) FROM current) AS players_advanced,
       (SELECT count(*) FROM moved) AS offsets_advanced
