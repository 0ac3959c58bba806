"""What the tests of sync/ share: its parts in threads, an outbox to fill, and topics to read back."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import msgspec
import redis as redis_client
from confluent_kafka import Consumer, Message, Producer, TopicPartition
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ResourceType,
)

from server.config import Settings
from server.events import FORMAT_VERSION, OUTBOX_FIELD, ScoreEvent, encode_event
from server.fences import EPOCH_HEADER
from server.kafka_tail import KafkaTail
from sync.store import migrate
from sync.topics import ensure_topics
from sync.waiting import Stop
from tests.services import KafkaBroker


class Part(Protocol):
    """The relay or the persister."""

    def run(self) -> None: ...


PartT = Any


@contextmanager
def running(make: Callable[[Settings, Stop], PartT], settings: Settings) -> Iterator[PartT]:
    """Run a part in a thread for the length of a `with`; what it raises is raised here."""
    stop, failures = Stop(), []
    part = make(settings, stop)

    def run() -> None:
        try:
            part.run()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield part
    finally:
        stop.request()
        thread.join(20)
        assert not thread.is_alive(), "it did not stop"
    if failures:
        raise failures[0]


def migrated(kafka_broker: KafkaBroker, kafka_topic: str, database_url: str, *, partitions: int) -> Settings:
    """Settings whose topics and schema are there."""
    settings = Settings(
        kafka_brokers=kafka_broker.brokers,
        kafka_topic=kafka_topic,
        kafka_partitions=partitions,
        database_url=database_url,
        history_days=0,  # events of tests are of 1970
    )
    ensure_topics(settings)
    migrate(database_url)
    return settings


def environment_of(settings: Settings) -> dict[str, str]:
    """The variables that give a process these settings."""
    found = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value != field.default:
            found[field.metadata["variable"]] = str(value)
    return found


def event(player: str, ms: int, *, seq: int = 0, index: int = 0, delta: int = 1, score: int = 1) -> ScoreEvent:
    """An event of the board main."""
    return ScoreEvent(f"{ms}-{seq}-{index}", "main", player, delta, score, ms)


def add_entry(redis: redis_client.Redis, changes: Sequence[tuple[str, int, int]], key: str = "outbox") -> str:
    """Put one batch of (player, delta, score) into the outbox; returns its id."""
    flat: list[Any] = ["main"]
    for change in changes:
        flat += change
    entry_id: bytes = redis.xadd(key, {OUTBOX_FIELD: msgspec.msgpack.encode(flat)})
    return entry_id.decode()


def add_entries(redis: redis_client.Redis, entries: int, first: int = 0, players: int = 20) -> list[tuple[str, int]]:
    """Put entries of 10 events each into the outbox; returns (player, score) of each event, in order."""
    expected = []
    for number in range(first, first + entries):
        changes = [(f"player{(number * 10 + i) % players}", 1, number * 10 + i) for i in range(10)]
        add_entry(redis, changes)
        expected += [(player, score) for player, _, score in changes]
    return expected


def put_records(
    settings: Settings,
    events: Sequence[ScoreEvent | bytes],
    *,
    version: bytes = FORMAT_VERSION,
    epoch: int | None = None,
) -> None:
    """Put events, or bytes that are none, into the topic of events; of an epoch, as the relay does, or of none."""
    producer = Producer({"bootstrap.servers": settings.kafka_brokers, "acks": "all"})
    headers = [("v", version)] + ([(EPOCH_HEADER, str(epoch).encode())] if epoch else [])
    for one in events:
        key, value = (b"", one) if isinstance(one, bytes) else (one.player_id, encode_event(one))
        producer.produce(settings.kafka_topic, value, key, headers=headers)
    assert producer.flush(10) == 0


def limit_dead_letters(settings: Settings, most_bytes: int) -> None:
    """Let the topic of dead letters take no batch of records that is larger."""
    entry = ConfigEntry("max.message.bytes", str(most_bytes), incremental_operation=AlterConfigOpType.SET)
    topic = ConfigResource(ResourceType.TOPIC, settings.dead_letter_topic, incremental_configs=[entry])
    admin = AdminClient({"bootstrap.servers": settings.kafka_brokers})
    for future in admin.incremental_alter_configs([topic]).values():
        future.result(10)


def put_fences(settings: Settings, epoch: int) -> None:
    """Put a fence into every partition of the topic of events, as a server does that verifies Redis."""
    tail = KafkaTail(settings)
    assert tail.describe() is not None
    tail.fence(epoch, time.time_ns() // 1_000_000)
    tail.close()


def records_of(settings: Settings, topic: str | None = None) -> list[Message]:
    """Every record that a topic holds now, each partition in order."""
    name = topic or settings.kafka_topic
    consumer = Consumer({"bootstrap.servers": settings.kafka_brokers, "group.id": "tests", "fetch.wait.max.ms": 10})
    try:
        ends = {}
        for partition in consumer.list_topics(name, timeout=10).topics[name].partitions:
            low, high = consumer.get_watermark_offsets(TopicPartition(name, partition), timeout=10)
            if high > low:
                ends[partition] = high
        consumer.assign([TopicPartition(name, partition, 0) for partition in ends])
        found: list[Message] = []
        while ends:
            message = consumer.poll(10)
            assert message is not None, f"{name} did not yield all it has"
            assert message.error() is None, message.error()
            found.append(message)
            if message.offset() + 1 >= ends[message.partition()]:
                del ends[message.partition()]
                consumer.pause([TopicPartition(name, message.partition())])
        return found
    finally:
        consumer.close()
