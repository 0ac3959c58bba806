"""What is still under way between an answer and its rows in the database, looked at while the load goes on."""

from __future__ import annotations

import json
import statistics
import threading
import time
from typing import Any, NamedTuple

import confluent_kafka
import psycopg
import redis
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from bench.stack import TOPIC, Stack
from server.keys import Keys


class Sample(NamedTuple):
    """One look. `outbox_ms` is the age of the oldest entry that Redis still owes Kafka."""

    outbox_entries: int
    outbox_ms: int
    lag_events: int
    """In Kafka, and not in PostgreSQL yet."""

    delay_ms: float
    """The median delayMs of the lists since the last look; where none came, the time since the last one."""


class Gauges:
    """Connections to look with, and one watcher."""

    def __init__(self, stack: Stack) -> None:
        self._redis = redis.Redis(stack.redis.host, stack.redis.port)
        self._postgres = psycopg.connect(stack.postgres.url, autocommit=True)
        self._kafka = confluent_kafka.Consumer({"bootstrap.servers": stack.kafka.brokers, "group.id": "bench-gauges"})
        partitions = self._kafka.list_topics(TOPIC, timeout=10).topics[TOPIC].partitions
        self._partitions = [confluent_kafka.TopicPartition(TOPIC, partition) for partition in partitions]
        self._outbox = Keys().outbox
        self._delays_ms: list[int] = []
        self._last_list_s = time.monotonic()
        address = f"ws://127.0.0.1:{stack.server.port}/live-updates?limit=10&scores=none"
        self._socket = connect(address, compression=None)
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def look(self) -> Sample:
        """How things stand now."""
        entries: Any = self._redis.xlen(self._outbox)
        oldest: Any = self._redis.xrange(self._outbox, count=1)
        seconds, us = self._redis.time()
        age_ms = seconds * 1000 + us // 1000 - int(oldest[0][0].split(b"-")[0]) if oldest else 0
        # What is stored first: else what is stored meanwhile would count as more than there is.
        row = self._postgres.execute("SELECT coalesce(sum(next_offset), 0) FROM consumer_offsets").fetchone()
        assert row is not None
        ends = [self._kafka.get_watermark_offsets(partition, timeout=10)[1] for partition in self._partitions]
        delays_ms, self._delays_ms = self._delays_ms, []
        delay_ms = statistics.median(delays_ms) if delays_ms else (time.monotonic() - self._last_list_s) * 1000
        return Sample(entries, age_ms, sum(ends) - int(row[0]), delay_ms)

    def close(self) -> None:
        """Give up all connections."""
        self._socket.close()
        self._thread.join()
        self._kafka.close()
        self._postgres.close()
        self._redis.close()

    def _watch(self) -> None:
        try:
            for text in self._socket:
                message = json.loads(text)
                if message["type"] == "leaderboardUpdate":
                    self._last_list_s = time.monotonic()
                    if "delayMs" in message:
                        self._delays_ms.append(message["delayMs"])
        except ConnectionClosed:
            pass  # from then on `look` says how long ago the last list came
