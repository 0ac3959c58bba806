"""Kafka's events for the live board: who changed, handed to the loop from a thread of its own.

While nobody watches, nothing is read: what is missed then is in Redis anyway. Belongs to no consumer group, since
every server feeds its own sockets. Knows no sockets and no scores.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import msgspec
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from server.config import Settings
from server.events import Board, Moment, PlayerId
from server.kafka_clients import client_settings, refusal

POLL_S: Final = 0.5
CHECK_INTERVAL_S: Final = 10.0
"""How often to look for partitions that were added."""

RETRY_INTERVAL_S: Final = 1.0
ANSWER_WITHIN_S: Final = 5.0
OVERLAP_S: Final = 5.0
"""How much of the past to read first: what is said twice does no harm."""

_BATCH: Final = 1000

_log = logging.getLogger(__name__)


class _Changed(msgspec.Struct, rename="camel", gc=False):
    """What the live board needs of an event."""

    board: Board
    player_id: PlayerId
    at: Moment


_decode_changed = msgspec.json.Decoder(_Changed).decode


class EventFeed(threading.Thread):
    """Reads the topic from its end while it is `watched`.

    Both callbacks run on the loop: `on_changed` with a set of (board, player) and when the oldest of their events was
    applied (Unix time in ms), and `on_gap` when changes may have been missed, because reading has only just begun.
    """

    def __init__(
        self,
        settings: Settings,
        on_changed: Callable[[set[tuple[str, str]], int | None], None],
        on_gap: Callable[[], None],
    ) -> None:
        super().__init__(name="event-feed", daemon=True)
        self.connected = False
        self._settings = settings
        self._on_changed = on_changed
        self._on_gap = on_gap
        self._loop = asyncio.get_running_loop()
        self._stopped = False
        self._watched = False
        self._woken = threading.Event()
        self._assigned = 0
        self._began_ms = 0
        self._refusal: KafkaError | None = None

    def watch(self, watched: bool) -> None:
        """Whether anybody is interested now."""
        if watched and not self._watched:
            self._woken.set()
        self._watched = watched

    def stop(self) -> None:
        """End the thread soon."""
        self._stopped = True
        self._woken.set()

    def run(self) -> None:
        """threading: until `stop`."""
        while not self._stopped:
            consumer = self._new_consumer()
            try:
                self._read(consumer)
            except Exception:
                _log.exception("reading events failed: beginning again")
                self.connected = False
                self._assigned = 0
                time.sleep(RETRY_INTERVAL_S)
            finally:
                consumer.close()

    def _new_consumer(self) -> Any:
        return Consumer(
            {
                **client_settings(self._settings),
                "group.id": f"scoreboard-live-{secrets.token_hex(4)}",  # never joined: partitions are assigned here
                "enable.auto.commit": False,
                "auto.offset.reset": "latest",
                "fetch.wait.max.ms": self._settings.kafka_fetch_wait_ms,
                "queued.max.messages.kbytes": 2048,
                "error_cb": self._on_error,
                "log_level": 2,  # the library's own lines would repeat what comes through error_cb, at every try
                "logger": _log,
            }
        )

    def _read(self, consumer: Any) -> None:
        check_at_s = 0.0
        while not self._stopped:
            if time.monotonic() >= check_at_s or self._woken.is_set():
                self._woken.clear()
                check_at_s = time.monotonic() + (CHECK_INTERVAL_S if self._check(consumer) else RETRY_INTERVAL_S)
            if not self._assigned:
                self._woken.wait(max(0.0, check_at_s - time.monotonic()))
            # consume() waits until it has as many as it was asked for: so first one, then whatever is there.
            elif first := consumer.consume(1, POLL_S):
                self._hand_over(first + consumer.consume(_BATCH, 0))

    def _on_error(self, error: KafkaError) -> None:
        if error.code() == KafkaError._ALL_BROKERS_DOWN:
            self.connected = False
        self._refusal = refusal(error) or self._refusal
        if self._assigned:  # else `_check` says it, once for all brokers and tries
            _log.warning("Kafka: %s", refusal(error) or error)

    def _check(self, consumer: Any) -> bool:
        """See that Kafka answers, and read all partitions while somebody watches."""
        try:
            partitions = self._partitions(consumer)
            if not self._watched:
                consumer.unassign()
                self._assigned = 0
            elif partitions > self._assigned:
                self._assign(consumer, partitions)
        except KafkaException as error:
            self.connected = False
            if not self._assigned:
                consumer.poll(0)  # why the brokers refuse us waits there; nobody else asks for it yet
            _log.warning("live updates wait for the topic %s: %s", self._settings.kafka_topic, self._refusal or error)
            return False
        self.connected, self._refusal = True, None
        return True

    def _partitions(self, consumer: Any) -> int:
        name = self._settings.kafka_topic
        topic = consumer.list_topics(name, timeout=ANSWER_WITHIN_S).topics[name]
        if topic.error is not None:
            raise KafkaException(topic.error)
        return len(topic.partitions)

    def _assign(self, consumer: Any, partitions: int) -> None:
        """Read all from about now at first, and partitions added later from their beginnings."""
        name, begin = self._settings.kafka_topic, self._assigned
        added = [TopicPartition(name, number, 0) for number in range(begin, partitions)]
        if begin == 0:
            self._began_ms = int(time.time() * 1000)
            for partition in added:
                partition.offset = consumer.get_watermark_offsets(partition, timeout=ANSWER_WITHIN_S)[1]
            added = self._a_little_earlier(consumer, added)
        consumer.incremental_assign(added)
        self._assigned = partitions
        # What happened before the ends were known is in Redis, but in no event to come.
        self._loop.call_soon_threadsafe(self._on_gap)

    def _a_little_earlier(self, consumer: Any, ends: list[TopicPartition]) -> list[TopicPartition]:
        """Where to begin so that no change is missed between the first snapshot and the first event."""
        since_ms = int((time.time() - OVERLAP_S) * 1000)
        wanted = [TopicPartition(end.topic, end.partition, since_ms) for end in ends]
        found = consumer.offsets_for_times(wanted, timeout=ANSWER_WITHIN_S)
        # Nothing that young yet: the end as it was before we asked.
        return [each if each.offset >= 0 else end for each, end in zip(found, ends, strict=True)]

    def _hand_over(self, records: list[Any]) -> None:
        changed, oldest_ms = set(), None
        for record in records:
            if record.error() is not None:
                _log.warning("Kafka: %s", record.error())
                continue
            try:
                event = _decode_changed(record.value())
            except (msgspec.DecodeError, ValueError, TypeError, RecursionError):
                continue  # the persister counts and keeps what cannot be read
            changed.add((event.board, event.player_id))
            if event.at >= self._began_ms and (oldest_ms is None or event.at < oldest_ms):
                oldest_ms = event.at
        if changed and self._watched:
            self._loop.call_soon_threadsafe(self._on_changed, changed, oldest_ms)
