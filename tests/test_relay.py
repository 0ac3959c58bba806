"""The relay: everything that the outbox owes reaches Kafka, in order, and only then leaves Redis."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import redis as redis_client
from confluent_kafka import TIMESTAMP_CREATE_TIME, Message
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ResourceType,
)

from server.config import Settings
from server.embedded import RedisServer
from server.events import decode_event
from server.fences import EPOCH_HEADER
from server.kafka_tail import KafkaTail
from server.keys import Keys
from sync.kafka import new_admin
from sync.lease import Lease
from sync.relay import Relay
from sync.topics import ensure_topics, look_up, times_refused
from tests.odd_records import ODD_ENTRIES, owe_odd_entries
from tests.services import KafkaBroker, SyncProcess, wait_until
from tests.sync_parts import add_entries, add_entry, environment_of, limit_dead_letters, records_of, running

pytestmark = [pytest.mark.redis, pytest.mark.kafka]


@pytest.fixture
def settings(
    redis: redis_client.Redis, redis_server: RedisServer, kafka_broker: KafkaBroker, kafka_topic: str
) -> Settings:
    made = Settings(
        redis_host=redis_server.host,
        redis_port=redis_server.port,
        kafka_brokers=kafka_broker.brokers,
        kafka_topic=kafka_topic,
        kafka_partitions=3,
    )
    ensure_topics(made)
    verified(redis, epoch=1)
    return made


def verified(redis: redis_client.Redis, epoch: int) -> None:
    """Let Redis look as a server leaves it that has verified it."""
    redis.hset(Keys().ready, mapping={"epoch": epoch, "run_id": redis.info("server")["run_id"]})


def outbox_is_empty(redis: redis_client.Redis) -> Callable[[], bool]:
    return lambda: redis.xlen("outbox") == 0


def first_deliveries(records: list[Message]) -> list[tuple[str, int]]:
    """(player, score) of each event in the order of versions; each partition has to bring them in that order."""
    versions: dict[int, tuple[int, int]] = {}
    found = {}
    for record in records:
        event = decode_event(record.value())
        if event.event_id not in found:
            assert event.version > versions.get(record.partition(), (0, 0)), "out of order"
            versions[record.partition()] = event.version
            found[event.event_id] = event
    return [(event.player_id, event.new_score) for event in sorted(found.values(), key=lambda event: event.version)]


def test_entry_becomes_one_record_per_event(redis: redis_client.Redis, settings: Settings) -> None:
    entry_id = add_entry(redis, [("ann", 5, 5), ("bob", -2, -2)])
    with running(Relay, settings):
        wait_until(outbox_is_empty(redis))
    by_key = {record.key(): record for record in records_of(settings)}
    assert set(by_key) == {b"ann", b"bob"}
    ms = int(entry_id.split("-")[0])
    value = f'{{"eventId":"{entry_id}-1","board":"main","playerId":"bob","scoreDelta":-2,"newScore":-2,"at":{ms}}}'
    assert by_key[b"bob"].value() == value.encode()
    assert by_key[b"bob"].headers() == [("v", b"1"), ("epoch", b"1")]
    assert by_key[b"bob"].timestamp() == (TIMESTAMP_CREATE_TIME, ms)


def test_many_entries_arrive_once_and_in_order(redis: redis_client.Redis, settings: Settings) -> None:
    expected = add_entries(redis, 1000)
    with running(Relay, settings):
        wait_until(outbox_is_empty(redis))
    records = records_of(settings)
    assert len(records) == len(expected)
    assert first_deliveries(records) == expected


def test_second_relay_waits_and_takes_over(redis: redis_client.Redis, settings: Settings) -> None:
    with running(Relay, settings) as second:
        with running(Relay, settings) as first:
            add_entries(redis, 3)
            wait_until(outbox_is_empty(redis))
            assert sorted([first.relayed_events, second.relayed_events]) == [0, 30]
            if second.relayed_events:  # it may have been quicker to the lease
                return
        add_entries(redis, 2, first=3)
        wait_until(outbox_is_empty(redis))
        assert second.relayed_events == 20


def test_relay_gives_its_lease_back(redis: redis_client.Redis, settings: Settings) -> None:
    key = Keys().relay_lease
    with running(Relay, settings):
        wait_until(lambda: redis.exists(key))
    assert not redis.exists(key)


def test_lease_is_renewed_and_released_only_by_its_holder(redis: redis_client.Redis) -> None:
    ours, theirs = Lease(redis, "lease", "ours"), Lease(redis, "lease", "theirs")
    assert ours.hold()
    assert not theirs.hold()
    theirs.release()
    redis.pexpire("lease", 500)
    assert ours.hold()
    assert redis.pttl("lease") > 1000
    redis.delete("lease")
    assert theirs.hold()
    assert not ours.hold()


@pytest.mark.parametrize(
    "put", [lambda redis: redis.set("lease", "x"), lambda redis: redis.sadd("lease", "x")], ids=["string", "set"]
)
def test_lease_without_an_end_gets_one(redis: redis_client.Redis, put: Callable[[redis_client.Redis], object]) -> None:
    put(redis)
    assert not Lease(redis, "lease", "ours").hold()
    assert 0 < redis.pttl("lease") <= 2000
    redis.pexpire("lease", 1)
    wait_until(lambda: Lease(redis, "lease", "ours").hold())


def test_relay_that_lost_its_lease_stops_and_waits(redis: redis_client.Redis, settings: Settings) -> None:
    key = Keys().relay_lease
    with running(Relay, settings) as relay:
        wait_until(lambda: redis.exists(key))
        redis.set(key, "somebody else")
        wait_until(lambda: relay.turns_lost == 1)
        add_entries(redis, 1)
        assert redis.xlen("outbox") == 1
        redis.delete(key)
        wait_until(outbox_is_empty(redis))


def test_relay_waits_for_a_redis_that_a_server_has_verified(redis: redis_client.Redis, settings: Settings) -> None:
    redis.delete(Keys().ready)
    with running(Relay, settings) as relay:
        expected = add_entries(redis, 2)
        wait_until(lambda: redis.exists(Keys().relay_lease))
        assert (relay.relayed_events, redis.xlen("outbox")) == (0, 2)
        verified(redis, epoch=7)
        wait_until(outbox_is_empty(redis))
    records = records_of(settings)
    assert first_deliveries(records) == expected
    assert {dict(record.headers())[EPOCH_HEADER] for record in records} == {b"7"}


def test_entries_of_an_epoch_that_rises_are_sent_again_before_they_leave_the_outbox(
    redis: redis_client.Redis, settings: Settings, kafka_broker: KafkaBroker
) -> None:
    with running(Relay, settings) as relay:
        first = add_entries(redis, 2)
        wait_until(outbox_is_empty(redis))
        kafka_broker.pause()
        try:
            more = add_entries(redis, 3, first=2)
            wait_until(lambda: relay.relayed_events == 50)
            verified(redis, epoch=2)  # a fence may stand before what Kafka confirms from here on
        finally:
            kafka_broker.resume()
        wait_until(outbox_is_empty(redis))
        assert relay.turns_lost == 1
    records = records_of(settings)
    assert first_deliveries(records) == first + more
    again = [record for record in records if dict(record.headers())[EPOCH_HEADER] == b"2"]
    assert first_deliveries(again) == more


def test_nothing_is_trimmed_that_kafka_has_not_confirmed(
    redis: redis_client.Redis, settings: Settings, kafka_broker: KafkaBroker
) -> None:
    with running(Relay, settings) as relay:
        first = add_entries(redis, 5)
        wait_until(outbox_is_empty(redis))
        kafka_broker.pause()
        try:
            more = add_entries(redis, 7, first=5)
            wait_until(lambda: relay.relayed_events == 120)
            assert redis.xlen("outbox") == 7
        finally:
            kafka_broker.resume()
        wait_until(outbox_is_empty(redis))
    assert first_deliveries(records_of(settings)) == first + more


def test_relay_killed_midway_is_followed_by_one_that_delivers_the_rest(
    redis: redis_client.Redis, settings: Settings, kafka_broker: KafkaBroker, tmp_path: Path
) -> None:
    process = SyncProcess(tmp_path, environment_of(settings), "relay")
    process.start()
    try:
        first = add_entries(redis, 50)
        wait_until(outbox_is_empty(redis))
        kafka_broker.pause()
        more = add_entries(redis, 50, first=50)
        process.kill()
    finally:
        kafka_broker.resume()
    assert redis.xlen("outbox") == 50
    process.start()
    try:
        wait_until(outbox_is_empty(redis))
        assert process.stop() == 0
    finally:
        process.stop()
    assert first_deliveries(records_of(settings)) == first + more


def test_relay_goes_on_when_redis_comes_back(settings: Settings, fresh_redis: Callable[..., RedisServer]) -> None:
    server = fresh_redis(appendfsync="always")
    own = Settings(redis_port=server.port, kafka_brokers=settings.kafka_brokers, kafka_topic=settings.kafka_topic)
    with redis_client.Redis(port=server.port) as client, running(Relay, own):
        verified(client, epoch=1)
        expected = add_entries(client, 20)
        wait_until(outbox_is_empty(client))
        server.kill()
        server.start()
        expected += add_entries(client, 20, first=20)
        wait_until(outbox_is_empty(client))
    assert first_deliveries(records_of(own)) == expected


def test_entry_that_is_no_batch_is_put_aside_and_blocks_nothing(redis: redis_client.Redis, settings: Settings) -> None:
    bad = redis.xadd("outbox", {"batch": b"\xc1"}).decode()
    other = redis.xadd("outbox", {"something": "else"}).decode()
    short = redis.xadd("outbox", {"batch": b"\x93\xa4main\xa3ann\x01"}).decode()
    strange = add_entry(redis, [("ann", 1, msgspec.msgpack.Ext(1, b""))])  # type: ignore[list-item]
    endless = add_entry(redis, [("ann", 1, 1)] * 30_000)
    expected = add_entries(redis, 1)
    with running(Relay, settings) as relay:
        wait_until(outbox_is_empty(redis))
    assert relay.dead_letters == 5
    assert first_deliveries(records_of(settings)) == expected
    letters = [dict(letter.headers()) for letter in records_of(settings, settings.dead_letter_topic)]
    assert [letter["outbox"].decode() for letter in letters] == [bad, other, short, strange, endless]
    assert letters[1]["reason"] == b"expected the field `batch`"


def test_odd_entry_is_put_aside_whatever_is_odd_about_it(redis: redis_client.Redis, settings: Settings) -> None:
    expected = add_entries(redis, 1)
    odd = owe_odd_entries(redis)
    with running(Relay, settings) as relay:
        wait_until(outbox_is_empty(redis))
    assert relay.dead_letters == len(odd) == len(ODD_ENTRIES) + 1
    assert first_deliveries(records_of(settings)) == expected
    letters = [dict(letter.headers()) for letter in records_of(settings, settings.dead_letter_topic)]
    assert [letter["outbox"].decode() for letter in letters] == odd


@pytest.mark.parametrize("epoch", ["", "odd", "9" * 19, "9" * 5000])
def test_marker_without_an_epoch_is_none(redis: redis_client.Redis, settings: Settings, epoch: str) -> None:
    redis.hset(Keys().ready, "epoch", epoch)
    expected = add_entries(redis, 1)
    with running(Relay, settings) as relay:
        wait_until(lambda: relay.redis_outage.goes_on)
        verified(redis, epoch=7)
        wait_until(outbox_is_empty(redis))
    records = records_of(settings)
    assert first_deliveries(records) == expected
    assert {dict(record.headers())[EPOCH_HEADER] for record in records} == {b"7"}


def test_entry_larger_than_the_dead_letter_topic_takes_is_cut(redis: redis_client.Redis, settings: Settings) -> None:
    limit_dead_letters(settings, 2000)
    add_entry(redis, [("ann", 1, 1)] * 30_000)
    expected = add_entries(redis, 1)
    with running(Relay, settings):
        wait_until(outbox_is_empty(redis))
    assert first_deliveries(records_of(settings)) == expected
    (letter,) = records_of(settings, settings.dead_letter_topic)
    assert 0 < len(letter) < 2000


TWO_HOURS_MS = 2 * 3_600_000


def add_future_entries(redis: redis_client.Redis) -> list[tuple[str, int]]:
    """What a Redis leaves whose clock was two hours ahead: an id in the future, and others just above it."""
    ms = redis.time()[0] * 1000 + TWO_HOURS_MS
    payload = msgspec.msgpack.encode(["main", "ann", 1, 1])
    redis.xadd("outbox", {"batch": payload}, id=f"{ms}-0")
    later = add_entry(redis, [("ann", 1, 2)])
    assert later == f"{ms}-1"
    return [("ann", 1), ("ann", 2)]


def bound_times(settings: Settings, **bounds: str) -> None:
    """Set what the topics of an older version have, or what a broker has by default."""
    admin = AdminClient({"bootstrap.servers": settings.kafka_brokers})
    for name in (settings.kafka_topic, settings.dead_letter_topic):
        entries = [
            ConfigEntry(f"message.timestamp.{key}", value, incremental_operation=AlterConfigOpType.SET)
            for key, value in bounds.items()
        ]
        topic = ConfigResource(ResourceType.TOPIC, name, incremental_configs=entries)
        for future in admin.incremental_alter_configs([topic]).values():
            future.result(10)


HOUR_AHEAD = {"after.max.ms": "3600000"}


def test_entries_from_the_future_are_relayed_and_found_by_time(redis: redis_client.Redis, settings: Settings) -> None:
    expected = add_future_entries(redis)
    redis.xadd("outbox", {"batch": b"no batch"})
    with running(Relay, settings) as relay:
        wait_until(outbox_is_empty(redis))
        assert relay.turns_lost == 0
    records = records_of(settings)
    assert first_deliveries(records) == expected
    ms = decode_event(records[0].value()).at
    assert [record.timestamp() for record in records] == [(TIMESTAMP_CREATE_TIME, ms)] * 2
    assert len(records_of(settings, settings.dead_letter_topic)) == 1
    tail = KafkaTail(settings)
    log = tail.describe()
    assert log is not None
    now_ms, partition = redis.time()[0] * 1000, records[0].partition()
    for at_ms in (now_ms - 900_000, now_ms, ms):  # what a rebuild and a replay ask for
        assert tail.first_since(at_ms)[partition] == records[0].offset()
    assert tail.first_since(ms + 1)[partition] == log.bounds[partition][1]
    tail.close()


@pytest.mark.parametrize("bounds", [HOUR_AHEAD, {"type": "LogAppendTime"}, {"before.max.ms": "1000"}])
def test_topics_that_exist_take_records_of_any_time_from_the_next_start_on(
    redis: redis_client.Redis, settings: Settings, bounds: dict[str, str]
) -> None:
    bound_times(settings, **bounds)
    admin = new_admin(settings)
    for name in (settings.kafka_topic, settings.dead_letter_topic):
        assert set(times_refused(admin, name)) == {f"message.timestamp.{key}" for key in bounds}
    ensure_topics(settings)
    for name in (settings.kafka_topic, settings.dead_letter_topic):
        wait_until(lambda name=name: not times_refused(admin, name))
    expected = add_future_entries(redis)
    with running(Relay, settings):
        wait_until(outbox_is_empty(redis))
    assert first_deliveries(records_of(settings)) == expected


def test_refusal_by_kafka_is_called_one_with_its_reason_until_it_is_over(
    redis: redis_client.Redis, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    bound_times(settings, **HOUR_AHEAD)
    expected = add_future_entries(redis)
    with running(Relay, settings) as relay:
        refused = re.compile(
            "Kafka refuses, trying on: .*time of records.*`scoreboard migrate`.*failed to validate record"
        )
        wait_until(lambda: refused.search(caplog.text), message=caplog.text)
        assert redis.xlen("outbox") == 2
        wait_until(lambda: relay.lag_s > 0)
        ensure_topics(settings)
        wait_until(outbox_is_empty(redis))
        assert not relay.kafka_outage.goes_on
        assert relay.lag_s == 0
    assert "does not answer" not in caplog.text
    assert first_deliveries(records_of(settings)) == expected


def test_lag_is_measured_by_the_clock_of_redis(
    redis: redis_client.Redis, settings: Settings, kafka_broker: KafkaBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 5.0)
    ms = redis.time()[0] * 1000 - 60_000
    with running(Relay, settings) as relay:
        wait_until(lambda: relay.holds_lease)
        kafka_broker.pause()
        try:
            redis.xadd("outbox", {"batch": msgspec.msgpack.encode(["main", "ann", 1, 1])}, id=f"{ms}-0")
            wait_until(lambda: 60 <= relay.lag_s < 3600)
        finally:
            kafka_broker.resume()


def test_topics_are_made_once_and_stay_what_they_are(settings: Settings) -> None:
    before = look_up(settings)
    ensure_topics(settings)
    assert look_up(settings) == before
    assert before.partitions == 3
