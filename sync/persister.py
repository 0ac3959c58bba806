"""The persister: moves Kafka into TimescaleDB.

Polls, writes, then commits. Where to go on is kept by the database, in the transaction that stores the events;
the group's own offsets are written afterwards and only for operators to look at. A batch in hand is kept
through any outage and any rebalance: it is a prefix of what is not stored yet, and storing it twice counts
once. Knows nothing of Redis.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

import psycopg
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition
from psycopg import errors

from server.config import Settings
from server.events import PERSISTER_GROUP, BadEvent, ScoreEvent, decode_event, memory_of_headers
from server.fences import Fences
from server.instruments import Histogram
from server.kafka_clients import headers_of, is_refusal
from server.redis_clock import RedisClock
from sync.chain import Chain
from sync.dead_letters import DeadLetters
from sync.kafka import new_consumer
from sync.placement import check_topic, first_offset
from sync.store import CommitsLost, Persisted, Store, StoredOffset
from sync.topics import Topic, look_up
from sync.waiting import Outage, Stop, Stopped

BATCH_EVENTS: Final = 5000
GATHER_S: Final = 0.2
"""How long a batch may gather before it is written."""

CONFIRM_WITHIN_S: Final = 5.0
POLL_AFTER_S: Final = 1.0
"""A statement that takes longer is waited for as an outage is: Kafka is polled."""

FIRST_TIDY_S: Final = 60.0
"""After a start: there may be much to catch up with first."""

TIDY_EVERY_S: Final = 3600.0
DELETE_AT_ONCE: Final = 10_000
"""Old events that go between two batches: more than a batch brings, and little enough not to hold it up."""

LOOK_AT_EACH: Final = 50
"""Records of which one is asked for its time: near enough for a lag, and asking all took a tenth of our CPU."""

BATCH_BOUNDS: Final = (1, 10, 50, 100, 250, 500, 1000, 2000, 3000, 4000, BATCH_EVENTS, 2 * BATCH_EVENTS)
WRITE_BOUNDS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Up to the longest that a statement may take."""

_log = logging.getLogger("sync.persister")
_T = TypeVar("_T")


class Persister:
    """Persists one topic until it is asked to stop; outages are waited through."""

    def __init__(self, settings: Settings, stop: Stop) -> None:
        self.persisted_events = 0
        self.outages = 0
        self.batch_events = Histogram(BATCH_BOUNDS)
        self.batch_s = Histogram(WRITE_BOUNDS_S)
        self.chain = Chain()
        self.lag_events = 0
        """Of the partitions we read, as far as Kafka has told of their ends."""
        self.in_hand_since_ms: int | None = None
        """When the oldest event that is in hand was made, or one of the oldest."""
        self.clock = RedisClock()
        """What the times of events are compared with."""
        self.behind_since_ms: int | None = self.clock.now_ms()
        """Since when there is something to read that has not come, or it is not known what there is to read."""
        self.database_outage = Outage("the database", _log, lambda it: isinstance(it, errors.ReadOnlySqlTransaction))
        self.kafka_outage = Outage("Kafka", _log, is_refusal)
        self._settings = settings
        self._stop = stop
        self._store = Store(settings.database_url, meanwhile=self._while_the_database_works)
        self._dead_letters = DeadLetters(settings)
        self._consumer = new_consumer(settings, PERSISTER_GROUP, self._on_error)
        self._topic = Topic("", 0)
        self._fences = Fences()
        self._next_offsets: dict[int, int] | None = None
        self._ends: dict[int, int] = {}
        self._unplaced: list[TopicPartition] | None = None
        self._early: list[Message] = []
        self._paused = False
        self._tidy_at_s = time.monotonic() + FIRST_TIDY_S

    @property
    def dead_letters(self) -> int:
        """Records put aside since the start."""
        return self._dead_letters.kept

    @property
    def void_events(self) -> int:
        """Events of an older epoch behind a fence: Redis lost them before Kafka had them, or they came once more."""
        return self._fences.void

    def run(self) -> None:
        """Return when asked to stop.

        Raises TopicChanged and LogGap when going on would lose events, and psycopg.Error or KafkaException
        for what waiting does not mend.
        """
        self._consumer.subscribe(
            [self._settings.kafka_topic], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_revoke
        )
        try:
            while not self._stop.requested:
                try:
                    self._step()
                except CommitsLost as error:
                    _log.warning("%s: reading them again", error)
                    self._place_anew()
                    self.behind_since_ms, self.in_hand_since_ms = self.in_hand_since_ms or self.clock.now_ms(), None
                    self._resume()
        except Stopped:
            _log.info("stopped while a service was waited for; what is not stored stays in Kafka")
        finally:
            self._consumer.close()
            self._store.close()
        _log.info("stopped: %d events stored, %d dead letters", self.persisted_events, self.dead_letters)

    # What follows is called from within `consume`, on this thread.

    def _on_error(self, error: KafkaError) -> None:
        self.kafka_outage.failed(error)

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        # Nothing may be read before the database has said where to begin, and it may be away.
        consumer.assign([])
        self._unplaced = partitions

    def _on_revoke(self, consumer: Consumer, _: list[TopicPartition]) -> None:
        consumer.unassign()
        self._unplaced = None
        self._next_offsets = None
        self.behind_since_ms = self.behind_since_ms or self.clock.now_ms()

    def _step(self) -> None:
        if self._unplaced is not None:
            self._place(self._unplaced)
        records = self._take_early() + self._consumer.consume(BATCH_EVENTS, GATHER_S)
        if records:
            looked_at = (*records[::LOOK_AT_EACH], records[-1])
            now_ms = self.clock.now_ms()  # ids may be in the future, but nothing was made later than it came
            times_ms = [min(record.timestamp()[1], now_ms) for record in looked_at if record.error() is None]
            self.in_hand_since_ms = min(times_ms, default=None)
            self._settle(records)
            # What comes next is about as old as the last of these: a lag is not gone between two batches.
            self.behind_since_ms = max(times_ms, default=self.behind_since_ms)
            self.in_hand_since_ms = None
        self._measure_lag()
        if self._settings.history_days and time.monotonic() >= self._tidy_at_s:
            self._tidy()

    def _measure_lag(self) -> None:
        if self._next_offsets is None:
            self.lag_events = 0
            return
        lag = 0
        for partition, next_offset in self._next_offsets.items():
            place = TopicPartition(self._settings.kafka_topic, partition)
            _, end = self._consumer.get_watermark_offsets(place, cached=True)  # negative until something was fetched
            self._ends[partition] = max(end, self._ends.get(partition, 0))
            lag += max(0, self._ends[partition] - next_offset)
        self.lag_events = lag
        self.behind_since_ms = (self.behind_since_ms or self.clock.now_ms()) if lag else None

    def _tidy(self) -> None:
        """Drop some of the history that is old enough, and all of it by and by."""
        more = False
        try:
            more = self._store.drop_history(self._settings.history_days, DELETE_AT_ONCE)
        except psycopg.Error as error:
            _log.warning("old events stay for another hour: %s", str(error).strip())
        self._resume()
        self._tidy_at_s = time.monotonic() + (0 if more else TIDY_EVERY_S)

    def _place_anew(self) -> None:
        """Let the next step ask the database where to read on, unless an assignment waits for that already."""
        if self._unplaced is None:
            self._unplaced = self._consumer.assignment()

    def _place(self, partitions: list[TopicPartition]) -> None:
        """Begin reading where the database says."""
        placed = self._through_outages(lambda: self._placed(partitions))
        # What is not stored is read again, by us or by another persister. What came early may come after a gap.
        self._early = []
        if self._unplaced is partitions:  # else they were revoked, or others came, while we were waiting
            self._unplaced = None
            self._consumer.assign(placed)
            self._next_offsets = {it.partition: it.offset for it in placed}
            self.chain.forget()
            self._consumer.resume(placed)  # a partition stays paused when it goes and comes back
            _log.info(
                "reading %s", ", ".join(f"{it.topic}/{it.partition} from {it.offset}" for it in placed) or "nothing"
            )

    def _placed(self, partitions: list[TopicPartition]) -> list[TopicPartition]:
        name = self._settings.kafka_topic
        self._topic = look_up(self._settings)
        if self._settings.new_topic == "restart":
            self._store.forget_offsets(name, but_of=self._topic.topic_id)
        stored = self._store.offsets(name)
        check_topic(name, self._topic, stored)
        placed = []
        for partition in partitions:
            low, high = self._consumer.get_watermark_offsets(partition, timeout=10)
            offset = first_offset(name, partition.partition, stored.get(partition.partition), low, high)
            self._ends[partition.partition] = high
            placed.append(TopicPartition(name, partition.partition, offset))
        unknown = StoredOffset("", 0)
        self._fences.begin({it.partition: stored.get(it.partition, unknown).epochs for it in partitions})
        return placed

    def _settle(self, records: list[Any]) -> None:
        """Store what can be stored, put aside what cannot, then move the offsets."""
        events, rows, refused = self._sort(records)
        next_offsets = {record.partition(): record.offset() + 1 for record in records if record.error() is None}
        if not next_offsets:
            return
        self._put_aside(refused)
        try:
            self._persist(events, next_offsets)
        except (psycopg.DataError, psycopg.IntegrityError):
            self._persist_what_can_be(events, rows)
            self._persist([], next_offsets)
        self._advance(next_offsets)
        self._commit(next_offsets)

    def _sort(self, records: list[Any]) -> tuple[list[ScoreEvent], list[Message], list[tuple[Message, str]]]:
        """The events that count, the records they came from, and those that hold none, with the reason."""
        events, rows, refused = [], [], []
        void_before = self.void_events
        for record in records:
            if record.error() is not None:
                self._heed(record.error())
                continue
            try:
                headers = headers_of(record)
                memory_of_headers(headers)  # a rebuild refuses the whole record for it
                if not self._fences.admits(record.partition(), headers):
                    continue
                events.append(decode_event(record.value()))
            except BadEvent as error:
                refused.append((record, str(error)))
            else:
                rows.append(record)
        if self.void_events > void_before:
            _log.warning("%d events of an older epoch do not count", self.void_events - void_before)
        return events, rows, refused

    def _heed(self, error: KafkaError) -> None:
        if error.code() == KafkaError._AUTO_OFFSET_RESET:
            # The log no longer holds what we were about to read: placing again says precisely why.
            self._place_anew()
        elif error.fatal():
            raise KafkaException(error)
        else:
            self.kafka_outage.failed(error)

    def _persist(self, events: list[ScoreEvent], next_offsets: dict[int, int]) -> None:
        persist = self._store.persist
        name, topic_id = self._settings.kafka_topic, self._topic.topic_id
        epochs = self._fences.epochs

        def write() -> Persisted:
            begun_s = time.monotonic()
            done = persist(events, name, topic_id, next_offsets, epochs)
            if events:
                self.batch_s.observe(time.monotonic() - begun_s)
            return done

        self.persisted_events += self._through_outages(write).new_events
        if events:
            self.batch_events.observe(len(events))
            self.chain.follow(events)

    def _persist_what_can_be(self, events: list[ScoreEvent], rows: list[Message]) -> None:
        """Halve a batch the database refuses until what it refuses stands alone, and put that aside."""
        try:
            self._persist(events, {})
        except (psycopg.DataError, psycopg.IntegrityError) as error:
            if len(events) == 1:
                self._put_aside([(rows[0], str(error))])
                return
            half = len(events) // 2
            self._persist_what_can_be(events[:half], rows[:half])
            self._persist_what_can_be(events[half:], rows[half:])

    def _put_aside(self, refused: list[tuple[Message, str]]) -> None:
        self._through_outages(lambda: self._dead_letters.keep(refused, CONFIRM_WITHIN_S))

    def _advance(self, next_offsets: dict[int, int]) -> None:
        ours = self._next_offsets or {}
        for partition, offset in next_offsets.items():
            if partition in ours:  # else it went to another persister while we had the batch in hand
                ours[partition] = max(offset, ours[partition])

    def _commit(self, next_offsets: dict[int, int]) -> None:
        name = self._settings.kafka_topic
        offsets = [TopicPartition(name, partition, offset) for partition, offset in next_offsets.items()]
        try:
            self._consumer.commit(offsets=offsets, asynchronous=True)
        except KafkaException as error:
            _log.debug("the group's offsets were not moved: %s", error)

    def _through_outages(self, work: Callable[[], _T]) -> _T:
        """What `work` returns once it succeeds; until then the group is polled, so that it keeps us."""
        counted = False
        while True:
            try:
                result = work()
            except (psycopg.OperationalError, errors.ReadOnlySqlTransaction) as error:
                delay_s = self.database_outage.failed(error)
            except KafkaException as error:
                delay_s = self.kafka_outage.failed(error)
            else:
                break
            if not counted:
                counted = True
                self.outages += 1
            self._pause()
            self._poll_for(delay_s)
        self.database_outage.over()
        self.kafka_outage.over()
        self._resume()
        return result

    def _pause(self) -> None:
        if not self._paused:
            self._paused = True
            self._consumer.pause(self._consumer.assignment())

    def _resume(self) -> None:
        if self._paused:
            self._paused = False
            self._consumer.resume(self._consumer.assignment())

    def _while_the_database_works(self, waited_s: float) -> None:
        self._stop.heed()
        if waited_s >= POLL_AFTER_S:
            self._pause()
            self._early += self._consumer.consume(BATCH_EVENTS, 0)
            self._measure_lag()

    def _poll_for(self, duration_s: float) -> None:
        deadline = time.monotonic() + duration_s
        while (left_s := deadline - time.monotonic()) > 0:
            if self._stop.requested:
                raise Stopped
            self._early += self._consumer.consume(BATCH_EVENTS, min(left_s, GATHER_S))
            self._measure_lag()

    def _take_early(self) -> list[Message]:
        early, self._early = self._early, []
        return early
