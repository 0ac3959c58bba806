"""Kafka's events for the live board: who changed, handed to the loop from a thread of its own.

While nobody watches, nothing is read: what is missed then is in Redis anyway. Belongs to no consumer group, since
every server feeds its own sockets. Knows no sockets and no scores.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from server.config import Settings
from server.events import Board, Moment, PlayerId
from server.kafka_clients import client_settings, reason_of, refusal
from server.redis_clock import RedisClock

POLL_S: Final = 0.5
TRY_S: Final = 0.05
CHECK_INTERVAL_S: Final = 10.0
"""How often to look for partitions that were added."""

RETRY_INTERVAL_S: Final = 1.0
ANSWER_WITHIN_S: Final = 5.0
OVERLAP_S: Final = 5.0
"""How much of the past to read first: what is said twice does no harm."""

MOST_OVERLAP: Final = 50_000
"""Most records of a partition to read first: ids that are stuck in the future all carry the same time."""

_BATCH: Final = 1000

_log = logging.getLogger(__name__)


class _Changed(msgspec.Struct, rename="camel", gc=False):
    """What the live board needs of an event."""

    board: Board
    player_id: PlayerId
    at: Moment


_decode_changed = msgspec.json.Decoder(_Changed).decode


@dataclasses.dataclass(slots=True)
class Changes:
    """What events said of one board."""

    players: set[str]
    oldest_ms: int | None
    """When the oldest of these events was applied, in Unix time by the clock of the board's Redis; None where all of
    them are from before the reading began."""


class EventFeed(threading.Thread):
    """Reads the topic from its end while it is `watched`, and sees now and then that it may be read while it is not.

    Both callbacks run on the loop: `on_changed` with the changes by board, and `on_gap` when changes may have been
    missed, because reading has only just begun.
    """

    def __init__(
        self,
        settings: Settings,
        clocks: Sequence[RedisClock],
        clock_of: Callable[[str], RedisClock],
        on_changed: Callable[[dict[str, Changes]], None],
        on_gap: Callable[[], None],
    ) -> None:
        """`clocks` are those of all boards, `clock_of` says which is that of one."""
        super().__init__(name="event-feed", daemon=True)
        self.trouble = "Kafka was not reached yet"
        """Why no events arrive, in words that everybody may read; empty when they do."""
        self._settings = settings
        self._clocks = clocks
        self._clock_of = clock_of
        self._on_changed = on_changed
        self._on_gap = on_gap
        self._loop = asyncio.get_running_loop()
        self._stopped = False
        self._watched = False
        self._woken = threading.Event()
        self._assigned = 0
        self._began_s = 0.0
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
                self.trouble = "reading events failed"
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
                "enable.partition.eof": True,  # else nothing tells that there is nothing to read from no right to
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
                error = self._hand_over(first + consumer.consume(_BATCH, 0))
                if error is not None:
                    self._lose(consumer, error)
                    check_at_s = time.monotonic() + RETRY_INTERVAL_S

    def _on_error(self, error: KafkaError) -> None:
        if error.code() == KafkaError._ALL_BROKERS_DOWN:
            self.trouble = reason_of(error)
        self._refusal = error if refusal(error) else self._refusal
        if self._assigned:  # else `_check` says it, once for all brokers and tries
            _log.warning("Kafka: %s", refusal(error) or error)

    def _check(self, consumer: Any) -> bool:
        """See that Kafka answers and lets us read, and read all partitions while somebody watches."""
        try:
            partitions = self._partitions(consumer)
            if not self._watched:
                consumer.unassign()
                self._assigned = 0
            if not self._assigned and (self.trouble or not self._watched):
                self._try(consumer)
            if self._watched and partitions > self._assigned:
                self._assign(consumer, partitions)
        except KafkaException as error:
            self._lose(consumer, error.args[0])
            return False
        if self.trouble:
            _log.info("live updates: the topic %s is read", self._settings.kafka_topic)
        self.trouble, self._refusal = "", None
        return True

    def _lose(self, consumer: Any, error: KafkaError) -> None:
        """Read no more until a check has succeeded, and say why unless that was said."""
        if not self._assigned:
            consumer.poll(0)  # why the brokers refuse us waits there; nobody else asks for it yet
        consumer.unassign()
        self._assigned = 0
        error = self._refusal or error
        trouble = reason_of(error)
        if trouble != self.trouble:
            said = (refusal(error) or error).str()
            _log.warning("live updates wait for the topic %s: %s", self._settings.kafka_topic, said)
        self.trouble = trouble

    def _try(self, consumer: Any) -> None:
        """Fetch once from the end of a partition, for topics may be described by those who may not read them.

        Raises KafkaException.
        """
        place = TopicPartition(self._settings.kafka_topic, 0)
        place.offset = consumer.get_watermark_offsets(place, timeout=ANSWER_WITHIN_S)[1]
        deadline_s = time.monotonic() + self._settings.kafka_fetch_wait_ms / 1000 + ANSWER_WITHIN_S
        consumer.assign([place])
        try:
            while not (arrived := consumer.consume(1, TRY_S)):
                if self._watched and not self.trouble:
                    return  # somebody waits; what is read for them tells as much
                if time.monotonic() > deadline_s:
                    raise KafkaException(KafkaError(KafkaError._TIMED_OUT, "the brokers do not answer a fetch"))
        finally:
            consumer.unassign()
        error = arrived[0].error()
        if error is not None and error.code() != KafkaError._PARTITION_EOF:
            raise KafkaException(error)

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
            self._began_s = time.monotonic()
            for partition in added:
                partition.offset = consumer.get_watermark_offsets(partition, timeout=ANSWER_WITHIN_S)[1]
            added = self._a_little_earlier(consumer, added)
        consumer.incremental_assign(added)
        self._assigned = partitions
        # What happened before the ends were known is in Redis, but in no event to come.
        self._loop.call_soon_threadsafe(self._on_gap)

    def _a_little_earlier(self, consumer: Any, ends: list[TopicPartition]) -> list[TopicPartition]:
        """Where to begin so that no change is missed between the first snapshot and the first event."""
        since_ms = min(clock.now_ms() for clock in self._clocks) - int(1000 * OVERLAP_S)
        wanted = [TopicPartition(end.topic, end.partition, since_ms) for end in ends]
        found = consumer.offsets_for_times(wanted, timeout=ANSWER_WITHIN_S)
        for each, end in zip(found, ends, strict=True):
            # Nothing that young yet: the end as it was before we asked.
            each.offset = max(each.offset, end.offset - MOST_OVERLAP) if each.offset >= 0 else end.offset
        return list(found)

    def _hand_over(self, records: list[Any]) -> KafkaError | None:
        """Tell the loop of the changes; returns what Kafka said instead of records."""
        by_board: dict[str, Changes] = {}
        began_ms: dict[str, int] = {}
        failure = None
        for record in records:
            error = record.error()
            if error is not None:
                failure = error if error.code() != KafkaError._PARTITION_EOF else failure
                continue
            try:
                event = _decode_changed(record.value())
            except (msgspec.DecodeError, ValueError, TypeError, RecursionError):
                continue  # the persister counts and keeps what cannot be read
            board, at_ms = event.board, event.at
            changes = by_board.get(board)
            if changes is None:
                changes = by_board[board] = Changes(set(), None)
                began_ms[board] = self._clock_of(board).at_ms(self._began_s)
            changes.players.add(event.player_id)
            if at_ms >= began_ms[board] and (changes.oldest_ms is None or at_ms < changes.oldest_ms):
                changes.oldest_ms = at_ms
        if by_board and self._watched:
            self._loop.call_soon_threadsafe(self._on_changed, by_board)
        return failure
