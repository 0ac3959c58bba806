"""Clients that never read, in a flood: all are seen to lag and sent away, at a bounded price, and nobody else notices.

`make bench-live STUCK=500` measures the same with more of them and for longer.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from confluent_kafka import Producer

from bench.stuck import LAGGING, StuckClients
from server import config
from server.embedded import RedisServer, free_port
from server.events import ScoreEvent, encode_event
from sync.topics import ensure_topics
from tests.client import connect, get, metric, trust, wait_until_writable
from tests.services import KafkaBroker, ServerProcess, wait_until
from tests.wire import Wire

TEXT: Final = 1
STUCK: Final = 100
READERS: Final = 2
PLAYERS: Final = 150
CLOSED_WITHIN_S: Final = 50.0
"""server.hub.LAGGING_LIMIT_MS is 30 s."""

SERVER_BYTES_EACH: Final = 65_536 + 262_144
"""What is buffered above LIVE_HIGH_WATER_BYTES is at most one flush, and PLAYERS long names are less than this."""

KERNEL_BYTES_EACH: Final = 524_288
"""Both ends of a connection: the server's send buffer of 64 KiB, which Linux doubles, and what tests do not read."""

pytestmark = [pytest.mark.redis, pytest.mark.kafka]


class Reader:
    """A client that reads everything: what it was told last of each player."""

    def __init__(self, server: ServerProcess) -> None:
        self.scores: dict[str, int] = {}
        self.fell: list[str] = []
        self.lost: Exception | None = None
        self._wire = Wire(server.port)
        assert self._wire.upgrade("/live-updates?scores=all").status == 101
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        try:
            while True:
                opcode, payload = self._wire.frame()
                assert opcode == TEXT, payload
                message = json.loads(payload)
                if message["type"] == "scoreUpdate":
                    player, score = message["playerId"], message["newScore"]
                    if score < self.scores.get(player, 0):
                        self.fell.append(player)
                    self.scores[player] = score
        except Exception as error:  # the test says what it was
            self.lost = error

    def close(self) -> None:
        """Hang up."""
        self._wire.shut_down()
        self._thread.join()
        self._wire.close()


class Flood:
    """Scores of all players rise in Redis, and Kafka says so, again and again until it is stopped."""

    def __init__(self, redis: RedisServer, broker: KafkaBroker, topic: str) -> None:
        self.players = [f"{'long' * 25}{number}" for number in range(PLAYERS)]
        self.score = 0
        self._redis = redis
        self._topic = topic
        self._producer = Producer({"bootstrap.servers": broker.brokers, "linger.ms": 0})
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End it; everything that was said is in Kafka then."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        with connect(self._redis) as client:
            while not self._stopping.wait(0.1):
                self.score += 1
                with client.pipeline() as together:
                    together.mset({f"player:{player}:score": self.score for player in self.players})
                    together.zadd("leaderboard", dict.fromkeys(self.players, self.score))
                    together.execute()
                for player in self.players:
                    event = ScoreEvent("1-0-0", "main", player, 1, self.score, 1)
                    self._producer.produce(self._topic, encode_event(event), player.encode())
                assert self._producer.flush(10) == 0


@pytest.fixture
def flooded(kafka_broker: KafkaBroker, kafka_topic: str, tmp_path: Path) -> Iterator[tuple[ServerProcess, Flood]]:
    """A server that is live, and a flood that has not begun."""
    redis = RedisServer(tmp_path / "redis", options={"appendonly": "no"})
    settings = {
        "REDIS_PORT": str(redis.port),
        "KAFKA_BROKERS": kafka_broker.brokers,
        "KAFKA_TOPIC": kafka_topic,
        "KAFKA_PARTITIONS": "2",
        "DATABASE_URL": f"postgresql://127.0.0.1:{free_port()}/none",
        "LIVE_MAX_PER_IP": "0",
    }
    server = ServerProcess(tmp_path, settings)
    flood = Flood(redis, kafka_broker, kafka_topic)
    try:
        redis.start()
        with connect(redis) as client:
            trust(client)
        ensure_topics(config.load(settings))
        server.start()
        wait_until_writable(server)
        wait_until(lambda: get(server, "/readyz").json()["live"]["ok"])
        yield server, flood
    finally:
        flood.stop()
        server.stop()
        redis.stop()


def test_clients_that_never_read_are_sent_away_at_a_bounded_price_and_nobody_else_notices(
    flooded: tuple[ServerProcess, Flood],
) -> None:
    server, flood = flooded
    with contextlib.ExitStack() as cleanup:
        readers = [Reader(server) for _ in range(READERS)]
        for reader in readers:
            cleanup.callback(reader.close)
        flood.start()
        wait_until(lambda: all(len(reader.scores) == PLAYERS for reader in readers))
        stuck = StuckClients(server, STUCK)
        cleanup.callback(stuck.hang_up)

        def all_closed() -> bool:
            stuck.look()
            return stuck.all_closed

        wait_until(all_closed, CLOSED_WITHIN_S, "stuck clients were not closed")
        figures = stuck.figures()
        assert figures["stuck_lagging"] == STUCK
        assert metric(server, LAGGING) == 0
        assert figures["server_growth_mb"] * 1e6 < STUCK * SERVER_BYTES_EACH
        assert figures["kernel_growth_mb"] * 1e6 < STUCK * KERNEL_BYTES_EACH
        assert stuck.close_codes() <= {1013, None}

        flood.stop()
        final = dict.fromkeys(flood.players, flood.score)
        wait_until(lambda: all(reader.scores == final for reader in readers), 10, "a reader missed something")
        assert not any(reader.fell or reader.lost for reader in readers)
