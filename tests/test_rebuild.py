"""A Redis that forgot something gets it back, once, or is not written at all."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import psycopg
import pytest
import redis as redis_client
from confluent_kafka import TIMESTAMP_CREATE_TIME, KafkaError, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from server import kafka_tail, rebuild_lock
from server.config import Settings
from server.database import Database
from server.embedded import RedisServer, free_port
from server.errors import NotReady, Problem
from server.events import FORMAT_VERSION, MEMORY_FIELD, MEMORY_HEADER, OUTBOX_FIELD, ScoreEvent, encode_event
from server.fences import EPOCH_HEADER, TAG_HEADER
from server.kafka_tail import KafkaTail
from server.keys import Keys, tag_of
from server.rebuild import Verifier
from server.rebuild_lock import RebuildLocks
from server.redis_connection import RedisConnection, open_connection
from server.replay import Log
from server.scores import Outcome
from sync import store
from sync.topics import ensure_topics, look_up
from tests.client import board, can_write, connect, get, post, store_scores, wait_until_writable
from tests.odd_records import owe_odd_entries, put_odd_records
from tests.services import KafkaBroker, ServerProcess, SyncProcess, wait_until
from tests.sync_parts import environment_of, event, put_fences, records_of
from tests.test_idempotency import submit
from tests.test_scores import bench

pytestmark = [pytest.mark.redis, pytest.mark.postgres, pytest.mark.kafka]

KEYS = Keys()
NOW_MS = time.time_ns() // 1_000_000
MEMORY = "f" * 16 + "ann:k1"


def send(settings: Settings, *events: ScoreEvent, memory: str = "", epoch: int | None = None, tag: str = "") -> None:
    """Put events into Kafka as the relay does."""
    producer, failures = Producer({"bootstrap.servers": settings.kafka_brokers}), []
    for one in events:
        headers = [("v", FORMAT_VERSION)] + ([(MEMORY_HEADER, memory.encode())] if memory else [])
        headers += [(EPOCH_HEADER, str(epoch).encode())] if epoch else []
        headers += [(TAG_HEADER, tag.encode())] if tag else []
        producer.produce(
            settings.kafka_topic,
            encode_event(one),
            one.player_id,
            timestamp=one.at,
            headers=headers,
            on_delivery=lambda error, _: failures.append(error) if error else None,
        )
    assert producer.flush(10) == 0
    assert not failures


def forget(settings: Settings, *, before: int) -> None:
    """Let the log's only partition expire up to an offset."""
    admin = AdminClient({"bootstrap.servers": settings.kafka_brokers})
    for future in admin.delete_records([TopicPartition(settings.kafka_topic, 0, before)]).values():
        future.result(10)


def persist(settings: Settings, *events: ScoreEvent, next_offsets: dict[int, int], topic_id: str = "") -> None:
    """Put events and offsets into the database as the persister does."""
    writing = store.Store(settings.database_url)
    writing.persist(events, settings.kafka_topic, topic_id or look_up(settings).topic_id, next_offsets)
    writing.close()


def owe(redis: redis_client.Redis, *events: ScoreEvent, memory: str = "") -> None:
    """Put events into the outbox, one entry each, as apply_updates.lua does."""
    for one in events:
        fields = {OUTBOX_FIELD: msgspec.msgpack.encode([one.board, one.player_id, one.score_delta, one.new_score])}
        if memory:
            fields[MEMORY_FIELD] = msgspec.msgpack.encode([0, memory])
        redis.xadd(KEYS.outbox, cast(Any, fields), id=one.event_id.rpartition("-")[0])


def hold(redis: redis_client.Redis, *events: ScoreEvent) -> None:
    """Let Redis know events as after they were applied and relayed."""
    for one in events:
        owe(redis, one)
        redis.set(KEYS.board(one.board).score(one.player_id), one.new_score)
        redis.zadd(KEYS.board(one.board).leaderboard, {one.player_id: one.new_score})
        redis.xtrim(KEYS.outbox, maxlen=0, approximate=False)


def shown(redis: redis_client.Redis) -> dict[str, int]:
    """Scores by player, after a check that keys and board say the same."""
    ranked = {
        player.decode(): int(score)
        for player, score in redis.zrange(KEYS.board("main").leaderboard, 0, -1, withscores=True)
    }
    kept = {key.decode().split(":")[1]: int(redis.get(key) or 0) for key in redis.scan_iter("player:*")}
    assert ranked == kept
    return ranked


def last_id(redis: redis_client.Redis) -> str:
    return str(redis.xinfo_stream(KEYS.outbox)["last-generated-id"].decode())


def marker(redis: redis_client.Redis) -> tuple[int, str]:
    epoch, run_id = redis.hmget(KEYS.ready, "epoch", "run_id")
    return int(epoch or 0), (run_id or b"").decode()


def trust(redis: redis_client.Redis, epoch: int = 1) -> None:
    redis.hset(KEYS.ready, mapping={"epoch": epoch, "run_id": redis.info()["run_id"]})


async def verified(verifier: Verifier, settings: Settings, reasons: list[str] | None = None) -> int:
    connection = await open_connection(settings, lambda lost: None)
    try:
        async with asyncio.timeout(30):
            return int(await verifier.verify(connection, (reasons if reasons is not None else []).append))
    finally:
        connection.close()


def verify(settings: Settings, verifier: Verifier | None = None) -> int:
    """Verify Redis as a server does over a new connection; the epoch."""
    return asyncio.run(verified(verifier or new_verifier(settings), settings))


def new_verifier(settings: Settings) -> Verifier:
    return Verifier(settings, KEYS, Database(settings.database_url))


@pytest.fixture
def settings(redis_server: RedisServer, database_url: str, kafka_broker: KafkaBroker, kafka_topic: str) -> Settings:
    """A topic and a schema, both empty."""
    chosen = Settings(
        redis_port=redis_server.port,
        database_url=database_url,
        kafka_brokers=kafka_broker.brokers,
        kafka_topic=kafka_topic,
        kafka_partitions=1,
        kafka_fetch_wait_ms=10,
    )
    ensure_topics(chosen)
    store.migrate(database_url)
    return chosen


class TestRebuild:
    def test_empty_redis_gets_what_each_source_alone_knows(self, settings: Settings, redis: redis_client.Redis) -> None:
        old = [event("ann", 1000, score=10), event("bob", 1000, seq=1, score=20)]
        send(settings, *old)
        persist(settings, *old, next_offsets={0: 2})
        send(settings, event("bob", 2000, score=25), event("cid", 2000, seq=1, score=5), event("ann", 500, score=3))
        owe(redis, event("cid", 3000, score=7), event("dan", 3000, seq=1, score=-1))
        verify(settings)
        assert shown(redis) == {"ann": 10, "bob": 25, "cid": 7, "dan": -1}
        assert redis.xlen(KEYS.outbox) == 2, "what is owed stays"
        assert last_id(redis) == "3000-1"
        assert marker(redis) == (pytest.approx(NOW_MS, abs=3_600_000), redis.info()["run_id"])

    def test_odd_records_and_entries_are_passed_over(self, settings: Settings, redis: redis_client.Redis) -> None:
        send(settings, event("ann", NOW_MS, score=1), memory=MEMORY)
        put_odd_records(settings)
        send(settings, event("bob", NOW_MS, seq=1, score=2))
        owe(redis, event("cy", NOW_MS, seq=2, score=3))
        owe_odd_entries(redis)
        verify(settings)
        assert shown(redis) == {"ann": 1, "bob": 2, "cy": 3}
        assert redis.exists(KEYS.answer + MEMORY[16:])

    def test_ids_go_on_above_the_largest_version_seen(self, settings: Settings, redis: redis_client.Redis) -> None:
        ahead_ms = NOW_MS + 1_800_000
        send(settings, event("ann", ahead_ms, seq=7, index=3, score=5))
        verify(settings)
        assert last_id(redis) == f"{ahead_ms}-7"
        assert redis.xlen(KEYS.outbox) == 0

    @pytest.mark.parametrize(
        "harm",
        [
            lambda redis: redis.delete("leaderboard"),
            lambda redis: redis.delete("player:ann:score"),
            lambda redis: redis.delete("leaderboard") and redis.set("leaderboard", "x"),
            lambda redis: redis.delete("player:ann:score") and redis.hset("player:ann:score", "a", "b"),
            lambda redis: redis.delete("outbox") and redis.set("outbox", "x"),
            lambda redis: redis.set("scoreboard:ready", "x"),
            lambda redis: redis.zadd("leaderboard", {"ghost": 99}),
            lambda redis: redis.set("player:ghost:score", 99),
        ],
        ids=["no board", "no score", "board type", "score type", "outbox type", "marker type", "member", "score"],
    )
    def test_damage_gives_way_to_what_the_sources_say(
        self, settings: Settings, redis: redis_client.Redis, harm: Callable[[redis_client.Redis], Any]
    ) -> None:
        events = event("ann", 1000, score=10), event("bob", 1001, score=20)
        send(settings, *events)
        hold(redis, *events)
        harm(redis)
        if redis.type(KEYS.ready) == b"hash":
            redis.delete(KEYS.ready)  # as a server does that meets damage
        verify(settings)
        assert shown(redis) == {"ann": 10, "bob": 20}
        assert last_id(redis) == "1001-0"

    def test_outbox_missing_behind_a_marker_means_rebuild(self, settings: Settings, redis: redis_client.Redis) -> None:
        send(settings, event("ann", 1000, score=10))
        redis.hset(KEYS.ready, mapping={"epoch": NOW_MS * 2, "run_id": "another"})
        redis.set("player:bob:score", 5)
        assert verify(settings) == NOW_MS * 2 + 1
        assert shown(redis) == {"ann": 10}

    def test_answers_are_remembered_for_what_is_left_of_their_time(
        self, settings: Settings, redis: redis_client.Redis
    ) -> None:
        at_ms = time.time_ns() // 1_000_000 - 10_000
        early, late = event("ann", at_ms - 2_000_000, score=1), event("ann", at_ms, score=3)
        send(settings, early, memory="e" * 16 + "ann:old")
        send(settings, late, memory=MEMORY)
        persist(settings, early, late, next_offsets={0: 2})
        owe(redis, event("bob", at_ms, seq=1, score=-4), memory="0" * 16 + "bob:k1")
        verify(settings)
        assert redis.get(KEYS.answer + "ann:k1") == b"f" * 16 + b"3"
        assert redis.get(KEYS.answer + "bob:k1") == b"0" * 16 + b"-4"
        assert 86_400 - 60 < redis.ttl(KEYS.answer + "ann:k1") <= 86_400 - 10
        assert not redis.exists(KEYS.answer + "ann:old"), "older than IDEMPOTENCY_RESTORE_S"

    def test_idempotency_key_is_known_again_after_flushall(
        self, tmp_path: Path, settings: Settings, redis: redis_client.Redis
    ) -> None:
        environment = environment_of(settings)
        server, sync = ServerProcess(tmp_path, environment), SyncProcess(tmp_path, environment)
        try:
            sync.start()
            server.start()
            wait_until_writable(server)
            first = submit(server, 5, "k1")
            wait_until(lambda: redis.xlen(KEYS.outbox) == 0, 20, "the event was not relayed")
            redis.flushall()
            wait_until(lambda: redis.exists(KEYS.ready), 20, "Redis was not rebuilt")
            wait_until_writable(server)
            again = submit(server, 5, "k1")
            assert (again.replayed, again.body) == ("true", first.body)
            assert submit(server, 1, "k2").json["newScore"] == 6
        finally:
            server.stop()
            sync.stop()


class TestHashTags:
    """Each tag of a cluster is verified on its own; here they share one Redis, which makes no difference to that."""

    def test_tag_gets_its_own_boards_from_each_source(self, settings: Settings, redis: redis_client.Redis) -> None:
        def on(board: str, one: ScoreEvent) -> ScoreEvent:
            return msgspec.structs.replace(one, board=board)

        stored = [on(board, event("ann", 1000, score=1)) for board in ("main", "weekly")]
        send(settings, *stored)
        # Tag 5 is that of main. Its fence is known from the database, the other's is met on the way.
        writing, topic_id = store.Store(settings.database_url), look_up(settings).topic_id
        writing.persist(stored, settings.kafka_topic, topic_id, {0: 2}, {0: {"5": 7}})
        writing.close()
        assert (tag_of("main"), tag_of("weekly")) == ("5", "2")
        send(settings, event("bob", 2000, score=2), epoch=7, tag="5")
        send(settings, event("bob", 3000, score=3), epoch=6, tag="5")
        tail = KafkaTail(settings)
        tail.describe()
        tail.fence(9, 2000, "2")
        tail.close()
        send(settings, event("cid", 2000, score=4), epoch=8, tag="5")
        send(settings, on("weekly", event("cid", 2000, score=5)), epoch=9, tag="2")
        send(settings, on("weekly", event("dan", 2000, score=6)), epoch=8, tag="2")
        expected = {"main": {b"ann": 1, b"bob": 2, b"cid": 4}, "weekly": {b"ann": 1, b"cid": 5}}
        for name, scores in expected.items():
            keys = Keys(tag=tag_of(name))
            before = set(redis.keys())
            verify(settings, Verifier(settings, keys, Database(settings.database_url)))
            assert dict(redis.zrange(keys.board(name).leaderboard, 0, -1, withscores=True)) == scores
            assert all(key.startswith(keys.prefix.encode()) for key in set(redis.keys()) - before)
            assert len(redis.keys(f"{keys.prefix}*:score")) == len(scores)


class TestRefusal:
    @pytest.fixture
    def expired(self, settings: Settings, redis: redis_client.Redis) -> Settings:
        """Three events, of which the log has forgotten two; Redis has a score of its own."""
        send(settings, *(event("ann", 1000 + number, score=number) for number in range(3)))
        forget(settings, before=2)
        redis.set("player:bob:score", 5)
        return settings

    def refused(self, settings: Settings, redis: redis_client.Redis, why: str) -> None:
        with pytest.raises(NotReady, match=why):
            verify(settings)
        assert marker(redis) == (0, "")
        assert redis.exists(KEYS.rebuild_lock) == 0

    def test_empty_database_for_a_log_that_began_long_ago(self, expired: Settings, redis: redis_client.Redis) -> None:
        self.refused(expired, redis, "holds the offsets 2 to 3, but the database goes on at 0, for it has read nothing")
        assert redis.get("player:bob:score") == b"5", "a refusal harms nothing"
        verify(dataclasses.replace(expired, new_topic="restart"))
        assert shown(redis) == {"ann": 2}

    def test_log_that_expired_before_it_was_stored(self, expired: Settings, redis: redis_client.Redis) -> None:
        persist(expired, event("ann", 1000, score=0), next_offsets={0: 1})
        self.refused(expired, redis, "holds the offsets 2 to 3, but the database goes on at 1: ")

    def test_topic_made_anew_unless_told_to_restart(self, settings: Settings, redis: redis_client.Redis) -> None:
        persist(settings, event("ann", 1000, score=10), next_offsets={0: 5}, topic_id="another")
        send(settings, event("bob", 2000, score=1))
        self.refused(settings, redis, "was made anew: the database has read the id another")
        verify(dataclasses.replace(settings, new_topic="restart"))
        assert shown(redis) == {"ann": 10, "bob": 1}

    def test_missing_topic_that_the_database_has_read(self, settings: Settings, redis: redis_client.Redis) -> None:
        gone = dataclasses.replace(settings, kafka_topic=f"{settings.kafka_topic}-gone")
        persist(gone, event("ann", 1000, score=10), next_offsets={0: 1}, topic_id="another")
        self.refused(gone, redis, "there is no Kafka topic")

    def test_first_start_needs_no_topic_but_the_tables(
        self, settings: Settings, redis: redis_client.Redis, postgres_server: Any
    ) -> None:
        new = dataclasses.replace(settings, kafka_topic=f"{settings.kafka_topic}-new")
        self.refused(dataclasses.replace(new, database_url=postgres_server.url), redis, "scoreboard migrate")
        verify(new)
        assert shown(redis) == {}

    def test_first_start_while_kafka_is_down(self, settings: Settings, redis: redis_client.Redis) -> None:
        down = f"127.0.0.1:{free_port()}"
        self.refused(dataclasses.replace(settings, kafka_brokers=down), redis, f"Kafka at {down}")


class TestReplay:
    def test_redis_that_lost_nothing_only_gets_a_new_epoch(self, settings: Settings, redis: redis_client.Redis) -> None:
        hold(redis, event("ann", 1000, score=10))
        send(settings, event("ann", 900, score=1), event("ann", 1000, score=10))
        redis.set("player:bob:score", "untouched")
        redis.hset(KEYS.ready, mapping={"epoch": NOW_MS * 2, "run_id": "another"})
        assert verify(settings) == NOW_MS * 2 + 1
        assert marker(redis) == (NOW_MS * 2 + 1, redis.info()["run_id"])
        assert redis.get("player:bob:score") == b"untouched"
        assert last_id(redis) == "1000-0"

    def test_odd_records_in_the_missing_tail_are_passed_over(
        self, settings: Settings, redis: redis_client.Redis
    ) -> None:
        hold(redis, event("ann", NOW_MS, score=1))
        redis.hset(KEYS.ready, mapping={"epoch": 1, "run_id": "of another process"})
        put_odd_records(settings)
        send(settings, event("ann", NOW_MS, seq=1, score=2))
        verify(settings)
        assert shown(redis) == {"ann": 2}

    def test_copy_older_than_the_log_gets_what_only_the_database_knows(
        self, settings: Settings, redis: redis_client.Redis
    ) -> None:
        hold(redis, event("ann", 1000, score=1), event("bob", 1001, score=2), event("cid", 1002, score=3))
        redis.hset(KEYS.ready, mapping={"epoch": 1, "run_id": "of the Redis that was copied"})
        later = [event("ann", 2000, score=10), event("bob", 2001, score=20), event("bob", 2002, score=30)]
        send(settings, *later)
        persist(settings, *later, event("cid", 900, score=1), next_offsets={0: 3})
        forget(settings, before=2)
        verify(settings)
        assert shown(redis) == {"ann": 10, "bob": 30, "cid": 3}
        assert last_id(redis) == "2002-0"

    def test_aof_that_lost_its_tail_gets_the_missing_events_once(
        self, settings: Settings, fresh_redis: Callable[..., RedisServer]
    ) -> None:
        server = fresh_redis(appendfsync="always")
        settings = dataclasses.replace(settings, redis_port=server.port)
        events = [event(f"p{number % 7}", NOW_MS + number, score=number) for number in range(40)]
        send(settings, *events, memory=MEMORY)
        persist(settings, *events, next_offsets={0: 40})
        with connect(server) as redis:
            verify(settings)
            epoch, run_id = marker(redis)
            whole = shown(redis)
            redis.flushall()
            trust(redis, epoch)
            hold(redis, *events)
            redis.delete(KEYS.answer + "ann:k1")
        server.stop()
        log = log_of(server)
        log.write_bytes(log.read_bytes()[:-1500])
        server.start()
        with connect(server) as redis:
            assert last_id(redis) < f"{NOW_MS + 39}-0", "expected the tail to be gone"
            owed = redis.xlen(KEYS.outbox)
            assert verify(settings) > epoch
            assert shown(redis) == whole == {f"p{number % 7}": number for number in range(33, 40)}
            assert last_id(redis) == f"{NOW_MS + 39}-0"
            assert redis.xlen(KEYS.outbox) == owed, "no new events"
            assert marker(redis)[1] == redis.info()["run_id"] != run_id
            assert redis.get(KEYS.answer + "ann:k1") == b"f" * 16 + b"39"

    def test_lagging_replica_is_promoted_and_the_old_primary_later(
        self, settings: Settings, fresh_redis: Callable[..., RedisServer]
    ) -> None:
        first, second = fresh_redis(), fresh_redis()
        at_first, at_second = (dataclasses.replace(settings, redis_port=it.port) for it in (first, second))
        verifier = new_verifier(settings)
        events = [event("ann", 1000 + number, score=number) for number in range(4)]

        def follow(follower: redis_client.Redis, leader: RedisServer) -> None:
            follower.replicaof(leader.host, leader.port)
            with connect(leader) as led:
                wait_until(lambda: marker(follower) == marker(led), 20, "it did not follow")

        with connect(first) as a, connect(second) as b:
            send(settings, events[0])
            epochs = [verify(at_first, verifier)]
            follow(b, first)
            with pytest.raises(NotReady, match="is a replica"):
                verify(at_second)
            b.replicaof("NO", "ONE")  # from here on it lags
            hold(a, events[1])
            send(settings, events[1])
            epochs.append(verify(at_second, verifier))
            assert shown(b) == {"ann": 1}
            hold(b, events[2])
            send(settings, events[2])
            # The old primary's own marker is one that was verified, but the server knows better.
            epochs.append(verify(at_first, verifier))
            assert shown(a) == {"ann": 2}
            follow(a, second)
            a.replicaof("NO", "ONE")
            hold(b, events[3])
            send(settings, events[3])
            epochs.append(verify(at_first))
            assert shown(a) == {"ann": 3}
        assert epochs == sorted(set(epochs))

    def test_server_that_did_not_notice_meets_another_epoch(
        self, settings: Settings, redis: redis_client.Redis, redis_server: RedisServer
    ) -> None:
        async def main() -> None:
            async with bench(redis, redis_server, settings.database_url) as unaware:
                await unaware.ready()
                assert await unaware.submit("ann", 5).answer == (Outcome.APPLIED, 5)
                redis.hset(KEYS.ready, "run_id", "that of the Redis which failed over")
                unaware.scores._look = cast(Any, lambda connection: asyncio.sleep(0))
                await verified(Verifier(settings, KEYS, Database(settings.database_url)), settings)
                problem = await unaware.submit("ann", 1).answer
                assert isinstance(problem, Problem)
                assert problem.status == 503
                await unaware.ready()
                assert await unaware.submit("ann", 1).answer == (Outcome.APPLIED, 6)

        trust(redis)
        asyncio.run(main())

    def test_restart_while_kafka_is_away_fails_closed_and_recovers(
        self, tmp_path: Path, settings: Settings, kafka_broker: KafkaBroker, fresh_redis: Callable[..., RedisServer]
    ) -> None:
        redis = fresh_redis(appendfsync="always")
        store_scores(settings.database_url, ("main", "ann", 30))
        server = ServerProcess(tmp_path, environment_of(dataclasses.replace(settings, redis_port=redis.port)))
        try:
            server.start()
            wait_until_writable(server)
            kafka_broker.pause()
            redis.restart()
            kafka = f"Kafka at {settings.kafka_brokers}"
            wait_until(lambda: kafka in get(server, "/readyz").json()["write"].get("detail", ""), 20)
            time.sleep(2)  # nobody waits for a Redis that has been away for longer than the deadline
            refusal = post(server, "ann", 5)
            assert (refusal.status, kafka in refusal.json()["detail"]) == (503, True)
            assert board(server) == {"ann": 30}
            kafka_broker.resume()
            wait_until(lambda: can_write(server), 30, "it did not recover")
            assert post(server, "ann", 5).json()["newScore"] == 35
        finally:
            kafka_broker.resume()
            server.stop()


class TestFence:
    """What a relay still delivers of a Redis that is gone."""

    def test_event_delivered_before_the_fence_is_given_back_and_one_behind_it_is_not(
        self, settings: Settings, redis: redis_client.Redis
    ) -> None:
        hold(redis, event("ann", 1000, score=1))
        redis.hset(KEYS.ready, mapping={"epoch": 5, "run_id": "that of the Redis which is gone"})
        send(settings, event("ann", 1001, score=2), epoch=5)
        epoch = verify(settings)
        assert shown(redis) == {"ann": 2}
        send(settings, event("ann", 1002, score=3), event("bob", 1002, seq=1, score=1), epoch=5)  # too late
        send(settings, event("ann", 2000, score=12), epoch=epoch)
        redis.hset(KEYS.ready, "run_id", "that of a second Redis which is gone")
        verify(settings)
        assert shown(redis) == {"ann": 12}
        redis.flushall()
        verify(settings)
        assert shown(redis) == {"ann": 12}

    def test_rebuild_knows_the_fences_that_the_database_has_behind_it(
        self, settings: Settings, redis: redis_client.Redis
    ) -> None:
        put_fences(settings, epoch=6)
        writing = store.Store(settings.database_url)
        writing.persist([], settings.kafka_topic, look_up(settings).topic_id, {0: 1}, {0: {"": 6}})
        writing.close()
        send(settings, event("ann", 1000, score=1), memory=MEMORY, epoch=5)
        send(settings, event("bob", 1000, score=2), epoch=6)
        verify(settings)
        assert shown(redis) == {"bob": 2}

    def test_epoch_rises_above_that_of_every_fence(self, settings: Settings, redis: redis_client.Redis) -> None:
        ahead = NOW_MS * 2  # by a clock that was set wrong
        put_fences(settings, ahead)
        verifier = new_verifier(settings)
        with pytest.raises(NotReady, match="another epoch of Redis was verified before"):
            verify(settings, verifier)
        assert verify(settings, verifier) > ahead

    def test_partition_that_cannot_be_searched_by_time_does_not_pass_for_one_without_records(
        self, settings: Settings
    ) -> None:
        class Searching:
            def offsets_for_times(self, wanted: list[TopicPartition], timeout: float) -> list[Any]:
                error = KafkaError(KafkaError.LEADER_NOT_AVAILABLE)
                return [SimpleNamespace(partition=it.partition, offset=-1001, error=error) for it in wanted]

            def poll(self, timeout: float) -> None:
                pass

        send(settings, event("ann", NOW_MS, score=1))
        tail = KafkaTail(settings)
        tail.describe()
        consumer, tail._consumer = tail._consumer, Searching()
        try:
            with pytest.raises(NotReady, match="Leader not available"):
                tail.first_since(NOW_MS)
        finally:
            tail._consumer = consumer
            tail.close()

    def test_fence_that_waits_for_kafka_is_given_up_with_the_mending(
        self, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(kafka_tail, "ANSWER_WITHIN_S", 60.0)
        tail = KafkaTail(dataclasses.replace(settings, kafka_brokers=f"127.0.0.1:{free_port()}"))
        tail._log = Log("id", {0: (0, 0)})
        problems: list[NotReady] = []

        def fence() -> None:
            try:
                tail.fence(9, NOW_MS)
            except NotReady as problem:
                problems.append(problem)

        fencing = threading.Thread(target=fence)
        fencing.start()
        time.sleep(0.2)
        tail.close()
        fencing.join(20)
        assert "does not take fences" in str(problems.pop())

    def test_fence_is_dated_by_the_clock_of_redis_as_events_are(
        self, settings: Settings, redis: redis_client.Redis
    ) -> None:
        class HourBehind:
            def __init__(self, connection: RedisConnection) -> None:
                self._connection = connection

            async def execute(self, *command: bytes | str | int) -> Any:
                reply = await self._connection.execute(*command)
                return [int(reply[0]) - 3600, reply[1]] if command == ("TIME",) else reply

        async def main() -> None:
            connection = await open_connection(settings, lambda lost: None)
            try:
                await new_verifier(settings).verify(cast(Any, HourBehind(connection)), lambda reason: None)
            finally:
                connection.close()

        asyncio.run(main())
        (fence,) = records_of(settings)
        epoch = int(cast(bytes, redis.hget(KEYS.ready, "epoch")))
        assert fence.timestamp() == (TIMESTAMP_CREATE_TIME, epoch)

    def test_server_paused_before_its_fence_voids_nothing_that_was_accepted_meanwhile(
        self, tmp_path: Path, settings: Settings, redis: redis_client.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        true_clock, ahead_ns = time.time_ns, ContextVar("ahead_ns", default=0)
        monkeypatch.setattr(time, "time_ns", lambda: true_clock() + ahead_ns.get())
        environment = environment_of(settings)
        server, sync = ServerProcess(tmp_path, environment), SyncProcess(tmp_path, environment)

        def serve() -> None:
            server.start()
            sync.start()
            wait_until_writable(server)

        async def main() -> None:
            loop, reached, wake = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
            fenced = threading.Event()

            class Late(KafkaTail):
                def fence(self, epoch: int, at_ms: int, tag: str = "") -> dict[int, int]:
                    loop.call_soon_threadsafe(reached.set)
                    asyncio.run_coroutine_threadsafe(wake.wait(), loop).result(30)
                    try:
                        return super().fence(epoch, at_ms, tag)
                    finally:
                        fenced.set()

                def close(self) -> None:
                    if reached.is_set():
                        fenced.wait(30)  # else it could be given up in time
                    super().close()

            ahead_ns.set(10_000_000_000)
            paused = Verifier(settings, KEYS, Database(settings.database_url), lambda: Late(settings))
            sleeping = asyncio.create_task(verified(paused, settings))
            await reached.wait()
            redis.delete(KEYS.rebuild_lock)  # as its expiry does
            serve()  # on this thread, so that all of the paused server stands still
            fences = len(records_of(settings))
            wake.set()
            with pytest.raises(NotReady, match=r"another server goes on|another epoch of Redis was verified"):
                await sleeping
            await asyncio.to_thread(wait_until, lambda: len(records_of(settings)) > fences, 20, "no fence came")

        try:
            asyncio.run(main())
            for number in range(20):
                assert post(server, "ann").json()["newScore"] == number + 1
            wait_until(lambda: redis.xlen(KEYS.outbox) == 0, 20, "the events were not relayed")
            with psycopg.connect(settings.database_url, autocommit=True) as database:
                stored = "SELECT score FROM scores WHERE player_id = 'ann'"
                wait_until(lambda: database.execute(stored).fetchone() == (20,), 20, "the updates do not count")
            redis.flushall()
            wait_until(lambda: redis.exists(KEYS.ready), 20, "Redis was not rebuilt")
            assert shown(redis) == {"ann": 20}
        finally:
            server.stop()
            sync.stop()

    def test_live_relay_and_a_redis_that_lost_its_tail_end_up_with_the_same(
        self, tmp_path: Path, settings: Settings, kafka_broker: KafkaBroker, fresh_redis: Callable[..., RedisServer]
    ) -> None:
        """The relay holds events in its hands that Redis loses, and delivers them when Kafka goes on."""
        server = fresh_redis(appendfsync="always")
        settings = dataclasses.replace(settings, redis_port=server.port)
        environment = environment_of(settings)
        scoreboard, sync = ServerProcess(tmp_path, environment), SyncProcess(tmp_path, environment)
        try:
            scoreboard.start()
            sync.start()
            wait_until_writable(scoreboard)
            assert submit(scoreboard, 5, "k1").json["newScore"] == 5
            with connect(server) as redis:
                wait_until(lambda: redis.xlen(KEYS.outbox) == 0, 20, "the event was not relayed")
                kept = log_of(server).stat().st_size
                kafka_broker.pause()
                assert submit(scoreboard, 100, "k2").json["newScore"] == 105
                wait_until(lambda: redis.xlen(KEYS.outbox) == 1)
                time.sleep(0.3)  # nothing shows from outside that the relay has read it
            server.kill()
            with log_of(server).open("r+b") as file:
                file.truncate(kept)
            server.start()
            kafka_broker.resume()
            wait_until_writable(scoreboard)
            after = submit(scoreboard, 1, "k3").json["newScore"]
            with connect(server) as redis, psycopg.connect(settings.database_url, autocommit=True) as database:
                summed = "SELECT sum(delta)::bigint FROM score_events WHERE player_id = 'ann'"
                wait_until(lambda: redis.xlen(KEYS.outbox) == 0, 20, "the event was not relayed")
                wait_until(lambda: database.execute(summed).fetchone() == (after,), 20, "Redis and history differ")
                assert shown(redis) == {"ann": after}
        finally:
            kafka_broker.resume()
            scoreboard.stop()
            sync.stop()


def log_of(server: RedisServer) -> Path:
    """The file that Redis appends to."""
    return max((server.data / "appendonlydir").glob("*.incr.aof"))


class TestLock:
    def test_own_lock_is_taken_over_and_the_earlier_attempt_is_over(
        self, settings: Settings, redis: redis_client.Redis
    ) -> None:
        async def main() -> None:
            connection = await open_connection(settings, lambda lost: None)
            locks = RebuildLocks(KEYS.rebuild_lock)
            earlier = await locks.take(connection)
            held = redis.get(KEYS.rebuild_lock)
            later = await locks.take(connection)
            assert earlier is not None
            assert later is not None
            with pytest.raises(NotReady, match="another server goes on"):
                await earlier.write([("SET", "a", "1")])
            await later.write([("SET", "a", "2")])
            # A command of the earlier attempt that Redis gets only now.
            assert isinstance(held, bytes)
            server, attempt = held.decode().split(":")
            taking = rebuild_lock._TAKE, 1, KEYS.rebuild_lock, server, attempt, 3000
            assert await connection.execute("EVAL", *taking) is None
            await later.look()
            connection.close()

        asyncio.run(main())
        assert redis.get("a") == b"2"

    @pytest.mark.parametrize(
        "put", [lambda redis, key: redis.set(key, "x"), lambda redis, key: redis.sadd(key, "x")], ids=["string", "set"]
    )
    def test_lock_without_an_end_gets_one(
        self, settings: Settings, redis: redis_client.Redis, put: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(rebuild_lock, "LOCK_MS", 300)
        put(redis, KEYS.rebuild_lock)
        send(settings, event("ann", 1000, score=10))
        verify(settings)
        assert shown(redis) == {"ann": 10}

    def test_lost_lock_cancels_the_mending_wherever_it_waits(
        self, settings: Settings, redis: redis_client.Redis
    ) -> None:
        async def main() -> None:
            loop, reached, wake = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

            class Stuck(KafkaTail):
                def describe(self) -> Log | None:
                    loop.call_soon_threadsafe(reached.set)
                    wake.wait(20)
                    return super().describe()

            stuck = Verifier(settings, KEYS, Database(settings.database_url), lambda: Stuck(settings))
            waiting = asyncio.create_task(verified(stuck, settings))
            await reached.wait()
            redis.set(KEYS.rebuild_lock, "of another server", px=60_000)
            try:
                with pytest.raises(NotReady, match="another server goes on"):
                    async with asyncio.timeout(10):
                        await waiting
            finally:
                wake.set()

        asyncio.run(main())
        assert marker(redis) == (0, "")

    def test_epoch_rises_above_each_that_was_taken_whatever_has_become_of_it(
        self, settings: Settings, redis: redis_client.Redis
    ) -> None:
        seconds, _ = cast(Any, redis.time())
        assert verify(settings) == pytest.approx(1000 * seconds, abs=60_000)
        redis.set(KEYS.epoch_taken, 2 * NOW_MS)
        redis.hset(KEYS.ready, "run_id", "another")
        assert verify(settings) == 2 * NOW_MS + 1
        assert redis.get(KEYS.epoch_taken) == str(2 * NOW_MS + 1).encode()
        redis.hset(KEYS.ready, mapping={"epoch": 3 * NOW_MS, "run_id": "another"})
        assert verify(settings) == 3 * NOW_MS + 1

    @pytest.mark.parametrize(
        "put",
        [
            lambda redis: redis.sadd(KEYS.epoch_taken, "x"),
            lambda redis: redis.set(KEYS.epoch_taken, "9" * 5000),
            lambda redis: redis.hset(KEYS.ready, mapping={"epoch": "9" * 5000, "run_id": redis.info()["run_id"]}),
        ],
        ids=["type", "taken", "marker"],
    )
    def test_epoch_that_is_none_counts_for_none(
        self, settings: Settings, redis: redis_client.Redis, put: Callable[[redis_client.Redis], Any]
    ) -> None:
        put(redis)
        assert verify(settings) == pytest.approx(NOW_MS, abs=3_600_000)

    def test_another_token_writes_nothing(self, settings: Settings, redis: redis_client.Redis) -> None:
        async def main() -> None:
            connection = await open_connection(settings, lambda lost: None)
            lock = await RebuildLocks(KEYS.rebuild_lock).take(connection)
            assert lock is not None
            assert await RebuildLocks(KEYS.rebuild_lock).take(connection) is None
            await lock.write([("SET", "a", "1"), ("SET", "b", "2")])
            redis.set(KEYS.rebuild_lock, "another's token", px=5000)
            with pytest.raises(NotReady, match="another server goes on"):
                await lock.write([("SET", "a", "3")])
            await lock.hold_during(asyncio.sleep(0))
            assert redis.get(KEYS.rebuild_lock) == b"another's token"
            connection.close()

        asyncio.run(main())
        assert redis.mget("a", "b") == [b"1", b"2"]

    def test_rebuilder_paused_past_its_lock_writes_nothing_when_it_wakes(
        self, settings: Settings, redis: redis_client.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        send(settings, event("ann", 1000, score=10))

        async def main() -> None:
            reached, wake = asyncio.Event(), asyncio.Event()

            class Stalling(KafkaTail):
                def read(self) -> list[Any]:
                    loop.call_soon_threadsafe(reached.set)
                    asyncio.run_coroutine_threadsafe(wake.wait(), loop).result(20)
                    return super().read()

            loop = asyncio.get_running_loop()
            paused = Verifier(settings, KEYS, Database(settings.database_url), lambda: Stalling(settings))
            sleeping = asyncio.create_task(verified(paused, settings))
            await reached.wait()
            redis.delete(KEYS.rebuild_lock)  # as its expiry does
            epoch = await verified(new_verifier(settings), settings)
            redis.set("player:ann:score", 11)
            redis.zadd("leaderboard", {"ann": 11})
            wake.set()
            with pytest.raises(NotReady, match="another server goes on"):
                await sleeping
            assert marker(redis)[0] == epoch

        asyncio.run(main())
        assert shown(redis) == {"ann": 11}

    def test_rebuilder_that_died_blocks_the_next_until_its_lock_expires(
        self, settings: Settings, redis: redis_client.Redis
    ) -> None:
        send(settings, event("ann", 1000, score=10))
        redis.set(KEYS.rebuild_lock, "of the dead", px=700)
        redis.set("player:bob:score", 5)
        reasons: list[str] = []
        started_s = time.monotonic()
        asyncio.run(verified(new_verifier(settings), settings, reasons))
        assert time.monotonic() - started_s > 0.5
        assert reasons[0] == "Redis is being verified or rebuilt by another server"
        assert shown(redis) == {"ann": 10}

    def test_server_waits_for_another_longer_than_a_verification_may_take(
        self, settings: Settings, redis: redis_client.Redis, redis_server: RedisServer
    ) -> None:
        async def main() -> None:
            async with bench(redis, redis_server, settings.database_url) as waiting:
                await waiting.until(lambda: "by another server" in waiting.scores.reason)
                await waiting.until(lambda: waiting.scores.epoch is not None, 10)

        redis.set(KEYS.rebuild_lock, "of another server", px=3600)
        asyncio.run(main())
