"""Idempotency-Key over HTTP: what a client that got no answer may rely on."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis as redis_client
from confluent_kafka import Consumer

from server.auth import issue
from server.embedded import RedisServer
from server.events import FINGERPRINT_LENGTH, MEMORY_HEADER
from server.keys import Keys
from tests.services import JWT_SECRET, KafkaBroker, ServerProcess, SyncProcess, next_record, wait_until

pytestmark = pytest.mark.redis


class Answer:
    """One answer, read to its end."""

    def __init__(self, answer: http.client.HTTPResponse) -> None:
        self.status = answer.status
        self.body = answer.read()
        self.json: dict[str, Any] = json.loads(self.body)
        self.replayed = answer.getheader("Idempotent-Replayed")


def submit(server: ServerProcess, delta: Any, key: str, *, player: str = "ann", board: str = "main") -> Answer:
    token = issue(JWT_SECRET.encode(), player)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        body = json.dumps({"playerId": player, "scoreDelta": delta, "board": board})
        headers = {"Authorization": f"Bearer {token}", "Idempotency-Key": key}
        connection.request("POST", "/update-score", body, headers)
        return Answer(connection.getresponse())
    finally:
        connection.close()


@pytest.fixture
def settings(redis: redis_client.Redis, redis_server: RedisServer) -> dict[str, str]:
    redis.hset(Keys().ready, mapping={"epoch": "1", "run_id": redis.info()["run_id"]})
    return {
        "REDIS_HOST": redis_server.host,
        "REDIS_PORT": str(redis_server.port),
        "KAFKA_BROKERS": "127.0.0.1:1",
        "DATABASE_URL": "postgresql://127.0.0.1:1/none",
        "BOARDS": "main,weekly",
    }


@pytest.fixture
def server(tmp_path: Path, settings: dict[str, str]) -> Iterator[ServerProcess]:
    server = ServerProcess(tmp_path, settings)
    try:
        server.start()
        wait_until(lambda: server.status_of("/readyz") == 200, 20, "the server is not ready")
        yield server
    finally:
        server.stop()


def test_repeated_key_returns_first_result(server: ServerProcess) -> None:
    first, between = submit(server, 5, "k1"), submit(server, 1, "k2")
    again = submit(server, 5, "k1")
    assert (first.status, first.replayed) == (200, None)
    assert (again.status, again.replayed, again.body) == (200, "true", first.body)
    assert between.json["newScore"] == 6
    assert submit(server, 0, "k3").json["newScore"] == 6


@pytest.mark.parametrize("change", [{"delta": 6}, {"delta": 5, "board": "weekly"}])
def test_key_with_another_payload_is_422(server: ServerProcess, change: dict[str, Any]) -> None:
    submit(server, 5, "k1")
    other = submit(server, change["delta"], "k1", board=change.get("board", "main"))
    assert (other.status, other.json["type"]) == (422, "urn:scoreboard:idempotency-key-reused")
    assert submit(server, 0, "k2").json["newScore"] == 5


def test_same_key_of_two_players_is_two_keys(server: ServerProcess) -> None:
    assert submit(server, 5, "k1").json == {"playerId": "ann", "newScore": 5}
    assert submit(server, 5, "k1", player="bob").json == {"playerId": "bob", "newScore": 5}


def test_errors_are_not_kept(server: ServerProcess) -> None:
    assert submit(server, 2**53 - 1, "k1").status == 200
    assert submit(server, 1, "k2").status == 400
    assert submit(server, -5, "k3").status == 200
    assert (submit(server, 1, "k2").status, submit(server, 1, "k2").replayed) == (200, "true")


@pytest.mark.parametrize("key", ["a b", "käse", "x" * 129, "x" * 3000, "tab\there"])
def test_malformed_key_is_400_and_counts_nothing(server: ServerProcess, key: str) -> None:
    answer = submit(server, 5, key)
    assert answer.status == 400
    assert answer.json["detail"].startswith("Idempotency-Key: expected 1 to 128 visible ASCII characters, got ")
    assert submit(server, 0, "k").json["newScore"] == 0


def test_key_as_long_as_allowed_is_kept(server: ServerProcess) -> None:
    assert submit(server, 5, "~" * 128).status == 200
    assert submit(server, 5, "~" * 128).replayed == "true"


def test_replay_costs_rate_limit(tmp_path: Path, settings: dict[str, str]) -> None:
    server = ServerProcess(tmp_path, {**settings, "RATE_LIMIT_PER_SECOND": "0.01", "RATE_LIMIT_BURST": "2"})
    try:
        server.start()
        wait_until(lambda: server.status_of("/readyz") == 200, 20, "the server is not ready")
        assert [submit(server, 5, "k1").status for _ in range(3)] == [200, 200, 429]
    finally:
        server.stop()


def test_cap_for_each_subject_is_429(tmp_path: Path, settings: dict[str, str]) -> None:
    server = ServerProcess(tmp_path, {**settings, "IDEMPOTENCY_MAX_PER_SUBJECT": "3"})
    try:
        server.start()
        wait_until(lambda: server.status_of("/readyz") == 200, 20, "the server is not ready")
        assert [submit(server, 1, f"k{number}").status for number in range(4)] == [200, 200, 200, 429]
        assert submit(server, 1, "k0").replayed == "true"
        assert submit(server, 1, "k0", player="bob").status == 200
    finally:
        server.stop()


def test_key_is_known_after_a_kill_and_to_another_server(
    tmp_path: Path, server: ServerProcess, settings: dict[str, str]
) -> None:
    first = submit(server, 5, "k1")
    server.kill()
    server.restart()
    other = ServerProcess(tmp_path, settings)
    try:
        other.start()
        for each in (server, other):
            wait_until(lambda each=each: each.status_of("/readyz") == 200, 20, "a server is not ready")
            again = submit(each, 5, "k1")
            assert (again.replayed, again.body) == ("true", first.body)
    finally:
        other.stop()


@pytest.mark.kafka
def test_event_of_a_keyed_update_carries_its_memory(
    tmp_path: Path, settings: dict[str, str], kafka_broker: KafkaBroker, kafka_topic: str
) -> None:
    settings |= {"KAFKA_BROKERS": kafka_broker.brokers, "KAFKA_TOPIC": kafka_topic}
    server, relay = ServerProcess(tmp_path, settings), SyncProcess(tmp_path, settings, "relay")
    consumer = Consumer(
        {"bootstrap.servers": kafka_broker.brokers, "group.id": "memory", "auto.offset.reset": "earliest"}
    )
    try:
        relay.start()
        server.start()
        wait_until(lambda: server.status_of("/readyz") == 200, 20, "the server is not ready")
        submit(server, 5, "k:1")
        consumer.subscribe([kafka_topic])
        record = next_record(consumer)
        headers = dict(record.headers())
        assert headers[MEMORY_HEADER][FINGERPRINT_LENGTH:] == b"ann:k%3A1"
        assert time.time() - record.timestamp()[1] / 1000 < 60
    finally:
        consumer.close()
        for service in (server, relay):
            service.stop()
