"""The persister: every event is stored once, whatever is repeated, broken or away."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition
from confluent_kafka.admin import AdminClient

from server.config import Settings
from server.errors import TopicChanged
from server.events import PERSISTER_GROUP
from sync import persister, waiting
from sync.persister import Persister
from sync.placement import LogGap, check_topic, first_offset
from sync.store import Store, StoredOffset
from sync.topics import Topic, ensure_topics, look_up
from tests.odd_records import ODD, put_odd_records
from tests.services import KafkaBroker, SyncProcess, wait_until
from tests.sync_parts import environment_of, event, migrated, put_fences, put_records, records_of, running


@pytest.fixture(params=["postgres", pytest.param("timescale", marks=pytest.mark.timescale)])
def database_url(request: pytest.FixtureRequest, database_url: str) -> str:
    """An empty database, on either kind of server."""
    return str(request.getfixturevalue("timescale_url")) if request.param == "timescale" else database_url


@pytest.fixture
def settings(kafka_broker: KafkaBroker, kafka_topic: str, database_url: str) -> Settings:
    return migrated(kafka_broker, kafka_topic, database_url, partitions=3)


@pytest.fixture
def database(settings: Settings) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(settings.database_url, autocommit=True) as connection:
        yield connection


class AssignedConsumer:
    """In the place of Kafka's, for what depends on the moment at which partitions change hands."""

    def __init__(self) -> None:
        self.partitions: list[TopicPartition] = []

    def assign(self, partitions: list[TopicPartition]) -> None:
        self.partitions = partitions

    def unassign(self) -> None:
        self.partitions = []

    def assignment(self) -> list[TopicPartition]:
        return self.partitions

    def pause(self, partitions: list[TopicPartition]) -> None:
        pass

    resume = pause

    def get_watermark_offsets(self, _: TopicPartition, **__: Any) -> tuple[int, int]:
        return 0, 1000

    def consume(self, *_: Any) -> list[Message]:
        return []


class AnsweringStore:
    """In the place of the database; `meanwhile` is called while the offsets are asked for."""

    def __init__(self, meanwhile: Callable[[], None]) -> None:
        self._meanwhile = meanwhile

    def offsets(self, _: str) -> dict[int, StoredOffset]:
        self._meanwhile()
        return {0: StoredOffset("id", 100)}


@contextmanager
def placing(
    monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[Persister, Any], None]
) -> Iterator[tuple[Persister, AssignedConsumer]]:
    """A persister that has one partition, and whose next step places it; then something happens."""
    part, consumer = (
        Persister(Settings(kafka_brokers="127.0.0.1:1", kafka_topic="t"), waiting.Stop()),
        AssignedConsumer(),
    )
    real, part._consumer = part._consumer, consumer  # type: ignore[assignment]
    part._store = AnsweringStore(lambda: meanwhile(part, consumer))  # type: ignore[assignment]
    monkeypatch.setattr(persister, "look_up", lambda _: Topic("id", 1))
    part._on_assign(consumer, [TopicPartition("t", 0)])  # type: ignore[arg-type]
    try:
        yield part, consumer
    finally:
        real.close()


def stored(database: psycopg.Connection[Any]) -> int:
    row = database.execute("SELECT count(*) FROM score_events").fetchone()
    assert row is not None
    return int(row[0])


def caught_up(database: psycopg.Connection[Any], records: int) -> bool:
    return database.execute("SELECT sum(next_offset) FROM consumer_offsets").fetchone() == (records,)


def scores(database: psycopg.Connection[Any]) -> dict[str, int]:
    return dict(database.execute("SELECT player_id, score FROM scores").fetchall())


def topic_id_now(settings: Settings) -> str | None:
    """None while there is none; a broker needs a moment to know what it did."""
    try:
        return look_up(settings).topic_id
    except KafkaException:
        return None


def make_anew(settings: Settings) -> None:
    """Delete the topic of events and create it again, as somebody might by hand."""
    admin = AdminClient({"bootstrap.servers": settings.kafka_brokers})
    before = look_up(settings)
    for future in admin.delete_topics([settings.kafka_topic]).values():
        future.result()
    wait_until(lambda: topic_id_now(settings) is None)
    ensure_topics(settings)
    wait_until(lambda: topic_id_now(settings) not in (None, before.topic_id))


@pytest.mark.kafka
@pytest.mark.postgres
def test_events_become_history_scores_and_offsets(settings: Settings, database: psycopg.Connection[Any]) -> None:
    put_records(settings, [event(f"player{i % 7}", 1000 + i, score=i) for i in range(700)])
    with running(Persister, settings) as part:
        wait_until(lambda: caught_up(database, 700))
    assert part.persisted_events == stored(database) == 700
    assert scores(database) == {f"player{i % 7}": i for i in range(693, 700)}


@pytest.mark.kafka
@pytest.mark.postgres
def test_group_offsets_follow_so_that_operators_see_the_lag(
    settings: Settings, database: psycopg.Connection[Any]
) -> None:
    put_records(settings, [event("ann", 1000)])
    observer = Consumer({"bootstrap.servers": settings.kafka_brokers, "group.id": PERSISTER_GROUP})
    partitions = [TopicPartition(settings.kafka_topic, partition) for partition in range(3)]
    with running(Persister, settings):
        wait_until(lambda: any(it.offset == 1 for it in observer.committed(partitions, timeout=5)))
    observer.close()


@pytest.mark.kafka
@pytest.mark.postgres
def test_event_that_comes_behind_the_fence_of_a_later_epoch_is_not_stored(
    settings: Settings, database: psycopg.Connection[Any]
) -> None:
    put_records(settings, [event("ann", 1000, score=1), event("bob", 1000, score=2)], epoch=5)
    put_fences(settings, epoch=6)
    with running(Persister, settings):
        wait_until(lambda: caught_up(database, 2 + 3))
    # What is known of the fences is kept: the next one begins behind them.
    put_records(settings, [event("ann", 1001, score=11), event("bob", 1001, score=12)], epoch=5)
    put_records(settings, [event("bob", 1002, score=4)], epoch=6)
    with running(Persister, settings) as part:
        wait_until(lambda: caught_up(database, 2 + 3 + 3))
    assert part.void_events == 2
    assert part.dead_letters == 0
    assert stored(database) == 3
    assert scores(database) == {"ann": 1, "bob": 4}


@pytest.mark.kafka
@pytest.mark.postgres
def test_redelivered_and_late_events_count_once(settings: Settings, database: psycopg.Connection[Any]) -> None:
    events = [event(f"player{i % 5}", 1000 + i, score=i) for i in range(100)]
    put_records(settings, events + events[::-1] + events[:50])
    with running(Persister, settings):
        wait_until(lambda: caught_up(database, 250))
    assert stored(database) == 100
    assert scores(database) == {f"player{i % 5}": i for i in range(95, 100)}


def test_what_came_early_is_not_stored_when_other_partitions_come_while_the_database_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    others = [TopicPartition("t", 0)]

    def come(part: Persister, consumer: Any) -> None:
        part._early.append(object())  # type: ignore[arg-type]
        part._on_assign(consumer, others)

    with placing(monkeypatch, come) as (part, consumer):
        part._step()  # would stumble over a record that is none
        assert consumer.partitions == []
        assert part._unplaced is others


def test_partitions_that_are_revoked_while_the_database_is_asked_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with placing(monkeypatch, lambda part, consumer: part._on_revoke(consumer, [])) as (part, consumer):
        part._step()
        assert consumer.partitions == []
        assert part._unplaced is None


def test_assignment_that_waits_outlives_what_is_said_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    with placing(monkeypatch, lambda *_: None) as (part, consumer):
        part._heed(KafkaError(KafkaError._AUTO_OFFSET_RESET))
        part._step()
        assert [(it.partition, it.offset) for it in consumer.partitions] == [(0, 100)]


@pytest.mark.kafka
@pytest.mark.postgres
def test_next_persister_goes_on_where_the_database_says(settings: Settings, database: psycopg.Connection[Any]) -> None:
    put_records(settings, [event("ann", 1000 + i) for i in range(10)])
    with running(Persister, settings):
        wait_until(lambda: caught_up(database, 10))
    put_records(settings, [event("ann", 2000 + i) for i in range(3)])
    database.execute("DELETE FROM score_events")  # to see that nothing is read twice
    with running(Persister, settings):
        wait_until(lambda: caught_up(database, 13))
    assert stored(database) == 3


@pytest.mark.kafka
@pytest.mark.postgres
def test_persister_killed_midway_is_followed_by_one_that_stores_the_rest(
    settings: Settings, database: psycopg.Connection[Any], tmp_path: Path
) -> None:
    process = SyncProcess(tmp_path, environment_of(settings), "persister")
    process.start()
    try:
        put_records(settings, [event(f"player{i % 50}", 1000 + i, score=i) for i in range(20_000)])
        wait_until(lambda: stored(database) > 0)
        process.kill()
        put_records(settings, [event("ann", 100_000)])
        process.start()
        wait_until(lambda: caught_up(database, 20_001), 20)
        assert process.stop() == 0
    finally:
        process.stop()
    assert stored(database) == 20_001
    assert scores(database) == {"ann": 1} | {f"player{i % 50}": i for i in range(19_950, 20_000)}


@pytest.mark.kafka
@pytest.mark.postgres
def test_partitions_that_change_hands_lose_nothing(
    settings: Settings, database: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "GRACE_S", 20.0)  # what is stored after the request to stop is counted, too
    events = [event(f"player{i % 50}", 1000 + i, score=i) for i in range(9000)]
    with running(Persister, settings) as second:
        with running(Persister, settings) as first:
            put_records(settings, events[:3000])
            wait_until(lambda: caught_up(database, 3000))
            put_records(settings, events[3000:6000])
        put_records(settings, events[6000:])
        wait_until(lambda: caught_up(database, 9000))
    assert stored(database) == 9000
    assert first.persisted_events + second.persisted_events == 9000
    assert scores(database) == {f"player{i % 50}": i for i in range(8950, 9000)}


@pytest.mark.kafka
@pytest.mark.postgres
def test_records_that_cannot_be_stored_are_put_aside_and_block_nothing(
    settings: Settings, database: psycopg.Connection[Any]
) -> None:
    good = [event(f"player{i}", 1000 + i, score=i) for i in range(50)]
    put_records(settings, [*good[:20], b"not JSON", b"", event("nul\0", 1000), *good[20:]])
    put_records(settings, [event("ann", 1000)], version=b"2")
    with running(Persister, settings) as part:
        wait_until(lambda: caught_up(database, 54))
    assert stored(database) == 50
    assert part.dead_letters == 4
    letters = records_of(settings, settings.dead_letter_topic)
    assert len(letters) == 4
    reasons = {letter.value(): dict(letter.headers()) for letter in letters}
    assert set(reasons[b"not JSON"]) >= {"reason", "topic", "partition", "offset"}
    assert reasons[b"not JSON"]["topic"] == settings.kafka_topic.encode()
    assert b"JSON is malformed" in reasons[b"not JSON"]["reason"]


@pytest.mark.kafka
@pytest.mark.postgres
def test_odd_record_is_put_aside_whatever_is_odd_about_it(
    settings: Settings, database: psycopg.Connection[Any]
) -> None:
    put_records(settings, [event("ann", 1000, score=1)], epoch=5)
    put_odd_records(settings)
    put_records(settings, [event("ann", 1001, score=2)], epoch=5)
    with running(Persister, settings) as part:
        wait_until(lambda: caught_up(database, len(ODD) + 2))
    assert part.dead_letters == len(ODD)
    assert scores(database) == {"ann": 2}
    letters = records_of(settings, settings.dead_letter_topic)
    assert [letter.value() for letter in letters] == [record.value for record in ODD]
    assert max(len(dict(letter.headers())["reason"]) for letter in letters) <= 1200


@pytest.mark.kafka
@pytest.mark.postgres
@pytest.mark.parametrize("sqlstate", ["54000", "22000", "23514", "44000"])
def test_row_that_the_database_never_takes_is_put_aside_alone(
    settings: Settings, database: psycopg.Connection[Any], sqlstate: str
) -> None:
    database.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" RAISE EXCEPTION 'index row size 9000 exceeds 2704' USING ERRCODE = '{sqlstate}'; END $$"
    )
    database.execute(
        "CREATE TRIGGER refuse BEFORE INSERT ON scores FOR EACH ROW"
        " WHEN (NEW.player_id = 'odd') EXECUTE FUNCTION refuse()"
    )
    put_records(settings, [event(f"player{i}", 1000) for i in range(20)] + [event("odd", 1000)])
    with running(Persister, settings) as part:
        wait_until(lambda: caught_up(database, 21))
    assert (part.persisted_events, part.dead_letters, part.outages) == (20, 1, 0)
    (letter,) = records_of(settings, settings.dead_letter_topic)
    assert b"exceeds 2704" in dict(letter.headers())["reason"]


@pytest.mark.kafka
@pytest.mark.postgres
def test_history_is_kept_as_long_as_the_settings_say(
    settings: Settings, database: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(persister, "FIRST_TIDY_S", 0.0)
    monkeypatch.setattr(persister, "TIDY_EVERY_S", 0.1)
    monkeypatch.setattr(persister, "DELETE_AT_ONCE", 100)
    now_ms, day_ms = time.time_ns() // 1_000_000, 86_400_000
    put_records(settings, [event("ann", now_ms - 3 * day_ms + i) for i in range(1000)])
    put_records(settings, [event("ann", now_ms - 100_000 + i, score=i) for i in range(10)])
    with running(Persister, dataclasses.replace(settings, history_days=2)):
        wait_until(lambda: caught_up(database, 1010) and stored(database) == 10)
    assert scores(database) == {"ann": 9}


@contextmanager
def shut_out(settings: Settings) -> Iterator[None]:
    """Nobody reaches the database for the length of a `with`."""
    server, _, name = settings.database_url.rpartition("/")
    with psycopg.connect(f"{server}/postgres", autocommit=True) as admin:
        admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
        try:
            yield
        finally:
            admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")


@pytest.mark.kafka
@pytest.mark.postgres
def test_database_away_is_waited_for(settings: Settings) -> None:
    with running(Persister, settings) as part:
        put_records(settings, [event("ann", 1000)])
        wait_until(lambda: part.persisted_events == 1)
        with shut_out(settings):
            put_records(settings, [event("ann", 2000 + i, score=i) for i in range(100)])
            wait_until(lambda: part.outages == 1)
        wait_until(lambda: part.persisted_events == 101)
    with psycopg.connect(settings.database_url) as database:
        assert scores(database) == {"ann": 99}


@pytest.mark.kafka
@pytest.mark.postgres
def test_partitions_that_change_hands_while_the_database_is_away_are_read_on(settings: Settings) -> None:
    with running(Persister, settings) as first:
        put_records(settings, [event(f"player{i}", 1000) for i in range(30)])
        wait_until(lambda: first.persisted_events == 30)
        with shut_out(settings):
            put_records(settings, [event(f"player{i}", 2000) for i in range(30)])
            wait_until(lambda: first.outages == 1)
            with running(Persister, settings) as second:
                wait_until(lambda: second.outages == 1)
        put_records(settings, [event(f"player{i}", 3000) for i in range(30)])
        wait_until(lambda: first.persisted_events + second.persisted_events == 90, 20)


@pytest.mark.kafka
@pytest.mark.postgres
def test_topic_made_anew_is_refused_unless_told_otherwise(
    settings: Settings, database: psycopg.Connection[Any]
) -> None:
    put_records(settings, [event("ann", 1000 + i, score=i) for i in range(10)])
    with running(Persister, settings):
        wait_until(lambda: caught_up(database, 10))
    make_anew(settings)
    put_records(settings, [event("bob", 2000)])
    with pytest.raises(TopicChanged, match="KAFKA_NEW_TOPIC=restart"):
        run_until_it_raises(settings)
    with running(Persister, dataclasses.replace(settings, new_topic="restart")):
        wait_until(lambda: caught_up(database, 1))
    assert scores(database) == {"ann": 9, "bob": 1}


@pytest.mark.kafka
@pytest.mark.postgres
def test_expired_records_are_not_passed_over_in_silence(settings: Settings, database: psycopg.Connection[Any]) -> None:
    put_records(settings, [event("ann", 1000 + i) for i in range(10)])
    topic = look_up(settings)
    partition = records_of(settings)[0].partition()
    store = Store(settings.database_url)
    store.persist([], settings.kafka_topic, topic.topic_id, {partition: 3})
    store.close()
    admin = AdminClient({"bootstrap.servers": settings.kafka_brokers})
    for future in admin.delete_records([TopicPartition(settings.kafka_topic, partition, 5)]).values():
        future.result()
    with pytest.raises(LogGap, match=r"2 records of .* expired before they were stored"):
        run_until_it_raises(settings)


def run_until_it_raises(settings: Settings) -> None:
    failed = []

    class Watched(Persister):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                failed.append(error)
                raise

    with running(Watched, settings):
        wait_until(lambda: failed)


def test_stored_offsets_of_another_topic_are_refused() -> None:
    with pytest.raises(TopicChanged, match="belong to the id old, it has new"):
        check_topic("t", Topic("new", 8), {0: StoredOffset("old", 5), 1: StoredOffset("new", 5)})


def test_more_partitions_are_welcome_and_fewer_are_refused() -> None:
    check_topic("t", Topic("id", 8), {0: StoredOffset("id", 5)})
    with pytest.raises(LogGap, match=r"has 2 partitions, but offsets are stored for \[2, 3\]"):
        check_topic("t", Topic("id", 2), {partition: StoredOffset("id", 5) for partition in range(4)})


@pytest.mark.parametrize(("offset", "begins"), [(None, 10), (10, 10), (15, 15), (20, 20)])
def test_reading_begins_where_the_database_says_or_at_the_beginning(offset: int | None, begins: int) -> None:
    stored_offset = None if offset is None else StoredOffset("id", offset)
    assert first_offset("t", 0, stored_offset, 10, 20) == begins


@pytest.mark.parametrize(("offset", "says"), [(9, "1 records of t/0 expired"), (21, "was cut short: it ends at 20")])
def test_offset_outside_of_the_log_is_refused(offset: int, says: str) -> None:
    with pytest.raises(LogGap, match=says):
        first_offset("t", 0, StoredOffset("id", offset), 10, 20)
