"""Dead letters: records that cannot be stored, kept in a topic of their own with the reason, and sent once more.

Knows nothing of why a record is refused. A letter counts as kept, or as sent again, once Kafka has confirmed it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, NamedTuple

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition

from server.config import Settings
from server.events import BadEvent
from server.fences import EPOCH_HEADER
from server.kafka_clients import headers_of
from sync.kafka import MAX_IN_FLIGHT, new_admin, new_consumer, new_producer

SHOWN_BYTES: Final = 80
ANSWER_WITHIN_S: Final = 10.0
LONGEST_REASON: Final = 1000
"""Characters: what refuses a record may repeat it."""

AT_ONCE_BYTES: Final = 1_000_000
"""Of records put aside before Kafka's confirmation is waited for: a few thousand large ones would never be in time."""

CUT_TO_BYTES: Final = (100_000, 1_000, 0)
"""What is kept of the key and of the value, each, of a record that Kafka does not take as a letter: its own limit may
be met already, and a letter says more. The next one is tried when that is refused as well."""

CUT_HEADER: Final = "truncated"
"""Of a letter that is not whole: how many bytes the record's value had."""

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
        for some in _at_once(letters):
            for record, reason in some:
                source = f"{record.topic()}/{record.partition()}/{record.offset()}"
                _log.error("%s goes to %s: %s", source, self._settings.dead_letter_topic, reason[:LONGEST_REASON])
            # Kafka refuses a request as a whole: what is too large is known once each is alone.
            for letter in self._send(some, within_s):
                self._send_alone(letter, within_s)
        self.kept += len(letters)

    def _send_alone(self, letter: tuple[Message, str], within_s: float) -> None:
        for most_bytes in (None, *CUT_TO_BYTES):
            if not self._send([letter], within_s, most_bytes):
                return
        raise KafkaException(KafkaError(KafkaError.MSG_SIZE_TOO_LARGE))

    def _send(
        self, letters: list[tuple[Message, str]], within_s: float, most_bytes: int | None = None
    ) -> list[tuple[Message, str]]:
        """Put letters into the topic; returns those that are too large for it, or `most_bytes` of each."""
        if self._producer is None:
            self._producer = new_producer(self._settings, self._on_error)
        self._error = None
        too_large: list[tuple[Message, str]] = []
        for letter in letters:
            answered = partial(self._answered, letter, too_large)
            try:
                self._produce(self._producer, letter, most_bytes, answered)
            except KafkaException as error:  # it is too large for the producer already
                answered(error.args[0], None)
        left = self._producer.flush(within_s)
        if left or self._error:
            self._give_up(self._producer)
        return too_large

    def _produce(self, producer: Producer, letter: tuple[Message, str], most_bytes: int | None, answered: Any) -> None:
        record, reason = letter
        key, value = record.key(), record.value()
        headers: list[tuple[str, Any]] = []
        if most_bytes is None:
            headers += _readable_headers(record)
        else:
            headers.append((CUT_HEADER, str(len(value or b""))))
            key, value = key and key[:most_bytes], value and value[:most_bytes]
        headers += [
            ("reason", reason[:LONGEST_REASON].encode(errors="replace")),
            ("topic", record.topic()),
            ("partition", str(record.partition())),
            ("offset", str(record.offset())),
            ("timestamp", str(record.timestamp()[1])),
        ]
        producer.produce(self._settings.dead_letter_topic, value, key, on_delivery=answered, headers=headers)

    def _answered(
        self, letter: tuple[Message, str], too_large: list[tuple[Message, str]], error: KafkaError | None, _: Any
    ) -> None:
        if error is not None and error.code() == KafkaError.MSG_SIZE_TOO_LARGE:
            too_large.append(letter)
        else:
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

    @property
    def whole(self) -> bool:
        """Whether all of the record is here, so that it can be sent again."""
        return all(name != CUT_HEADER for name, _ in self.headers)

    def __str__(self) -> str:
        when = _iso(self.refused_ms)
        value = "no value" if self.value is None else repr(self.value[:SHOWN_BYTES])[1:]
        reason = "".join(each if each.isprintable() else " " for each in " ".join(self.reason.split()))
        return f"{self.topic}/{self.partition}:{self.offset}  {when}  {reason}  {value}"


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
    headers = _readable_headers(record)
    told = {name: (value or b"").decode("utf-8", "replace") for name, value in headers if name in _OURS}
    refused_ms = record.timestamp()[1]
    return Letter(
        told.get("topic", ""),
        _number(told.get("partition"), -1),
        _number(told.get("offset"), -1),
        told.get("reason", "no reason"),
        refused_ms,
        record.key(),
        record.value(),
        [(name, value) for name, value in headers if name not in _NOT_SENT_AGAIN],
        _number(told.get("timestamp"), refused_ms),
    )


def _readable_headers(record: Message) -> list[tuple[str, Any]]:
    """None of a record whose headers have names that are no text: that may be why it is here."""
    try:
        return list(headers_of(record))
    except BadEvent:
        return []


def _at_once(letters: list[tuple[Message, str]]) -> Iterator[list[tuple[Message, str]]]:
    """The same letters in groups of AT_ONCE_BYTES, or one that has more."""
    some: list[tuple[Message, str]] = []
    size_bytes = 0
    for letter in letters:
        letter_bytes = len(letter[0].value() or b"") + len(letter[0].key() or b"")
        if some and size_bytes + letter_bytes > AT_ONCE_BYTES:
            yield some
            some, size_bytes = [], 0
        some.append(letter)
        size_bytes += letter_bytes
    if some:
        yield some


def _number(text: str | None, otherwise: int) -> int:
    """Of a letter's header; whoever may write into the topic may write anything."""
    return int(text) if text and len(text) < 20 and text.isascii() and text.isdigit() else otherwise


def _iso(at_ms: int) -> str:
    try:
        return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):  # a record's time is any 64 bits
        return f"{at_ms} ms"
