"""Dead letters: records that cannot be stored, kept in a topic of their own with the reason.

Knows nothing of why a record is refused. A letter counts as kept once Kafka has confirmed it.
"""

from __future__ import annotations

import logging

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from server.config import Settings
from sync.kafka import new_producer

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
