"""Dead letters: records that cannot be stored, kept in a topic of their own with the reason, and sent once more.

Knows nothing of why a record is refused. A letter counts as kept, or as sent again, once Kafka has confirmed it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition

from server.config import Settings
from server.fences import EPOCH_HEADER
from sync.kafka import MAX_IN_FLIGHT, new_admin, new_consumer, new_producer

SHOWN_BYTES: Final = 80
ANSWER_WITHIN_S: Final = 10.0
_OURS: Final = ("reason", "topic", "partition", "offset", "timestamp")
"""The headers of a letter that its record did not have."""

_NOT_SENT_AGAIN: Final = (*_OURS, EPOCH_HEADER)
"""An event that was refused counted when it came: no fence since then may void it."""

_log = logging.getLogger("sync.dead_letters")


class DeadLetters:
    """Writes dead letters; connects when the first one comes."""

    def __init__(self, settings: Settings) -> None:
        self.kept = 0
        self._settings = settings
        self._producer: Producer | None = None
        self._error: KafkaError | None = None

    def keep(self, letters: list[tuple[Message, str]], within_s: float) -> None:
        """Put records and the reasons they were refused for into the topic, all of them.

        Raises KafkaException when that was not confirmed in time; some of them may be there nevertheless.
        """
        if not letters:
            return
        if self._producer is None:
            self._producer = new_producer(self._settings, self._on_error)
        self._error = None
        for record, reason in letters:
            self._produce(self._producer, record, reason)
        left = self._producer.flush(within_s)
        if left or self._error:
            self._give_up(self._producer)
        self.kept += len(letters)

    def _produce(self, producer: Producer, record: Message, reason: str) -> None:
        source = f"{record.topic()}/{record.partition()}/{record.offset()}"
        _log.error("%s goes to %s: %s", source, self._settings.dead_letter_topic, reason)
        headers = [
            *(record.headers() or ()),
            ("reason", reason),
            ("topic", record.topic()),
            ("partition", str(record.partition())),
            ("offset", str(record.offset())),
            ("timestamp", str(record.timestamp()[1])),
        ]
        producer.produce(
            self._settings.dead_letter_topic, record.value(), record.key(), on_delivery=self._answered, headers=headers
        )

    def _answered(self, error: KafkaError | None, _: Message) -> None:
        self._error = error or self._error

    def _on_error(self, error: KafkaError) -> None:
        _log.debug("%s", error)

    def _give_up(self, producer: Producer) -> None:
        # The next try makes a producer anew: this one may be broken for good, and must not deliver late.
        error = self._error or KafkaError(KafkaError._TIMED_OUT, "dead letters were not confirmed in time")
        producer.purge()
        producer.poll(0)
        self._producer = None
        raise KafkaException(error)


class Letter(NamedTuple):
    """A dead letter: the record that was refused, where it stood, why, and when that was (Unix time in ms)."""

    topic: str
    partition: int
    offset: int
    reason: str
    refused_ms: int
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, Any]]
    timestamp_ms: int

    def __str__(self) -> str:
        when = datetime.fromtimestamp(self.refused_ms / 1000, UTC).isoformat(timespec="seconds")
        value = "no value" if self.value is None else repr(self.value[:SHOWN_BYTES])[1:]
        return f"{self.topic}/{self.partition}:{self.offset}  {when}  {' '.join(self.reason.split())}  {value}"


def letters(settings: Settings) -> Iterator[Letter]:
    """All the letters there are now, the oldest first.

    Raises KafkaException.
    """
    name = settings.dead_letter_topic
    consumer = new_consumer(settings, "scoreboard-dead-letters", lambda error: _log.debug("%s", error))
    try:
        # Asked of an admin client, which says why if the brokers refuse us.
        for partition in new_admin(settings).list_topics(name, timeout=ANSWER_WITHIN_S).topics[name].partitions:
            low, high = consumer.get_watermark_offsets(TopicPartition(name, partition), timeout=ANSWER_WITHIN_S)
            if low < high:
                consumer.assign([TopicPartition(name, partition, low)])
                yield from map(_letter, _until(consumer, high))
    finally:
        consumer.close()


def send_again(settings: Settings, chosen: Iterable[Letter]) -> int:
    """Put the records of these letters into their topics as they were; returns how many those were.

    Of letters that say the same, one. Raises KafkaException when not all were confirmed; some may have been.
    """
    errors: list[KafkaError] = []
    producer = new_producer(settings, errors.append)
    seen: set[bytes] = set()

    def answered(error: KafkaError | None, _: Message) -> None:
        if error:
            errors.append(error)

    for letter in chosen:
        digest = hashlib.sha256(repr((letter.topic, letter.key, letter.value)).encode()).digest()
        if digest in seen:
            continue
        seen.add(digest)
        producer.produce(
            letter.topic,
            letter.value,
            letter.key,
            on_delivery=answered,
            headers=letter.headers,
            timestamp=letter.timestamp_ms,
        )
        if len(seen) % (MAX_IN_FLIGHT // 2) == 0:
            _confirm(producer, errors)
    _confirm(producer, errors)
    return len(seen)


def _confirm(producer: Producer, errors: list[KafkaError]) -> None:
    left = producer.flush(ANSWER_WITHIN_S)
    if left or errors:
        producer.purge()
        raise KafkaException(*errors[:1] or [KafkaError(KafkaError._TIMED_OUT, f"{left} records were not confirmed")])


def _until(consumer: Consumer, end: int) -> Iterator[Message]:
    """What comes before the offset `end`."""
    while True:
        record = consumer.poll(ANSWER_WITHIN_S)
        if record is None:
            raise KafkaException(KafkaError(KafkaError._TIMED_OUT, "the dead letters do not come"))
        error = record.error()
        if error:
            raise KafkaException(error)
        yield record
        if (record.offset() or 0) + 1 >= end:
            return


def _letter(record: Any) -> Letter:
    headers = record.headers() or []
    told = {name: (value or b"").decode("utf-8", "replace") for name, value in headers if name in _OURS}
    refused_ms = record.timestamp()[1]
    return Letter(
        told.get("topic", ""),
        int(told.get("partition", -1)),
        int(told.get("offset", -1)),
        told.get("reason", "no reason"),
        refused_ms,
        record.key(),
        record.value(),
        [(name, value) for name, value in headers if name not in _NOT_SENT_AGAIN],
        int(told.get("timestamp", refused_ms)),
    )
