"""The topics: created as the settings say, never by accident, and told apart when made anew.

Knows nothing of what is in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any, Final, NamedTuple

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]

from server.config import Settings
from sync.kafka import new_admin

ANSWER_WITHIN_S: Final = 10.0


class Topic(NamedTuple):
    """What a topic is, whatever its name: one that was deleted and created again has another id."""

    topic_id: str
    partitions: int


def ensure_topics(settings: Settings) -> None:
    """Create the topics that are not there; those that are stay as they are.

    Raises KafkaException.
    """
    admin = new_admin(settings)
    if _mock_cluster(admin):
        _ask_mock_cluster(admin, settings.kafka_topic)
        _ask_mock_cluster(admin, settings.dead_letter_topic)
        return
    wanted = {topic.topic: topic for topic in _wanted(settings)}
    missing = [topic for name, topic in wanted.items() if _describe(admin, name) is None]
    if missing:
        created: Mapping[str, Future[None]] = admin.create_topics(
            missing, operation_timeout=ANSWER_WITHIN_S, request_timeout=ANSWER_WITHIN_S
        )
        for future in created.values():
            _created_by_us_or_others(future)


def look_up(settings: Settings) -> Topic:
    """The topic of events as the brokers know it.

    Raises KafkaException, also when there is no such topic.
    """
    admin = new_admin(settings)
    if _mock_cluster(admin):
        return _ask_mock_cluster(admin, settings.kafka_topic)
    topic = _describe(admin, settings.kafka_topic)
    if topic is None:
        raise KafkaException(KafkaError(KafkaError.UNKNOWN_TOPIC_OR_PART, f"no topic {settings.kafka_topic}"))
    return topic


def _wanted(settings: Settings) -> list[NewTopic]:
    replication = settings.kafka_replication
    # With acks=all a write is on two brokers at least, and one of three may be away.
    durable = {"min.insync.replicas": "2" if replication >= 3 else "1", "cleanup.policy": "delete"}
    retention_ms = str(settings.kafka_retention_hours * 3_600_000)
    return [
        NewTopic(
            settings.kafka_topic,
            settings.kafka_partitions,
            replication,
            config=durable | {"retention.ms": retention_ms},
        ),
        # Dead letters wait for somebody to look at them, however long that takes.
        NewTopic(settings.dead_letter_topic, 1, replication, config=durable | {"retention.ms": "-1"}),
    ]


def _describe(admin: AdminClient, name: str) -> Topic | None:
    futures: Any = admin.describe_topics(TopicCollection([name]), request_timeout=ANSWER_WITHIN_S)
    try:
        described = futures[name].result()
    except KafkaException as error:
        if error.args[0].code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
            return None
        raise
    return Topic(str(described.topic_id), len(described.partitions))


def _created_by_us_or_others(future: Future[None]) -> None:
    try:
        future.result()
    except KafkaException as error:
        if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
            raise


def _mock_cluster(admin: AdminClient) -> bool:
    """Whether this is librdkafka's own broker in memory, which has no controller to create or describe topics."""
    return str(admin.list_topics(timeout=ANSWER_WITHIN_S).cluster_id).startswith("mockCluster")


def _ask_mock_cluster(admin: AdminClient, name: str) -> Topic:
    # It makes a topic when asked for it; its topics live and die with it, so its own id tells them apart.
    answer = admin.list_topics(name, timeout=ANSWER_WITHIN_S)
    return Topic(str(answer.cluster_id), len(answer.topics[name].partitions))
