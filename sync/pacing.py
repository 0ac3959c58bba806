"""How far the database is with the topic: for a relay in front of a broker that forgets what nobody has read.

The broker of `scoreboard dev` keeps a few MB and throws the oldest away. With RELAY_AHEAD_BYTES the relay takes an
entry for done only when its events are in the database, and has no more than that on the way there. Knows no outbox.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Final

import psycopg
from confluent_kafka import KafkaError, TopicPartition

from server import postgres
from server.config import Settings
from server.events import PERSISTER_GROUP
from server.postgres import Connection
from sync.kafka import new_consumer
from sync.topics import Topic, look_up

LOOK_EVERY_S: Final = 0.05
ANSWER_WITHIN_S: Final = 2.0
_OFFSETS: Final = """
    SELECT partition, next_offset FROM consumer_offsets WHERE consumer_group = %s AND topic = %s AND topic_id = %s
"""
_log = logging.getLogger("sync.pacing")


class Progress:
    """What of the topic is stored, looked at by a thread of its own: the relay must not wait for a database."""

    def __init__(self, settings: Settings) -> None:
        """Raises KafkaException when Kafka does not answer."""
        self._settings = settings
        self._topic = look_up(settings)
        self._stored: dict[int, int] = {}
        self._before = {partition: end - 1 for partition, end in _ends(settings, self._topic) if end}
        self._wanted = threading.Event()
        self._wanted.set()
        self._closed = False
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)
        self._thread.start()

    def covers(self, offsets: Mapping[int, int]) -> bool:
        """Whether the records at these offsets, by partition, are stored, and all before them; asks for a new look."""
        if all(self._stored.get(partition, 0) > offset for partition, offset in offsets.items()):
            return True
        self._wanted.set()
        return False

    def covers_what_was_there(self) -> bool:
        """Whether all is stored that was in the topic when we began."""
        if self._before and self.covers(self._before):
            self._before = {}
        return not self._before

    def close(self) -> None:
        """Look no more."""
        self._closed = True
        self._wanted.set()
        self._thread.join(ANSWER_WITHIN_S)

    def _watch(self) -> None:
        with contextlib.ExitStack() as stack:
            connection: Connection | None = None
            while not self._closed:
                self._wanted.wait()
                self._wanted.clear()
                try:
                    connection = connection or stack.enter_context(self._connect())
                    self._stored = dict(self._offsets(connection))
                except psycopg.Error as error:  # nothing is stored, then; the persister says why
                    _log.debug("the database did not say how far it is: %s", str(error).strip())
                    connection = None
                    stack.close()
                time.sleep(LOOK_EVERY_S)

    def _connect(self) -> Connection:
        connection = postgres.connect(self._settings.database_url, "scoreboard-relay", ANSWER_WITHIN_S)
        connection.autocommit = True
        return connection

    def _offsets(self, connection: Connection) -> list[tuple[int, int]]:
        asked = (PERSISTER_GROUP, self._settings.kafka_topic, self._topic.topic_id)
        return connection.execute(_OFFSETS, asked).fetchall()


def _ends(settings: Settings, topic: Topic) -> Iterator[tuple[int, int]]:
    """(partition, one past its last offset) for each partition."""

    def ignore(_: KafkaError) -> None:
        """What is asked says by itself when it fails."""

    consumer = new_consumer(settings, "relay", ignore)
    try:
        for partition in range(topic.partitions):
            place = TopicPartition(settings.kafka_topic, partition)
            yield partition, consumer.get_watermark_offsets(place, timeout=ANSWER_WITHIN_S)[1]
    finally:
        consumer.close()
