"""Encrypted connections and logins, for real: Redis, Kafka and PostgreSQL as strict as they can be made.

And three brokers of which one is killed, since those that log their clients in are rarely alone.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hiredis
import psycopg
import pytest
import redis as redis_client
import uvloop
from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import AdminClient
from psycopg import sql
from redis.backoff import NoBackoff
from redis.retry import Retry
from websockets.sync.client import connect as watch

from server.config import Settings, load
from server.database import Database
from server.embedded import ADDRESS, RedisServer, Service, ServiceError, free_port
from server.errors import ConfigError
from server.kafka_clients import is_refusal, reason_of, refusal
from server.redis_connection import open_connection
from sync import outbox
from sync.store import Store, migrate
from tests.client import board, post, post_body, store_scores, token, wait_until_writable
from tests.services import (
    ROOT,
    KafkaCluster,
    ServerProcess,
    SyncProcess,
    UnavailableError,
    environment,
    wait_until,
)
from tests.sync_parts import environment_of, records_of
from tests.timescale import TimescaleServer
from tests.tls import Authority, Certificate, TlsFront

PASSWORD = "sesame-redis"
KAFKA_PASSWORD = "sesame-kafka"
ACL = (ROOT / "ops/redis-acl.conf").read_text()
LOGIN = {"KAFKA_SECURITY_PROTOCOL": "sasl_ssl", "KAFKA_SASL_USERNAME": "ann", "KAFKA_SASL_PASSWORD": "sesame"}


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"), "ours")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """An authority that nobody trusts."""
    return Authority(tmp_path_factory.mktemp("foreign"), "foreign")


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("environ", "fault"),
    [
        ({"REDIS_TLS_CA_FILE": __file__}, "REDIS_TLS_CA_FILE: expected REDIS_TLS=1 beside it"),
        ({"REDIS_TLS": "1", "REDIS_TLS_CA_FILE": "/no/such"}, "REDIS_TLS_CA_FILE: expected a file that can be read"),
        ({"REDIS_TLS": "1", "REDIS_TLS_CERT_FILE": __file__}, "REDIS_TLS_CERT_FILE, REDIS_TLS_KEY_FILE: expected both"),
        ({"REDIS_USERNAME": "ann"}, "REDIS_USERNAME: expected REDIS_PASSWORD beside it"),
        ({"REDIS_PASSWORD_FILE": "/no/such"}, "REDIS_PASSWORD_FILE: expected a file with a password"),
        ({"KAFKA_SSL_CA_FILE": __file__}, "KAFKA_SSL_CA_FILE: expected KAFKA_SECURITY_PROTOCOL=ssl"),
        ({"KAFKA_SASL_PASSWORD": "sesame"}, "KAFKA_SASL_USERNAME, KAFKA_SASL_PASSWORD: expected KAFKA_SECURITY_PROTO"),
        ({**LOGIN, "KAFKA_SASL_PASSWORD": ""}, "KAFKA_SECURITY_PROTOCOL: expected KAFKA_SASL_USERNAME and KAFKA_SASL"),
        ({"KAFKA_SECURITY_PROTOCOL": "tls"}, "KAFKA_SECURITY_PROTOCOL: expected one of plaintext, ssl"),
        ({"DATABASE_URL": "postgresql//ann:sesame@db/scoreboard"}, "DATABASE_URL: expected a URL such as postgresql:"),
        ({"DATABASE_URL": "postgresql://ann:sesame%zz@db/scoreboard"}, "DATABASE_URL: expected a URL such as postgres"),
    ],
)
def test_protection_that_would_not_protect_is_refused_by_name(environ: dict[str, str], fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(environ)
    (line,) = str(caught.value).split("\n")
    assert line.startswith(fault)
    assert "sesame" not in line


def test_secrets_are_in_no_description_of_the_settings(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text("sesame1\n")
    url = "postgresql://ann:sesame2@db/scoreboard?sslmode=verify-full"
    settings = load({**LOGIN, "REDIS_PASSWORD_FILE": str(path), "DATABASE_URL": url})
    assert (settings.redis_password, settings.kafka_sasl_password) == ("sesame1", "sesame")
    assert settings.database_url == url
    assert "sesame" not in repr(settings) + str(settings)


@pytest.mark.parametrize(
    ("error", "variable"),
    [
        (KafkaError(KafkaError._AUTHENTICATION, "Invalid username or password"), "KAFKA_SASL_PASSWORD"),
        (KafkaError(KafkaError._SSL, "certificate verify failed"), "KAFKA_SSL_CA_FILE"),
        (KafkaError(KafkaError._TRANSPORT, "incorrect security.protocol configuration"), "KAFKA_SECURITY_PROTOCOL"),
        (KafkaError(KafkaError.TOPIC_AUTHORIZATION_FAILED, "denied"), "ACLs"),
        (KafkaError(KafkaError.INVALID_RECORD, "failed to validate record"), "scoreboard migrate"),
    ],
)
def test_refusal_names_what_to_look_at(error: KafkaError, variable: str) -> None:
    named = refusal(error)
    assert named is not None
    assert variable in named.str()
    assert error.str() in named.str()
    assert named.code() == error.code()
    assert is_refusal(KafkaException(named))
    assert variable in reason_of(error)


def test_answer_of_brokers_is_a_refusal_and_named_without_addresses() -> None:
    error = KafkaError(KafkaError.POLICY_VIOLATION, "127.0.0.1:9092: no")
    assert is_refusal(error)
    assert reason_of(error) == "Kafka refuses: Broker: Policy violation"
    away = KafkaError(KafkaError._TRANSPORT, "127.0.0.1:9092: Connection refused")
    assert not is_refusal(away)
    assert reason_of(away) == "Kafka does not answer"


def test_broker_that_is_away_refuses_nobody() -> None:
    assert refusal(KafkaError(KafkaError._TRANSPORT, "Connection refused")) is None
    assert refusal(KafkaError(KafkaError._ALL_BROKERS_DOWN, "3/3 brokers are down")) is None


# ---------------------------------------------------------------------- Redis


class StrictRedis(RedisServer):
    """Redis that knows one user, with the rights of ops/redis-acl.conf, and an `admin` for the test."""

    def __init__(self, data: Path, **options: str) -> None:
        rules = data.with_suffix(".conf")
        rules.write_text(f"{ACL.rstrip()} >{PASSWORD}\nuser admin on >admin ~* &* +@all\n")
        super().__init__(data, options={"include": str(rules), **options})

    def answers(self) -> bool:
        """Whether the admin can log in."""
        try:
            return self.admin().info("server")["process_id"] == self.pid
        except redis_client.ConnectionError:
            return False

    def admin(self) -> redis_client.Redis:
        return redis_client.Redis(host=self.host, port=self.port, username="admin", password="admin")


@pytest.fixture(scope="module")
def strict_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StrictRedis]:
    server = StrictRedis(tmp_path_factory.mktemp("redis") / "data")
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def tls_redis(strict_redis: StrictRedis, authority: Authority) -> Iterator[Settings]:
    """Settings that lead to `strict_redis` by TLS, where both sides show a certificate."""
    with TlsFront(strict_redis.port, authority.issue("localhost"), clients=authority.file) as front:
        yield tls_settings(front.port, authority, authority.issue("scoreboard"))


def tls_settings(port: int, authority: Authority, own: Certificate) -> Settings:
    return Settings(
        redis_host="localhost",
        redis_port=port,
        redis_username="scoreboard",
        redis_password=PASSWORD,
        redis_tls=1,
        redis_tls_ca_file=str(authority.file),
        redis_tls_cert_file=str(own.cert),
        redis_tls_key_file=str(own.key),
    )


def server_pings(settings: Settings) -> bytes:
    """What Redis says to the server's connection, on the server's kind of loop."""

    async def ping() -> bytes:
        connection = await open_connection(settings, lambda _: None)
        answer: bytes = await connection.execute("EXISTS", "leaderboard")
        connection.close()
        await asyncio.sleep(0)
        return answer

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(ping())


def sync_pings(settings: Settings) -> Any:
    with outbox.connect(settings) as client:
        client.set_retry(Retry(NoBackoff(), 0))  # else what is refused is tried for seconds
        return client.exists("leaderboard")


@pytest.mark.redis
def test_server_and_sync_reach_redis_through_tls(tls_redis: Settings) -> None:
    assert server_pings(tls_redis) == sync_pings(tls_redis) == 0


@pytest.mark.redis
def test_redis_with_a_foreign_certificate_is_refused(tls_redis: Settings, foreign: Authority) -> None:
    settings = dataclasses.replace(tls_redis, redis_tls_ca_file=str(foreign.file))
    with pytest.raises(ssl.SSLCertVerificationError, match="certificate verify failed"):
        server_pings(settings)
    with pytest.raises(redis_client.ConnectionError, match="certificate verify failed"):
        sync_pings(settings)


@pytest.mark.redis
def test_redis_of_another_name_is_refused(tls_redis: Settings) -> None:
    settings = dataclasses.replace(tls_redis, redis_host=ADDRESS)
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        server_pings(settings)
    with pytest.raises(redis_client.ConnectionError, match="mismatch"):
        sync_pings(settings)


@pytest.mark.redis
def test_redis_that_asks_for_a_certificate_gets_one_or_hangs_up(tls_redis: Settings) -> None:
    settings = dataclasses.replace(tls_redis, redis_tls_cert_file="", redis_tls_key_file="")
    with pytest.raises((OSError, hiredis.HiredisError)):
        server_pings(settings)
    with pytest.raises(redis_client.ConnectionError):
        sync_pings(settings)


@pytest.mark.redis
def test_wrong_password_is_called_one_and_not_shown(tls_redis: Settings) -> None:
    settings = dataclasses.replace(tls_redis, redis_password="sesame-wrong")
    with pytest.raises(hiredis.ReplyError, match="WRONGPASS") as by_server:
        server_pings(settings)
    with pytest.raises(redis_client.AuthenticationError, match="invalid username-password pair") as by_sync:
        sync_pings(settings)
    assert "sesame" not in f"{by_server.value} {by_sync.value}"


@pytest.mark.redis
def test_redis_that_speaks_tls_itself(tmp_path: Path, authority: Authority) -> None:
    certificate, port = authority.issue("localhost"), free_port()
    server = StrictRedis(
        tmp_path / "data",
        **{
            "tls-port": str(port),
            "tls-cert-file": str(certificate.cert),
            "tls-key-file": str(certificate.key),
            "tls-ca-cert-file": str(authority.file),
        },
    )
    try:
        server.start()
        settings = tls_settings(port, authority, authority.issue("scoreboard"))
        assert server_pings(settings) == sync_pings(settings) == 0
        with pytest.raises((OSError, hiredis.HiredisError)):
            server_pings(dataclasses.replace(settings, redis_tls_cert_file="", redis_tls_key_file=""))
    except ServiceError as error:
        if re.search("TLS support|Bad directive", str(error)):
            pytest.skip("this machine's Redis was built without TLS; the other tests put a front before it")
        raise
    finally:
        server.stop()


# ---------------------------------------------------------------------- Kafka


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[KafkaCluster]:
    """Three brokers for the tests of this file."""
    try:
        made = KafkaCluster(tmp_path_factory.mktemp("cluster"), KAFKA_PASSWORD, authority.issue(ADDRESS).both)
    except UnavailableError as error:
        pytest.skip(str(error))
    try:
        made.start()
        yield made
    finally:
        made.stop()


def login(cluster: KafkaCluster, authority: Authority, topic: str, **changes: Any) -> Settings:
    """Settings that log in to the cluster, over TLS."""
    settings = Settings(
        kafka_brokers=cluster.brokers,
        kafka_security_protocol="sasl_ssl",
        kafka_sasl_username=cluster.username,
        kafka_sasl_password=KAFKA_PASSWORD,
        kafka_ssl_ca_file=str(authority.file),
        kafka_topic=topic,
        kafka_replication=3,
    )
    return dataclasses.replace(settings, **changes)


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Callable[[Settings], tuple[ServerProcess, SyncProcess]]]:
    """Starts a server and a sync with these settings."""
    started: list[Service] = []

    def start(settings: Settings) -> tuple[ServerProcess, SyncProcess]:
        variables = environment_of(settings)
        server, sync = ServerProcess(tmp_path, variables), SyncProcess(tmp_path, variables)
        for process in (sync, server):
            started.append(process)
            process.start()
        return server, sync

    yield start
    for process in started:
        process.stop()


def log_of(service: Service) -> str:
    assert service.log
    return service.log.read_text()


def rows(settings: Settings, query: str) -> dict[str, int]:
    with psycopg.connect(settings.database_url) as connection:
        return {player: int(number) for player, number in connection.execute(query)}


def stored(settings: Settings) -> dict[str, int]:
    return rows(settings, "SELECT player_id, score FROM scores")


@pytest.mark.redis
@pytest.mark.kafka
@pytest.mark.postgres
def test_update_goes_all_the_way_by_tls_with_the_rights_of_the_acl_file_and_no_more(
    strict_redis: StrictRedis,
    tls_redis: Settings,
    cluster: KafkaCluster,
    authority: Authority,
    database_url: str,
    processes: Callable[[Settings], tuple[ServerProcess, SyncProcess]],
) -> None:
    migrate(database_url)
    store_scores(database_url, ("main", "bob", 3))
    redis = {name: getattr(tls_redis, name) for name in Settings.__slots__ if name.startswith("redis")}
    settings = login(cluster, authority, "strict", kafka_sasl_mechanism="PLAIN", database_url=database_url, **redis)
    admin = strict_redis.admin()
    admin.zadd("leaderboard", {"left over": 1})
    admin.acl_log_reset()
    admin.config_resetstat()
    server, sync = processes(settings)
    wait_until_writable(server)
    answer = post_body(
        server,
        b'{"playerId": "ann", "scoreDelta": 5}',
        **{"Authorization": f"Bearer {token('ann')}", "Idempotency-Key": "once"},
    )
    assert answer.status == 200, answer.body
    assert board(server) == {"ann": 5, "bob": 3}
    wait_until(lambda: stored(settings) == {"ann": 5, "bob": 3}, 30, "the score is not in the database")
    wait_until(lambda: admin.xlen("outbox") == 0, 10, "the outbox is not empty")
    wait_until(lambda: used(admin) >= {"memory|usage", "xtrim"}, 10, "the server did not look at the outbox")
    same = reconcile(settings)
    assert "2 players compared" in same.stdout, same
    assert "0 differ" in same.stdout
    admin.zadd("leaderboard", {"stray": 1})
    assert "1 differ" in reconcile(settings).stdout
    sync.stop()
    assert admin.acl_log() == [], "something was forbidden"
    assert granted() == used(admin) - {"auth", "config|resetstat", "acl|log"}
    assert not re.search(f"{PASSWORD}|{KAFKA_PASSWORD}", log_of(server) + log_of(sync) + str(same))


def reconcile(settings: Settings) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "server", "reconcile"]
    env = environment(environment_of(settings))
    return subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True, check=False)


def granted() -> set[str]:
    """The commands that ops/redis-acl.conf grants."""
    (line,) = re.findall("^user scoreboard .*", ACL, re.MULTILINE)
    return set(re.findall(r" \+(\S+)", line))


def used(admin: redis_client.Redis) -> set[str]:
    """The commands that were called, by whomever."""
    return {name.removeprefix("cmdstat_") for name in admin.info("commandstats")}


@pytest.mark.redis
@pytest.mark.kafka
def test_wrong_kafka_password_is_named_by_server_and_sync_and_not_shown(
    redis_server: RedisServer,
    redis: redis_client.Redis,
    cluster: KafkaCluster,
    authority: Authority,
    database_url: str,
    processes: Callable[[Settings], tuple[ServerProcess, SyncProcess]],
) -> None:
    server, sync = processes(
        login(
            cluster,
            authority,
            "refused",
            kafka_sasl_password="sesame-wrong",
            redis_host=redis_server.host,
            redis_port=redis_server.port,
            database_url=database_url,
        )
    )
    for process, beginning in ((server, "Redis at "), (server, "live updates"), (sync, "Kafka refuses")):
        line = re.compile(f"{beginning}.*KAFKA_SASL_PASSWORD.*[Aa]uthentication.*")
        wait_until(lambda line=line, process=process: line.search(log_of(process)), 30, f"{process.name}: no reason")
    assert "sesame" not in log_of(server) + log_of(sync)


@pytest.mark.redis
@pytest.mark.kafka
@pytest.mark.postgres
def test_one_of_three_brokers_is_killed_under_load_and_nothing_is_lost_or_late_for_good(
    redis_server: RedisServer,
    redis: redis_client.Redis,
    cluster: KafkaCluster,
    authority: Authority,
    database_url: str,
    processes: Callable[[Settings], tuple[ServerProcess, SyncProcess]],
) -> None:
    settings = login(
        cluster,
        authority,
        "replicated",
        redis_host=redis_server.host,
        redis_port=redis_server.port,
        database_url=database_url,
    )
    server, _ = processes(settings)
    wait_until_writable(server)
    acknowledged: dict[str, int] = {}
    done = threading.Event()

    def play() -> None:
        count = 1
        while not done.wait(0.005):
            player = f"player{count % 30}"
            if post(server, player, count, subject="game", scope="scores:write").status == 200:
                acknowledged[player] = acknowledged.get(player, 0) + count
            count += 1

    def history() -> dict[str, int]:
        return rows(settings, "SELECT player_id, sum(delta) FROM score_events GROUP BY 1")

    def stored_more_than(events: int) -> bool:
        return sum(rows(settings, "SELECT 'n', count(*) FROM score_events").values()) > events

    thread = threading.Thread(target=play)
    thread.start()
    victim = cluster.servers[0]
    try:
        wait_until(lambda: stored_more_than(100), 30, "updates did not begin to flow")
        victim.kill()
        accepted = sum(rows(settings, "SELECT 'n', count(*) FROM score_events").values())
        wait_until(lambda: stored_more_than(accepted + 200), 60, "updates did not go on with two brokers of three")
        assert not victim.running
        with watch(f"ws://{ADDRESS}:{server.port}/live-updates") as watcher:
            kinds = {json.loads(watcher.recv(20))["type"] for _ in range(20)}
        assert "scoreUpdate" in kinds
        victim.start()
        wait_until(lambda: in_sync(cluster, settings) == {3}, 60, "the broker did not catch up")
    finally:
        done.set()
        thread.join()
    assert sum(acknowledged.values())
    wait_until(lambda: stored(settings) == acknowledged, 30, "the database is not what was acknowledged")
    assert history() == acknowledged
    plain = dataclasses.replace(settings, kafka_brokers=cluster.plain_brokers)
    events = {(record.key(), record.value()) for record in records_of(plain) if record.key()}
    assert len(events) == sum(rows(settings, "SELECT 'n', count(*) FROM score_events").values())


def in_sync(cluster: KafkaCluster, settings: Settings) -> set[int]:
    """How many brokers have all that a partition holds: the numbers of all partitions."""
    admin = AdminClient({"bootstrap.servers": cluster.plain_brokers})
    asked = admin.describe_topics(TopicCollection([settings.kafka_topic]), request_timeout=10)
    return {len(partition.isr) for partition in asked[settings.kafka_topic].result().partitions}


# ---------------------------------------------------------------------- PostgreSQL


@pytest.fixture
def tls_database(timescale_server: TimescaleServer, timescale_url: str, authority: Authority) -> Iterator[str]:
    """A database on a server that has a certificate for 127.0.0.1, for as long as the test takes."""
    certificate = authority.issue(ADDRESS)
    with psycopg.connect(timescale_url, autocommit=True) as connection:
        for name, path in (("server.crt", certificate.cert), ("server.key", certificate.key)):
            lines = sql.Literal(path.read_text().splitlines())
            program = sql.Literal(f"umask 077; cat > {name}")  # in the data directory
            connection.execute(sql.SQL("COPY (SELECT unnest({}::text[])) TO PROGRAM {}").format(lines, program))
        try:
            switch_tls(connection, "SET ssl = on")
            yield timescale_url
        finally:
            switch_tls(connection, "RESET ssl")


def switch_tls(connection: psycopg.Connection[Any], change: str) -> None:
    connection.execute(f"ALTER SYSTEM {change}".encode())
    connection.execute("SELECT pg_reload_conf()")


def uses_tls(url: str) -> bool:
    with psycopg.connect(url) as connection:
        row = connection.execute("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()").fetchone()
    return bool(row and row[0])


@pytest.mark.timescale
def test_sslmode_of_the_url_counts_for_every_client(
    tls_database: str, authority: Authority, foreign: Authority
) -> None:
    verified = f"{tls_database}?sslmode=verify-full&sslrootcert={authority.file}"
    wait_until(lambda: uses_tls(f"{tls_database}?sslmode=prefer"), 10, "PostgreSQL does not offer TLS")
    migrate(verified)
    store = Store(verified)
    assert store.scores_of("main", ["ann"]) == {}
    store.close()
    assert asyncio.run(top(verified)) == []
    for refused in (
        f"{tls_database}?sslmode=verify-full&sslrootcert={foreign.file}",
        f"{verified.replace(ADDRESS, 'localhost')}&hostaddr={ADDRESS}",
    ):
        with pytest.raises(psycopg.OperationalError, match=r"certificate verify failed|does not match"):
            migrate(refused)
        with pytest.raises(psycopg.OperationalError, match=r"certificate verify failed|does not match"):
            Store(refused).scores_of("main", ["ann"])
        with pytest.raises((psycopg.Error, TimeoutError)):
            asyncio.run(top(refused))


async def top(url: str) -> list[tuple[str, int]]:
    """The board main as the server reads it."""
    database = Database(url)
    await database.open()
    try:
        return await database.top("main", 10)
    finally:
        await database.close()
