"""The whole scoreboard on free ports: real Redis, Kafka and PostgreSQL, server, relay and persister.

PostgreSQL has the locale that most have, en_US.UTF-8, where this machine knows it.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import confluent_kafka
import psycopg
import redis
from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]

from bench.processes import resident_bytes
from server.embedded import PostgresServer, RedisServer, Service
from server.keys import Keys
from tests.services import (
    ROOT,
    KafkaBroker,
    ServerProcess,
    SyncProcess,
    environment,
    locale_of_databases,
    wait_until,
)

TOPIC = "score-updates"
SETTLE_WITHIN_S = 300.0


class Stack:
    """Everything that runs during a benchmark; rate limits are off unless `more_settings` say otherwise."""

    def __init__(
        self,
        directory: Path,
        more_settings: Mapping[str, str] | None = None,
        redis_options: Mapping[str, str] | None = None,
    ) -> None:
        """Raises UnavailableError without Java or Maven."""
        self.redis = RedisServer(directory / "redis", options=redis_options)
        self.kafka = KafkaBroker(directory / "kafka")
        self.postgres = PostgresServer(directory / "postgres", locale=locale_of_databases())
        settings = {
            "REDIS_HOST": self.redis.host,
            "REDIS_PORT": str(self.redis.port),
            "KAFKA_BROKERS": self.kafka.brokers,
            "KAFKA_TOPIC": TOPIC,
            "DATABASE_URL": self.postgres.url,
            "RATE_LIMIT_PER_SECOND": "0",
        } | dict(more_settings or {})
        self.settings = settings
        self.relay = SyncProcess(directory, settings, "relay")
        self.persister = SyncProcess(directory, settings, "persister")
        self.server = ServerProcess(directory, settings)

    @property
    def measured(self) -> dict[str, Service]:
        """The processes whose CPU time is counted."""
        return {
            "server": self.server,
            "Redis": self.redis,
            "relay": self.relay,
            "Kafka": self.kafka,
            "persister": self.persister,
            "PostgreSQL": self.postgres,
        }

    def start(self, stack: contextlib.ExitStack) -> None:
        """Start everything; `stack` stops it."""
        for store in (self.redis, self.kafka, self.postgres):
            stack.callback(store.stop)
            store.start()
        migrate = [sys.executable, "-m", "server", "migrate"]
        subprocess.run(migrate, check=True, env=environment(self.settings), cwd=ROOT, capture_output=True)
        for service in (self.relay, self.persister, self.server):
            stack.callback(service.stop)
            service.start()
        self._wait_until_ready()
        self._watcher = confluent_kafka.Consumer({"bootstrap.servers": self.kafka.brokers, "group.id": "bench"})
        stack.callback(self._watcher.close)

    def restart_server(self) -> None:
        """A fresh server on the same data."""
        self.server.stop()
        self.server.start()
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        wait_until(lambda: self.server.status_of("/readyz") == 200, 30, "the server is not ready")

    def outbox_entries(self) -> int:
        """Batches that Redis still owes Kafka."""
        with redis.Redis(self.redis.host, self.redis.port) as client:
            return int(client.xlen(Keys().outbox))

    def settle(self, entries_left: int = 0) -> tuple[float, float]:
        """Wait until all that was accepted is in Kafka, then in PostgreSQL; the seconds that each took.

        Under load, `entries_left` of the outbox count as none.
        """
        started_s = time.monotonic()
        wait_until(lambda: self.outbox_entries() <= entries_left, SETTLE_WITHIN_S, "the outbox does not drain")
        relayed_s = time.monotonic() - started_s
        events = self.events_in(TOPIC)
        wait_until(lambda: self._events_persisted() >= events, SETTLE_WITHIN_S, "the persister does not catch up")
        return relayed_s, time.monotonic() - started_s

    def server_bytes(self) -> int:
        """Resident memory of the server."""
        return resident_bytes(self.server.pid)

    def versions(self) -> dict[str, str]:
        """What was measured against."""
        with redis.Redis(self.redis.host, self.redis.port) as client, psycopg.connect(self.postgres.url) as connection:
            postgres = connection.execute("SHOW server_version").fetchone()
            server = client.info("server")
            # Valkey calls itself Redis 7.2 too, for clients that ask.
            valkey = server.get("valkey_version")
            kind = f"Valkey {valkey}" if valkey else f"Redis {server['redis_version']}"
            return {"redis": kind, "postgresql": postgres[0] if postgres else ""}

    def events_in(self, topic: str) -> int:
        """Records that Kafka has taken."""
        partitions = self._watcher.list_topics(topic, timeout=10).topics[topic].partitions
        where = [confluent_kafka.TopicPartition(topic, partition) for partition in partitions]
        return sum(self._watcher.get_watermark_offsets(each, timeout=10)[1] for each in where)

    def create_topics(self, names: Sequence[str]) -> None:
        """Topics like the scoreboard's own."""
        admin = AdminClient({"bootstrap.servers": self.kafka.brokers})
        partitions = len(admin.list_topics(TOPIC, timeout=10).topics[TOPIC].partitions)
        for created in admin.create_topics([NewTopic(name, partitions, 1) for name in names]).values():
            created.result()

    def _events_persisted(self) -> int:
        with psycopg.connect(self.postgres.url) as connection:
            row = connection.execute("SELECT coalesce(sum(next_offset), 0) FROM consumer_offsets").fetchone()
        assert row is not None
        return int(row[0])
