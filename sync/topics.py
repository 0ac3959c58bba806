"""The topics: created as the settings say, never by accident, and told apart when made anew.

Knows nothing of what is in them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any, Final, NamedTuple

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewTopic,
    ResourceType,
)

from server.config import Settings
from server.kafka_clients import is_refusal
from sync.kafka import new_admin

ANSWER_WITHIN_S: Final = 10.0

_NO_BOUND: Final = str(2**63 - 1)
_AS_PRODUCED: Final = {"message.timestamp.type": "CreateTime"}
SINCE_3_6: Final = _AS_PRODUCED | {
    "message.timestamp.after.max.ms": _NO_BOUND,
    "message.timestamp.before.max.ms": _NO_BOUND,
}
BEFORE_4_0: Final = _AS_PRODUCED | {"message.timestamp.difference.max.ms": _NO_BOUND}
ANY_TIME: Final = SINCE_3_6 | BEFORE_4_0
"""What lets a topic take records whenever Redis says that they were made: its clock may be ahead, or an outbox old.

Each version of Kafka knows some of these settings; by default 4.0 refuses what is an hour ahead.
"""

_log = logging.getLogger("sync.topics")


class Topic(NamedTuple):
    """What a topic is, whatever its name: one that was deleted and created again has another id."""

    topic_id: str
    partitions: int


def ensure_topics(settings: Settings) -> None:
    """Create the topics that are not there; of those that are, only bounds on the time of records are taken away.

    Raises KafkaException.
    """
    admin = new_admin(settings)
    if _mock_cluster(admin):
        _ask_mock_cluster(admin, settings.kafka_topic)
        _ask_mock_cluster(admin, settings.dead_letter_topic)
        return
    wanted = _wanted(settings)
    missing = [topic for topic in wanted if _describe(admin, topic.topic) is None]
    for topic in missing:
        _create(admin, topic)
    for topic in wanted:
        if topic not in missing:
            _accept_any_time(admin, topic.topic)


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


def times_refused(admin: AdminClient, name: str) -> dict[str, str]:
    """The settings of a topic that make it refuse records, or change their time: what each should be.

    Raises KafkaException.
    """
    asked = ConfigResource(ResourceType.TOPIC, name)
    described: Any = admin.describe_configs([asked], request_timeout=ANSWER_WITHIN_S)
    found = described[asked].result()
    return {key: value for key, value in ANY_TIME.items() if key in found and found[key].value != value}


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


def _create(admin: AdminClient, topic: NewTopic) -> None:
    """Create a topic that takes records of any time, as far as these brokers have settings for it."""
    config = topic.config or {}
    for times in (SINCE_3_6, BEFORE_4_0, {}):
        wanted = NewTopic(topic.topic, topic.num_partitions, topic.replication_factor, config=config | times)
        created: Mapping[str, Future[None]] = admin.create_topics(
            [wanted], operation_timeout=ANSWER_WITHIN_S, request_timeout=ANSWER_WITHIN_S
        )
        try:
            _created_by_us_or_others(created[topic.topic])
        except KafkaException as error:
            if not times or error.args[0].code() not in (KafkaError.INVALID_CONFIG, KafkaError.POLICY_VIOLATION):
                raise
        else:
            break
    if not times:
        _log.warning("the topic %s may refuse records of a clock that is ahead: these brokers decide", topic.topic)


def _accept_any_time(admin: AdminClient, name: str) -> None:
    """Let a topic that exists take records of any time; brokers that do not let us are told of in the log."""
    try:
        wrong = times_refused(admin, name)
        if not wrong:
            return
        entries = [ConfigEntry(key, value, incremental_operation=AlterConfigOpType.SET) for key, value in wrong.items()]
        altered: Any = admin.incremental_alter_configs(
            [ConfigResource(ResourceType.TOPIC, name, incremental_configs=entries)], request_timeout=ANSWER_WITHIN_S
        )
        for future in altered.values():
            future.result()
    except KafkaException as error:
        if not is_refusal(error):
            raise
        _log.warning("the topic %s may refuse records of a clock that is ahead: %s", name, error.args[0].str())
    else:
        _log.info(
            "the topic %s takes records of any time now: %s", name, ", ".join(f"{k}={v}" for k, v in wrong.items())
        )


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
