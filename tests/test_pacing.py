"""A paced relay: in front of a broker that forgets, it goes no faster than the database stores."""

from __future__ import annotations

import dataclasses

import psycopg
import pytest
import redis as redis_client
from confluent_kafka import Message

from server.config import Settings
from server.embedded import RedisServer
from server.keys import Keys
from sync import relay as relay_module
from sync.persister import Persister
from sync.relay import Relay, _Owed
from tests.services import KafkaBroker, wait_until
from tests.sync_parts import add_entries, migrated, running

pytestmark = [pytest.mark.redis, pytest.mark.kafka, pytest.mark.postgres]

ENTRIES = 200
AHEAD_BYTES = 10_000


@pytest.fixture
def settings(
    redis: redis_client.Redis,
    redis_server: RedisServer,
    kafka_broker: KafkaBroker,
    kafka_topic: str,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> Settings:
    monkeypatch.setattr(relay_module, "SILENT_AFTER_S", 0.3)
    monkeypatch.setattr(relay_module, "DRAIN_WITHIN_S", 0.3)
    redis.hset(Keys().ready, mapping={"epoch": 1, "run_id": redis.info("server")["run_id"]})
    made = migrated(kafka_broker, kafka_topic, database_url, partitions=3)
    return dataclasses.replace(
        made, redis_host=redis_server.host, redis_port=redis_server.port, relay_ahead_bytes=AHEAD_BYTES
    )


def stored(settings: Settings) -> int:
    """How many events the database has."""
    with psycopg.connect(settings.database_url) as connection:
        row = connection.execute("SELECT count(*) FROM score_events").fetchone()
    return row[0] if row else 0


def test_relay_waits_for_the_database_and_keeps_what_is_not_stored(
    redis: redis_client.Redis, settings: Settings
) -> None:
    expected = add_entries(redis, ENTRIES)
    with running(Relay, settings) as relay:
        wait_until(lambda: relay.persister_outage.goes_on, message="it did not wait for the persister")
        # An event counts as at least 150 bytes, and an entry of 10 is not divided.
        assert 0 < relay.relayed_events <= AHEAD_BYTES / 150 + 10
        assert redis.xlen("outbox") == ENTRIES, "something left Redis before it was stored"
        assert relay.oldest_entry == redis.xrange("outbox", count=1)[0][0].decode()
        assert not relay.kafka_outage.goes_on
        with running(Persister, settings):
            wait_until(lambda: redis.xlen("outbox") == 0, 60, "it did not go on")
        assert not relay.persister_outage.goes_on
        assert relay.relayed_events == len(expected)
    assert stored(settings) == len(expected)


def test_relay_that_begins_waits_for_what_another_left_in_the_broker(
    redis: redis_client.Redis, settings: Settings
) -> None:
    expected = add_entries(redis, ENTRIES)
    with running(Relay, settings) as first:
        wait_until(lambda: first.persister_outage.goes_on)
    with running(Relay, settings) as second:
        wait_until(lambda: second.oldest_entry is not None, message="it does not tell what waits")
        assert second.relayed_events == 0, "two relays one after the other fill a broker twice as much"
        with running(Persister, settings):
            wait_until(lambda: redis.xlen("outbox") == 0, 60)
    assert stored(settings) == len(expected)


def test_relay_waits_through_the_outage_of_the_database(redis: redis_client.Redis, settings: Settings) -> None:
    away = dataclasses.replace(settings, database_url="postgresql://127.0.0.1:1/none")
    add_entries(redis, ENTRIES)
    with running(Relay, away) as relay:
        wait_until(lambda: relay.persister_outage.goes_on)
        assert relay.relayed_events < ENTRIES * 10
        assert redis.xlen("outbox") == ENTRIES


def test_record_that_kafka_has_at_an_unknown_place_ends_the_turn() -> None:
    owed = _Owed("1-0", 2)
    owed.placed(None, Message(topic="t", partition=1, offset=7))
    owed.placed(None, Message(topic="t", partition=1))
    assert owed.offsets == {1: 7}
    assert owed.unconfirmed == 1
    assert owed.error is not None
