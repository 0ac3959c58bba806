-- schema.sql: idempotent; runs on TimescaleDB (community), TimescaleDB (Apache-only build)
-- and plain PostgreSQL >= 14. Apply with:  psql -X -1 -v ON_ERROR_STOP=1 -f schema.sql
-- How many days of history to keep comes in the setting scoreboard.history_days (30 where it is not set; 0: all).
SET client_min_messages = warning;

-- Two migrators at once would race on CREATE ... IF NOT EXISTS: serialise them.
-- (Held to the end of the transaction under psql -1; harmless otherwise.)
SELECT pg_advisory_xact_lock(7203001);

-- 1. Tables: the same everywhere ---------------------------------------------------------

-- Keys that are text sort by their bytes, whatever the database's own order is: that takes half the time, is the
-- order of a board, and does not change with a new libc or ICU, which would break the indexes.

-- Current state. NOT a hypertable: one row per key, updated in place.
-- (ver_ms, ver_seq) is the event_id '<ms>-<seq>' as numbers; text order would put -10 before -9.
CREATE TABLE IF NOT EXISTS scores (
    board      text        COLLATE "C" NOT NULL,
    player_id  text        COLLATE "C" NOT NULL,
    score      bigint      NOT NULL,
    ver_ms     bigint      NOT NULL,
    ver_seq    bigint      NOT NULL,
    updated_at timestamptz NOT NULL,               -- event time, not arrival time
    PRIMARY KEY (board, player_id)
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02); -- room for HOT updates; no index on score

-- Append-only history. `at` is a pure function of the event id (enforced), so a
-- redelivery always produces the same key, in the same chunk.
CREATE TABLE IF NOT EXISTS score_events (
    board     text        COLLATE "C" NOT NULL,
    player_id text        COLLATE "C" NOT NULL,
    at        timestamptz NOT NULL,
    ver_ms    bigint      NOT NULL,
    ver_seq   bigint      NOT NULL,
    delta     bigint      NOT NULL,
    score     bigint      NOT NULL,
    CONSTRAINT score_events_pkey PRIMARY KEY (board, player_id, at, ver_seq),
    CONSTRAINT score_events_at_from_id CHECK (at = to_timestamp(ver_ms::float8 / 1000))
);

CREATE TABLE IF NOT EXISTS consumer_offsets (
    consumer_group text        COLLATE "C" NOT NULL,
    topic          text        COLLATE "C" NOT NULL,
    partition      integer     NOT NULL,
    topic_id       text        NOT NULL,           -- a topic made anew has the name but not the id
    next_offset    bigint      NOT NULL,           -- offset to seek to, i.e. last processed + 1
    epoch          bigint      NOT NULL DEFAULT 0, -- of the last fence before it: older events behind it are void
    tag_epochs     jsonb       NOT NULL DEFAULT '{}', -- the same in a Redis Cluster, by hash tag
    updated_at     timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (consumer_group, topic, partition)
);

-- Tables of before have the database's own order. Changing it builds their indexes anew, about a minute for 50 million
-- rows, while nobody else reads or writes that table: the history first, so that `scores` is held only at the end.
-- What stands in the way is left as it is, and told: views of other people, or a columnstore and the roll-ups on it
-- (TimescaleDB community). Everything works with either order; the old one is slower.
DO $$
DECLARE
    one     text;
    columns text;
    views   text[] := '{}';
    grants  text[];
    made    text;
    before  text := current_setting('lock_timeout');
BEGIN
    FOREACH one IN ARRAY ARRAY['score_events', 'scores', 'consumer_offsets'] LOOP
        SELECT string_agg(format('ALTER COLUMN %I TYPE text COLLATE "C"', attname), ', ') INTO columns
        FROM pg_attribute
        WHERE attrelid = one::regclass AND attname IN ('board', 'player_id', 'consumer_group', 'topic')
          AND attcollation <> 'pg_catalog."C"'::regcollation;
        CONTINUE WHEN columns IS NULL;
        BEGIN
            IF before = '0' THEN  -- a reader that we wait for makes all others wait
                PERFORM set_config('lock_timeout', '5s', true);
            END IF;
            LOCK TABLE score_events IN SHARE ROW EXCLUSIVE MODE;  -- the first of a batch: else we would meet midway
            views := '{}';
            grants := '{}';
            IF one = 'score_events' THEN
                -- No column changes below a view: ours go and come back, with what others may do with them.
                FOR made IN SELECT relname FROM unnest(ARRAY['score_hourly', 'score_daily']) WITH ORDINALITY AS v(relname, n)
                            WHERE to_regclass(relname) IS NOT NULL ORDER BY n LOOP
                    views := views || format('CREATE VIEW %I AS %s', made, pg_get_viewdef(made::regclass));
                    grants := grants || coalesce((
                        SELECT array_agg(format('GRANT %s ON %I TO %s %s', privilege_type, made,
                                                CASE WHEN grantee = 0 THEN 'PUBLIC' ELSE grantee::regrole::text END,
                                                CASE WHEN is_grantable THEN 'WITH GRANT OPTION' ELSE '' END))
                        FROM pg_class, aclexplode(relacl) WHERE oid = made::regclass), '{}');
                END LOOP;
                DROP VIEW IF EXISTS score_daily;
                DROP VIEW IF EXISTS score_hourly;
            END IF;
            EXECUTE format('ALTER TABLE %I %s', one, columns);
            FOREACH made IN ARRAY views || grants LOOP EXECUTE made; END LOOP;
            PERFORM set_config('lock_timeout', before, true);
        EXCEPTION WHEN feature_not_supported OR dependent_objects_still_exist OR wrong_object_type
                    OR lock_not_available OR insufficient_resources OR out_of_memory OR disk_full THEN
            RAISE WARNING 'the keys of % keep the order of the database: %', one, SQLERRM;
        END;
    END LOOP;
END $$;

ALTER TABLE consumer_offsets ADD COLUMN IF NOT EXISTS epoch bigint NOT NULL DEFAULT 0;
ALTER TABLE consumer_offsets ADD COLUMN IF NOT EXISTS tag_epochs jsonb NOT NULL DEFAULT '{}';

-- 2. TimescaleDB, if this server can really load it --------------------------------------

-- "available" alone is not enough: CREATE EXTENSION without the preload is FATAL (it kills
-- the session, so no EXCEPTION block can catch it). The preloaded loader defines this GUC.
DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_available_extensions WHERE name = 'timescaledb')
       AND current_setting('timescaledb.disable_load', true) = 'off' THEN
        CREATE EXTENSION IF NOT EXISTS timescaledb;
    END IF;
END $$;

DO $$
DECLARE
    has_ts  boolean := EXISTS (SELECT FROM pg_extension WHERE extname = 'timescaledb');
    -- Debian's own package is Apache-only: hypertables yes; columnstore, policies, caggs no.
    has_tsl boolean := has_ts AND current_setting('timescaledb.license', true) = 'timescale';
    is_cagg boolean := false;
    days    integer := coalesce(nullif(current_setting('scoreboard.history_days', true), ''), '30');
    is_new  boolean := false;                  -- whether the history is from now on kept for another time
    v       record;
    body    text;
BEGIN
    -- 2a. history table
    IF has_ts THEN
        PERFORM create_hypertable('score_events', by_range('at', INTERVAL '1 day'),
                                  create_default_indexes => false,
                                  if_not_exists => true, migrate_data => true);
    END IF;
    CREATE INDEX IF NOT EXISTS score_events_at ON score_events USING brin (at) WITH (pages_per_range = 32);

    -- 2b. columnstore + retention
    IF has_tsl THEN
        IF NOT EXISTS (SELECT FROM timescaledb_information.hypertables
                       WHERE hypertable_schema = current_schema() AND hypertable_name = 'score_events'
                         AND compression_enabled) THEN
            -- segmentby + orderby cover the primary key, so a redelivery into a compressed
            -- chunk only has to open the matching batches.
            ALTER TABLE score_events SET (timescaledb.compress,
                timescaledb.compress_segmentby = 'board',
                timescaledb.compress_orderby   = 'player_id, at, ver_seq');
        END IF;
        PERFORM add_compression_policy('score_events', INTERVAL '3 days',  if_not_exists => true);
        is_new := days <> coalesce((
            SELECT extract(day FROM (config->>'drop_after')::interval)::integer
            FROM timescaledb_information.jobs
            WHERE hypertable_schema = current_schema() AND hypertable_name = 'score_events'
              AND proc_name = 'policy_retention'), 0);
        IF is_new THEN
            PERFORM remove_retention_policy('score_events', if_exists => true);
            IF days > 0 THEN PERFORM add_retention_policy('score_events', make_interval(days => days)); END IF;
        END IF;
    END IF;

    -- 2c. roll-ups: one body, three renderings.
    -- start_offset (of the hourly one, 14/15 of the time that events are kept): just inside the source's retention.
    -- Shorter, and rows older than it vanish from the view at the first refresh; longer (or NULL), and buckets whose
    -- events were dropped are computed again, from nothing or from what a replay brought back: dropping a chunk marks
    -- its time as changed. So a window may shrink but never grows, which a larger scoreboard.history_days would make
    -- it do. Where nothing is dropped it has no end.
    FOR v IN SELECT * FROM (VALUES
        ('score_hourly', 'score_events', 'at',     INTERVAL '1 hour', 'sum(delta)::bigint', 'count(*)',
         'max(ARRAY[ver_ms, ver_seq, score])', nullif(days, 0) * INTERVAL '22.4 hours',  INTERVAL '1 hour', INTERVAL '15 minutes', CASE WHEN days > 0 THEN INTERVAL '180 days' END),
        ('score_daily',  'score_hourly', 'bucket', INTERVAL '1 day',  'sum(delta)::bigint', 'sum(events)::bigint',
         'max(last_ver)',                      CASE WHEN days > 0 THEN INTERVAL '175 days' END, INTERVAL '1 day',  INTERVAL '1 hour',     NULL)
      ) AS t(name, src, ts, width, s, n, lst, start_off, end_off, every, keep)
    LOOP
        -- last_ver = {ms, seq, score} of the newest event. last(score, at) is wrong when two
        -- events share a millisecond; max() over the array orders by (ms, seq) and is plain SQL.
        body := format('SELECT board, player_id, %s AS bucket, %s AS delta, %s AS events, '
                       '%s AS last_ver, (%s)[3] AS last_score FROM %I GROUP BY 1, 2, 3',
                       format(CASE WHEN has_ts THEN 'time_bucket(%L::interval, %I)'
                                   ELSE 'date_bin(%L::interval, %I, timestamptz ''2000-01-01 00:00Z'')' END,
                              v.width, v.ts),
                       v.s, v.n, v.lst, v.lst, v.src);
        IF has_tsl THEN
            SELECT EXISTS (SELECT FROM timescaledb_information.continuous_aggregates
                           WHERE view_schema = current_schema() AND view_name = v.name) INTO is_cagg;
            IF NOT is_cagg THEN
                EXECUTE format('DROP VIEW IF EXISTS %I CASCADE', v.name);   -- plain view from a degraded install
                EXECUTE format('CREATE MATERIALIZED VIEW %I WITH (timescaledb.continuous, '
                               'timescaledb.materialized_only = false) AS %s WITH NO DATA', v.name, body);
            END IF;
            IF is_new THEN
                v.start_off := LEAST(v.start_off, (
                    SELECT (config->>'start_offset')::interval FROM timescaledb_information.jobs
                    WHERE hypertable_schema = current_schema() AND hypertable_name = v.name
                      AND proc_name = 'policy_refresh_continuous_aggregate'));
                PERFORM remove_continuous_aggregate_policy(v.name::regclass, if_exists => true);
            END IF;
            PERFORM add_continuous_aggregate_policy(v.name::regclass, start_offset => v.start_off,
                        end_offset => v.end_off, schedule_interval => v.every, if_not_exists => true);
            IF v.keep IS NOT NULL THEN
                PERFORM add_retention_policy(v.name::regclass, v.keep, if_not_exists => true);
            END IF;
        ELSE
            EXECUTE format('CREATE OR REPLACE VIEW %I AS %s', v.name, body);
        END IF;
    END LOOP;
    RAISE INFO 'leaderboard schema ready: timescaledb=%, community features=%', has_ts, has_tsl;
END $$;
RESET client_min_messages;
