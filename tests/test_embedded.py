"""The embedded services: they start, survive kill -9, come back, and leave nothing behind."""

from __future__ import annotations

import psycopg
import pytest
import redis as redis_client
from confluent_kafka.admin import AdminClient, NewTopic

from tests.services import KafkaBroker


@pytest.mark.redis
def test_redis(redis: redis_client.Redis) -> None:
    assert redis.set("a", 1)


@pytest.mark.postgres
def test_pg(database_url: str) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute("create table a ()")


@pytest.mark.kafka
def test_kafka(kafka_broker: KafkaBroker, kafka_topic: str) -> None:
    admin = AdminClient({"bootstrap.servers": kafka_broker.brokers})
    admin.create_topics([NewTopic(kafka_topic, 2)])[kafka_topic].result(10)
    kafka_broker.kill()
    kafka_broker.start()
    assert len(admin.list_topics(kafka_topic, timeout=10).topics[kafka_topic].partitions) == 2
