"""Kafka clients the way both parts want them: durable writes, nothing held back, quiet logs.

Knows no event. The topic names are the caller's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Final

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer
from confluent_kafka.admin import AdminClient

from server.config import Settings
from server.kafka_clients import client_settings, refusal

MAX_IN_FLIGHT: Final = 20_000
"""Events a producer holds at most: about 0.3 s of a full load."""

LOOK_EVERY_S: Final = 2.0
"""While brokers do not answer: whether it is because they refuse us."""

_log = logging.getLogger("sync.kafka")
# What goes wrong comes through error_cb or an exception; the library's own lines would repeat it at every try.
_QUIET: Final = {"log_level": 2, "logger": _log}


def _clients(settings: Settings, on_error: Callable[[KafkaError], None] | None = None) -> dict[str, Any]:
    def say(error: KafkaError) -> None:
        refused = refusal(error)
        # One broker of several may come and go without any harm.
        if on_error and (refused or error.fatal() or error.code() == KafkaError._ALL_BROKERS_DOWN):
            on_error(refused or error)

    return {
        **client_settings(settings),
        "reconnect.backoff.max.ms": 1000,
        "socket.timeout.ms": 10_000,
        "error_cb": say,
        **_QUIET,
    }


def new_producer(settings: Settings, on_error: Callable[[KafkaError], None]) -> Producer:
    """A producer that never gives up on a record, never reorders and never repeats one.

    `on_error` is told, from within `poll`, when no broker can be reached or the producer is of no more use.
    """
    return Producer(
        {
            **_clients(settings, on_error),
            "enable.idempotence": True,
            "acks": "all",
            "message.timeout.ms": 0,
            "message.max.bytes": 10_000_000,  # what is too large is for the broker to say, which takes more than 1 MB
            "partitioner": "murmur2_random",
            "linger.ms": 0,
            "queue.buffering.max.messages": MAX_IN_FLIGHT,
        }
    )


def new_consumer(settings: Settings, group: str, on_error: Callable[[KafkaError], None]) -> Consumer:
    """A consumer that reads where it is told to, and holds a few MB unread; `on_error` as for a producer."""
    return Consumer(
        {
            **_clients(settings, on_error),
            "group.id": group,
            "enable.auto.commit": False,
            # A killed member's partitions move on after 6 s; the broker's default minimum.
            "session.timeout.ms": 6000,
            "heartbeat.interval.ms": 1500,
            "auto.offset.reset": "error",
            # Nobody waits for the persister, and each fetch costs the broker more than the events in it.
            "fetch.min.bytes": 65_536,
            "fetch.wait.max.ms": settings.kafka_fetch_wait_ms,
            "queued.max.messages.kbytes": 4096,
            "topic.metadata.refresh.interval.ms": 10_000,
        }
    )


def new_admin(settings: Settings) -> AdminClient:
    """A client to create and describe topics with."""
    return _Admin(settings)


class _Admin(AdminClient):
    """Says why the brokers refuse us, where librdkafka only says that they do not answer."""

    def __init__(self, settings: Settings) -> None:
        self._refusal: KafkaError | None = None
        super().__init__(_clients(settings) | {"error_cb": self._on_error})

    def list_topics(self, topic: str | None = None, timeout: float = LOOK_EVERY_S) -> Any:
        """Which topics there are: the first thing anybody asks.

        Raises KafkaException.
        """
        deadline_s = time.monotonic() + timeout
        while True:
            left_s = max(0.0, deadline_s - time.monotonic())
            try:
                return super().list_topics(topic, timeout=min(left_s, LOOK_EVERY_S))
            except KafkaException:
                self.poll(0)  # the reason waits there
                if self._refusal:
                    raise KafkaException(self._refusal) from None
                if left_s <= LOOK_EVERY_S:
                    raise

    def _on_error(self, error: KafkaError) -> None:
        self._refusal = refusal(error) or self._refusal
