"""`scoreboard check` says what is wrong and what to do, writes nothing, and prints no secret."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
import redis as redis_client
from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]

from server.check import Finding, State, check_files, judge_redis, look_at
from server.config import Settings, load
from server.embedded import ADDRESS, PostgresServer, RedisServer, free_port
from sync.store import migrate
from sync.topics import ensure_topics
from tests.client import connect
from tests.databases import database_of
from tests.services import JWT_SECRET, ROOT, KafkaBroker, environment, wait_until

HEALTHY = {
    "redis_version": "7.2.4",
    "role": "master",
    "loading": "0",
    "maxmemory_policy": "noeviction",
    "aof_enabled": "1",
    "aof_last_write_status": "ok",
}


def bad(findings: Iterator[Finding]) -> list[tuple[State, str]]:
    return [(finding.state, finding.found) for finding in findings if finding.state != State.OK]


def check(**settings: str) -> tuple[int, str]:
    """The command's exit status and table."""
    argv = [sys.executable, "-m", "server", "check"]
    done = subprocess.run(
        argv, env=environment(settings), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def rows(table: str, part: str) -> list[str]:
    """(state and found) of the table's rows about one part."""
    lines = [line for line in table.splitlines() if line[6:].startswith(f"{part} ")]
    return [f"{line[:6].strip()} {line[18:]}" for line in lines]


def test_healthy_redis_has_nothing_to_change() -> None:
    assert bad(judge_redis(HEALTHY, "redis:6379")) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"redis_version": "6.2.14"}, (State.FAIL, "redis:6379: version 6.2.14")),
        ({"role": "slave", "master_host": "one", "master_port": "6379"}, (State.FAIL, "it is a replica")),
        ({"loading": "1"}, (State.WARN, "it is still loading its data")),
        ({"maxmemory_policy": "allkeys-lru"}, (State.FAIL, "maxmemory-policy allkeys-lru: scores may be evicted")),
        ({"aof_enabled": "0"}, (State.WARN, "no append-only file")),
        (
            {"cluster_enabled": "1"},
            (
                State.FAIL,
                "redis:6379: REDIS_CLUSTER=0: expected a Redis without cluster mode, got a node of a Redis Cluster",
            ),
        ),
        ({"aof_last_write_status": "err"}, (State.FAIL, "the append-only file cannot be written")),
    ],
)
def test_redis_that_cannot_be_relied_on_is_named(change: dict[str, str], expected: tuple[State, str]) -> None:
    assert bad(judge_redis(HEALTHY | change, "redis:6379")) == [expected]


def test_too_few_files_for_the_websockets_is_a_warning() -> None:
    (finding,) = check_files(Settings(live_max_connections=10_000_000))
    assert (finding.state, finding.advice.partition(",")[0]) == (State.WARN, "raise the limit to 10001100")
    assert bad(check_files(Settings(live_max_connections=0))) == []


def test_all_wrong_variables_are_rows_and_nothing_is_connected_to() -> None:
    status, table = check(BOARDS="Main", KAFKA_BROKERS="kafka", DATABASE_URL="sesame://x")
    assert status == 1
    assert [row.partition(":")[0] for row in rows(table, "settings")] == [
        "FAIL BOARDS",
        "FAIL KAFKA_BROKERS",
        "FAIL DATABASE_URL",
    ]
    assert "sesame" not in table
    assert rows(table, "Redis") == []


def test_what_cannot_be_reached_is_said_with_its_variable() -> None:
    status, table = check(
        JWT_ALGORITHMS="RS256",
        REDIS_PORT=str(free_port()),
        REDIS_PASSWORD="sesame",
        KAFKA_BROKERS=f"{ADDRESS}:{free_port()}",
        DATABASE_URL=f"postgresql://ann:sesame@{ADDRESS}:{free_port()}/scores",
    )
    assert status == 1
    for part, variable in (
        ("settings", "JWT_PUBLIC_KEY"),
        ("Redis", "REDIS_HOST"),
        ("Kafka", "KAFKA_BROKERS"),
        ("PostgreSQL", "DATABASE_URL"),
    ):
        (row,) = rows(table, part)
        assert row.startswith("FAIL ")
        assert variable in row
    assert "sesame" not in table
    assert JWT_SECRET not in table


@pytest.mark.redis
def test_real_redis_with_the_wrong_policy_and_password_fails(fresh_redis: Callable[..., RedisServer]) -> None:
    server = fresh_redis(maxmemory_policy="allkeys-lru", appendonly="no")
    here = {"REDIS_PORT": str(server.port)}
    assert bad(look_at("Redis", load(here))) == [
        (State.FAIL, "maxmemory-policy allkeys-lru: scores may be evicted"),
        (State.WARN, "no append-only file"),
    ]
    with connect(server) as client:
        client.config_set("requirepass", "sesame")
    for password, expected in (("", "NOAUTH"), ("other", "WRONGPASS")):
        ((state, found),) = bad(look_at("Redis", load({**here, "REDIS_PASSWORD": password})))
        assert (state, found.split()[0]) == (State.FAIL, expected)
        assert "other" not in found


@pytest.mark.redis
@pytest.mark.kafka
@pytest.mark.postgres
def test_before_migration_it_fails_after_it_all_is_well_and_it_writes_nothing(
    redis_server: RedisServer,
    redis: redis_client.Redis,
    kafka_broker: KafkaBroker,
    kafka_topic: str,
    database_url: str,
) -> None:
    environ = {
        "REDIS_HOST": redis_server.host,
        "REDIS_PORT": str(redis_server.port),
        "KAFKA_BROKERS": kafka_broker.brokers,
        "KAFKA_TOPIC": kafka_topic,
        "DATABASE_URL": database_url,
        "LIVE_MAX_CONNECTIONS": "100",
    }
    status, table = check(**environ)
    assert status == 1
    assert [row.partition(" →")[0] for row in rows(table, "Kafka")] == [
        "ok 1 broker(s)",
        f"FAIL no topic {kafka_topic}",
        f"FAIL no topic {kafka_topic}.dead-letter",
    ]
    assert any(row.startswith("FAIL no table scores, score_events") for row in rows(table, "PostgreSQL"))
    assert "run `scoreboard migrate`" in table
    assert kafka_topic not in AdminClient({"bootstrap.servers": kafka_broker.brokers}).list_topics(timeout=10).topics
    assert tables(database_url) == []

    ensure_topics(load(environ))
    migrate(database_url)
    status, table = check(**environ)
    assert status == 0, table
    assert [line for line in table.splitlines() if not line.startswith("ok ")] == []
    assert redis.dbsize() == 0


def tables(database_url: str) -> list[Any]:
    with psycopg.connect(database_url) as connection:
        return connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()


@pytest.mark.kafka
def test_topics_that_differ_from_the_settings_are_warned_of(kafka_broker: KafkaBroker, kafka_topic: str) -> None:
    environ = {"KAFKA_BROKERS": kafka_broker.brokers, "KAFKA_TOPIC": kafka_topic}
    ensure_topics(load({**environ, "KAFKA_PARTITIONS": "2", "KAFKA_RETENTION_HOURS": "24"}))
    assert bad(look_at("Kafka", load({**environ, "KAFKA_PARTITIONS": "2", "KAFKA_RETENTION_HOURS": "24"}))) == []
    assert bad(look_at("Kafka", load({**environ, "KAFKA_PARTITIONS": "4", "KAFKA_RETENTION_HOURS": "48"}))) == [
        (State.WARN, f"{kafka_topic}: 2 partition(s), each on 1 broker(s)"),
        (State.WARN, f"{kafka_topic}: keeps records for 24 h"),
    ]
    three = bad(look_at("Kafka", load({**environ, "KAFKA_PARTITIONS": "2", "KAFKA_REPLICATION": "3"})))
    assert (State.WARN, f"{kafka_topic}: 2 partition(s), each on 1 broker(s)") in three


@pytest.mark.kafka
def test_topics_that_bound_the_time_of_records_are_warned_of(kafka_broker: KafkaBroker, kafka_topic: str) -> None:
    environ = {"KAFKA_BROKERS": kafka_broker.brokers, "KAFKA_TOPIC": kafka_topic}
    admin, letters = AdminClient({"bootstrap.servers": kafka_broker.brokers}), f"{kafka_topic}.dead-letter"
    for future in admin.create_topics([NewTopic(kafka_topic, 8), NewTopic(letters, 1)]).values():
        future.result(10)
    may_refuse = "may refuse records while a clock is ahead, or change their time"
    found = list(look_at("Kafka", load(environ)))
    warned = {finding.found: finding.advice for finding in found if may_refuse in finding.found}
    assert list(warned) == [f"{name}: {may_refuse}" for name in (kafka_topic, letters)]
    assert all("message.timestamp.after.max.ms=9223372036854775807" in advice for advice in warned.values())
    ensure_topics(load(environ))
    well = [(State.OK, f"{name}: takes records of any time") for name in (kafka_topic, letters)]
    wait_until(
        lambda: (
            [(each.state, each.found) for each in look_at("Kafka", load(environ)) if "any time" in each.found] == well
        )
    )


@pytest.mark.postgres
def test_database_without_timescale_is_fine(postgres_server: PostgresServer, database_url: str) -> None:
    migrate(database_url)
    assert bad(look_at("PostgreSQL", load({"DATABASE_URL": database_url}))) == []


@pytest.mark.postgres
def test_database_that_cannot_hold_every_name_fails(postgres_server: PostgresServer) -> None:
    with database_of(postgres_server, "SQL_ASCII") as url:
        ((state, found),) = bad(look_at("PostgreSQL", load({"DATABASE_URL": url})))
    assert state == State.FAIL
    assert "expected the encoding UTF8, which holds every name, got SQL_ASCII" in found


@pytest.mark.postgres
def test_keys_in_the_order_of_the_database_are_warned_of(database_url: str) -> None:
    migrate(database_url)
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute('ALTER TABLE scores ALTER board TYPE text COLLATE "default"')
    assert bad(look_at("PostgreSQL", load({"DATABASE_URL": database_url}))) == [
        (State.WARN, "scores: keys in the database's own order")
    ]


@pytest.mark.timescale
def test_edition_of_timescale_is_said(timescale_url: str) -> None:
    migrate(timescale_url)
    findings = list(look_at("PostgreSQL", load({"DATABASE_URL": timescale_url})))
    assert any(
        finding.found.startswith("TimescaleDB 2") and finding.found.endswith("Apache-only edition")
        for finding in findings
    )
