"""Reading Kafka's log back: from offsets or a moment to where it ends now, behind a fence of ours.

Everything here blocks, so it belongs into a thread of its own. Belongs to no consumer group, and knows no Redis.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient

from server.config import Settings
from server.errors import NotReady
from server.events import FORMAT_VERSION, BadEvent, ScoreEvent, decode_event, memory_of_headers
from server.fences import FENCE_HEADER, TAG_HEADER, Fences
from server.kafka_clients import client_settings, headers_of, refusal
from server.replay import Log

ANSWER_WITHIN_S: Final = 5.0
STALLED_S: Final = 20.0
"""How long the brokers may send nothing of what they have."""

MOST_RECORDS: Final = 2000
_POLL_S: Final = 0.5
_FLUSH_S: Final = 0.1

_log = logging.getLogger(__name__)


class Record(NamedTuple):
    """An event and where it stands; `memory` is None where its request had no Idempotency-Key."""

    partition: int
    offset: int
    event: ScoreEvent
    memory: str | None


class KafkaTail:
    """One reading of the topic of events; a second thread waits, and what it asks for after `close` is refused.

    Every method raises NotReady when the brokers do not answer, or not with what they should have.
    """

    def __init__(self, settings: Settings) -> None:
        self._topic = settings.kafka_topic
        self._brokers = settings.kafka_brokers
        # What goes wrong is raised; the library's own lines would repeat it at every try.
        clients: dict[str, Any] = {
            **client_settings(settings),
            # Kafka may be starting: each try counts, and the default waits up to 10 s between two.
            "reconnect.backoff.max.ms": 500,
            "log_level": 2,
            "logger": _log,
            "error_cb": self._on_error,
        }
        self._clients = clients
        self._admin = AdminClient(clients)
        self._consumer: Any = Consumer(
            {
                **clients,
                "group.id": "scoreboard-rebuild",  # never joined: partitions are assigned here
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "auto.offset.reset": "error",
                "fetch.wait.max.ms": settings.kafka_fetch_wait_ms,
                "queued.max.messages.kbytes": 4096,
            }
        )
        self._mock = False
        self._log = Log("", {})
        self._ends: dict[int, int] = {}
        self._fences = Fences()
        self._unread: set[int] = set()
        self._busy = threading.Lock()
        self._closed = False
        self._refusal: KafkaError | None = None

    def describe(self) -> Log | None:
        """The topic as it is now; None when the brokers answer that there is none."""
        with self._saying():
            # Asked of the consumer: an admin client's question would create it, where brokers do that.
            metadata = self._consumer.list_topics(self._topic, timeout=ANSWER_WITHIN_S)
            topic = metadata.topics[self._topic]
            if topic.error is not None:
                if topic.error.code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
                    return None
                raise KafkaException(topic.error)
            # librdkafka's own broker in memory describes no topics; its topics live and die with it.
            self._mock = str(metadata.cluster_id).startswith("mockCluster")
            topic_id = str(metadata.cluster_id) if self._mock else self._topic_id()
            self._log = Log(topic_id, {number: self._bounds(number) for number in topic.partitions})
        return self._log

    def first_since(self, at_ms: int) -> dict[int, int]:
        """By partition, the offset of the first record with this timestamp or a later one, or the log's end."""
        if self._mock:  # it cannot search by time
            return {number: low for number, (low, _) in self._log.bounds.items()}
        wanted = [TopicPartition(self._topic, number, at_ms) for number in self._log.bounds]
        with self._saying():
            found = self._consumer.offsets_for_times(wanted, timeout=ANSWER_WITHIN_S) if wanted else []
            for it in found:
                if it.error is not None:  # its end would pass for the answer, and its records for none
                    raise KafkaException(it.error)
        ends = {number: high for number, (_, high) in self._log.bounds.items()}
        return ends | {it.partition: it.offset for it in found if it.offset >= 0}

    def fence(self, epoch: int, at_ms: int, tag: str = "") -> dict[int, int]:
        """Let nothing of a hash tag count that is of an older epoch and not in the log yet.

        `at_ms` is the time of Redis, as that of events is: `first_since` must not pass over a fence among them.
        Returns by partition where the log ends now.
        """
        errors: list[KafkaError] = []
        producer = Producer({**self._clients, "acks": "all", "linger.ms": 0})
        for number in self._log.bounds:
            producer.produce(
                self._topic,
                partition=number,
                timestamp=at_ms,
                on_delivery=lambda error, _: errors.append(error) if error else None,
                headers=[("v", FORMAT_VERSION), (FENCE_HEADER, str(epoch)), *([(TAG_HEADER, tag)] if tag else [])],
            )
        deadline_s = time.monotonic() + ANSWER_WITHIN_S
        while (left := producer.flush(_FLUSH_S)) and not self._closed and time.monotonic() < deadline_s:
            pass  # a mending that was cancelled, as when its lock was lost, sends no fence that still waits for Kafka
        if left or errors:
            producer.purge()
            reason = errors[0].str() if errors else "they were not confirmed in time"
            raise NotReady(f"Kafka at {self._brokers} does not take fences for {self._topic}: {reason}")
        with self._saying():
            return {number: self._bounds(number)[1] for number in self._log.bounds}

    def start(self, starts: Mapping[int, int], ends: Mapping[int, int], fences: Fences) -> None:
        """Let `read` begin at these offsets, end before those, and leave out what `fences` do not admit."""
        self._ends, self._fences = dict(ends), fences
        placed = [TopicPartition(self._topic, number, at) for number, at in starts.items() if at < ends[number]]
        self._unread = {it.partition for it in placed}
        with self._saying():
            self._consumer.assign(placed)

    def read(self) -> list[Record]:
        """The next events that count, of each partition in order; none once the end was reached."""
        deadline_s = time.monotonic() + STALLED_S
        with self._saying():
            while self._unread and not self._closed:
                # consume() waits until it has as many as it was asked for: so first one, then whatever is there.
                arrived = self._consumer.consume(1, _POLL_S)
                arrived += self._consumer.consume(MOST_RECORDS, 0) if arrived else []
                records = [record for message in arrived if (record := self._record(message))]
                if records:
                    return records
                if time.monotonic() > deadline_s:
                    raise NotReady(f"Kafka at {self._brokers} does not send what it has of {self._topic}")
        return []

    def close(self) -> None:
        """Give up the connections, as soon as another thread is done with them."""
        self._closed = True  # without the lock, so that a `read` ends
        with self._busy:
            self._consumer.close()

    def _record(self, message: Any) -> Record | None:
        number, offset, error = message.partition(), message.offset(), message.error()
        if error is not None:
            if error.code() != KafkaError._PARTITION_EOF:
                raise KafkaException(error)
            self._unread.discard(number)
            return None
        end = self._ends[number]
        if offset + 1 >= end:
            self._unread.discard(number)
        if offset >= end:
            return None
        try:
            headers = headers_of(message)
            memory = memory_of_headers(headers)
            if not self._fences.admits(number, headers):
                return None
            return Record(number, offset, decode_event(message.value()), memory)
        except BadEvent:
            return None  # the persister counts and keeps what cannot be read

    def _bounds(self, number: int) -> tuple[int, int]:
        low, high = self._consumer.get_watermark_offsets(TopicPartition(self._topic, number), timeout=ANSWER_WITHIN_S)
        return low, high

    def _topic_id(self) -> str:
        asked: Any = self._admin.describe_topics(TopicCollection([self._topic]), request_timeout=ANSWER_WITHIN_S)
        return str(asked[self._topic].result().topic_id)

    def _on_error(self, error: KafkaError) -> None:
        self._refusal = refusal(error) or self._refusal

    @contextmanager
    def _saying(self) -> Iterator[None]:
        with self._busy:
            if self._closed:
                raise NotReady(f"reading {self._topic} was given up")  # closed, the library's client may crash us
            self._refusal = None
            try:
                yield
            except KafkaException as error:
                self._consumer.poll(0)  # why the brokers refuse us waits there; a record may be lost, the reading is
                reason = self._refusal or error.args[0]
                raise NotReady(f"Kafka at {self._brokers}: {reason.str()}") from error
