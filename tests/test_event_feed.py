"""The feed of events: who changed comes through, and what it may not read does not pass for a quiet topic."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis as redis_client
from confluent_kafka import Producer
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
)

from server.config import Settings, load
from server.embedded import RedisServer, free_port
from server.event_feed import Changes, EventFeed
from server.events import MAX_BOARD, MAX_PLAYER, ScoreEvent, encode_event
from server.redis_clock import RedisClock
from sync.topics import ensure_topics
from tests.client import get, trust, wait_until_writable
from tests.odd_records import put_odd_records
from tests.services import KafkaBroker, ServerProcess, UnavailableError, wait_until
from tests.sync_parts import event, put_records
from tests.wire import Wire

pytestmark = [pytest.mark.redis, pytest.mark.kafka]

REFUSED = "Kafka refuses: the brokers' ACLs do not let KAFKA_SASL_USERNAME do what it has to"


@pytest.fixture(scope="module")
def strict_kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaBroker]:
    """A broker where everything is allowed for which there is no rule."""
    options = {
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "allow.everyone.if.no.acl.found": "true",
    }
    try:
        broker = KafkaBroker(tmp_path_factory.mktemp("strict-kafka"), options=options)
    except UnavailableError as error:
        pytest.skip(str(error))
    try:
        broker.start()
        yield broker
    finally:
        broker.stop()


class Rules:
    """Who may do what with a topic."""

    def __init__(self, broker: KafkaBroker, topic: str) -> None:
        self._admin = AdminClient({"bootstrap.servers": broker.brokers})
        self._topic = topic
        self._add(AclOperation.ALL, AclPermissionType.ALLOW)

    def forbid_reading(self) -> None:
        self._add(AclOperation.READ, AclPermissionType.DENY)

    def allow_reading(self) -> None:
        chosen = AclBindingFilter(
            *(ResourceType.TOPIC, self._topic, ResourcePatternType.LITERAL, None, None),
            *(AclOperation.READ, AclPermissionType.DENY),
        )
        for future in self._admin.delete_acls([chosen]).values():
            assert future.result(10)

    def _add(self, operation: AclOperation, permission: AclPermissionType) -> None:
        topic = ResourceType.TOPIC, self._topic, ResourcePatternType.LITERAL
        for future in self._admin.create_acls(
            [AclBinding(*topic, "User:ANONYMOUS", "*", operation, permission)]
        ).values():
            future.result(10)


@pytest.fixture
def world(
    redis: redis_client.Redis, redis_server: RedisServer, strict_kafka: KafkaBroker, tmp_path: Path
) -> Iterator[tuple[ServerProcess, Rules, str]]:
    """A server that is not started yet, and the rules of its topic, which is there."""
    trust(redis)
    topic = f"ruled-{free_port()}"
    settings = {
        "REDIS_HOST": redis_server.host,
        "REDIS_PORT": str(redis_server.port),
        "KAFKA_BROKERS": strict_kafka.brokers,
        "KAFKA_TOPIC": topic,
        "KAFKA_PARTITIONS": "2",
        "DATABASE_URL": f"postgresql://127.0.0.1:{free_port()}/none",
    }
    ensure_topics(load(settings))
    server = ServerProcess(tmp_path, settings)
    yield server, Rules(strict_kafka, topic), topic
    server.stop()


def live(server: ServerProcess) -> Any:
    return get(server, "/readyz").json()["live"]


def status(watcher: Wire) -> Any:
    """The next thing that it is told about being live."""
    while True:
        _, text = watcher.frame()
        message = json.loads(text)
        if message["type"] == "status":
            return message


def say(broker: KafkaBroker, topic: str, player: str) -> None:
    producer = Producer({"bootstrap.servers": broker.brokers})
    producer.produce(topic, encode_event(ScoreEvent("1-0-0", "main", player, 1, 5, 1)), player.encode())
    assert producer.flush(10) == 0


def test_topic_that_may_not_be_read_is_not_live_and_says_why_until_it_may(
    world: tuple[ServerProcess, Rules, str], strict_kafka: KafkaBroker, redis: redis_client.Redis
) -> None:
    server, rules, topic = world
    rules.forbid_reading()
    server.start()
    wait_until_writable(server)
    wait_until(lambda: live(server) == {"ok": False, "detail": REFUSED}, 20, "nobody watches, and nothing is said")
    with Wire(server.port) as watcher:
        assert watcher.upgrade("/live-updates?players=ann").status == 101
        assert status(watcher) == {"type": "status", "live": False, "detail": REFUSED}
        assert live(server) == {"ok": False, "detail": REFUSED}, "somebody watches"
        log = server.output_tail(10_000)
        assert f"live updates wait for the topic {topic}: {REFUSED.removeprefix('Kafka refuses: ')}" in log
        assert "Topic authorization failed" in log
        assert log.count("live updates wait") <= 2, "it is said at every try"
        rules.allow_reading()
        assert status(watcher) == {"type": "status", "live": True}
        assert live(server) == {"ok": True}
        redis.mset({"player:ann:score": 5})
        redis.zadd("leaderboard", {"ann": 5})
        say(strict_kafka, topic, "ann")
        while json.loads(watcher.frame()[1]).get("newScore") != 5:
            pass


def test_right_that_is_withdrawn_while_somebody_watches_is_noticed(
    world: tuple[ServerProcess, Rules, str],
) -> None:
    server, rules, _ = world
    server.start()
    wait_until_writable(server)
    wait_until(lambda: live(server) == {"ok": True}, 20)
    with Wire(server.port) as watcher:
        assert watcher.upgrade("/live-updates").status == 101
        rules.forbid_reading()
        told = status(watcher)
        while told["live"]:
            told = status(watcher)
        assert told["detail"] == REFUSED
        rules.allow_reading()
        assert status(watcher)["live"]


def test_odd_records_hold_up_nobody(
    kafka_broker: KafkaBroker, kafka_topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(kafka_brokers=kafka_broker.brokers, kafka_topic=kafka_topic, kafka_partitions=1)
    ensure_topics(settings)
    changed: set[tuple[str, str]] = set()

    async def watch() -> None:
        reading, told = asyncio.Event(), asyncio.Event()

        def on_changed(by_board: dict[str, Changes]) -> None:
            changed.update((board, player) for board, changes in by_board.items() for player in changes.players)
            if ("main", "ann") in changed:
                told.set()

        clock = RedisClock()
        feed = EventFeed(settings, [clock], lambda _: clock, on_changed, reading.set)
        feed.watch(True)
        feed.start()
        try:
            async with asyncio.timeout(30):
                await reading.wait()
                await asyncio.to_thread(put_odd_records, settings)
                await asyncio.to_thread(put_records, settings, [event("ann", 1000)])
                await told.wait()
        finally:
            feed.stop()
            await asyncio.to_thread(feed.join, 10)

    with caplog.at_level(logging.WARNING):
        asyncio.run(watch())
    assert "beginning again" not in caplog.text
    assert all(len(board) <= MAX_BOARD and len(player) <= MAX_PLAYER for board, player in changed)
