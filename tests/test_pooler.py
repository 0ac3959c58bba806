"""PgBouncer in transaction pooling: every command works through it, and nothing leans on a session of its own."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from subprocess import run

import psycopg
import pytest
import redis as redis_client

from server import check
from server.config import Settings
from server.database import Database
from server.embedded import PostgresServer, RedisServer
from sync.session import Session
from sync.store import CommitsLost, Store, migrate
from tests.client import board, post, wait_until_writable
from tests.pgbouncer import PgBouncer
from tests.services import ROOT, KafkaBroker, ServerProcess, SyncProcess, UnavailableError, environment, wait_until
from tests.sync_parts import event

pytestmark = pytest.mark.postgres


@pytest.fixture(scope="module")
def pooler(postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PgBouncer]:
    try:
        service = PgBouncer(tmp_path_factory.mktemp("pgbouncer"), postgres_server)
    except UnavailableError as error:
        pytest.skip(str(error))
    try:
        service.start()
        yield service
    finally:
        service.stop()


@pytest.fixture
def url(pooler: PgBouncer, database_url: str) -> str:
    """Through the pooler to an empty database."""
    return pooler.url_of(database_url.rpartition("/")[2])


def prepares(url: str) -> int | None:
    session = Session(url, "test")
    try:
        return session.run(lambda connection: connection.prepare_threshold)
    finally:
        session.close()


def test_statements_are_prepared_only_where_the_connection_is_direct(url: str, database_url: str) -> None:
    assert prepares(url) is None
    assert prepares(database_url) == 1


def test_writers_share_the_backends(url: str, database_url: str) -> None:
    migrate(url)
    failures: list[Exception] = []

    def write(player: str) -> None:
        store = Store(url)
        try:
            for number in range(50):
                store.persist([event(player, 1000 + number, score=number)], "t", "id", {0: number})
                assert store.scores_of("main", [player])[player].score == number
        except (psycopg.Error, AssertionError) as error:
            failures.append(error)
        finally:
            store.close()

    threads = [threading.Thread(target=write, args=(f"player{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    with psycopg.connect(database_url) as direct:
        assert direct.execute("SELECT count(*), sum(score) FROM scores").fetchone() == (4, 4 * 49)


def test_database_that_forgot_what_it_confirmed_is_found_out_behind_the_pooler(url: str, database_url: str) -> None:
    migrate(url)
    store = Store(url)
    store.persist([event("ann", 1000)], "t", "id", {0: 5})
    with psycopg.connect(database_url, autocommit=True) as direct:
        direct.execute("UPDATE consumer_offsets SET next_offset = 3")  # as of the host that takes over
        others = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        direct.execute(f"SELECT pg_terminate_backend(pid) {others}")  # the pooler's, which is idle: nobody else sees it
        wait_until(lambda: direct.execute(f"SELECT {others}").fetchone() is None)
        with pytest.raises(CommitsLost):
            store.persist([event("ann", 2000)], "t", "id", {0: 6})
        assert store.offsets("t")[0].next_offset == 3
    store.close()


def test_migration_leaves_no_setting_behind(url: str) -> None:
    migrate(url, history_days=7)
    with psycopg.connect(url) as next_in_turn:
        query = "SELECT nullif(current_setting('scoreboard.history_days', true), ''), current_setting('%s')"
        for setting, expected in (("client_min_messages", "notice"), ("idle_in_transaction_session_timeout", "0")):
            row = next_in_turn.execute(query.replace("%s", setting).encode()).fetchone()
            assert row == (None, expected)


def test_rebuild_reads_a_snapshot_while_others_write(url: str) -> None:
    migrate(url)
    store = Store(url)
    store.persist([event(f"player{number}", 1000) for number in range(5000)], "t", "id", {0: 1})

    async def read() -> int:
        players = 0
        async with Database(url).snapshot() as snapshot:
            assert await snapshot.boards() == ["main"]
            async for rows in snapshot.scores():
                players += len(rows)
                store.persist([event(f"later{players}", 2000)], "t", "id", {0: 2})
        return players

    assert asyncio.run(read()) == 5000
    store.close()


def test_check_finds_nothing_wrong(url: str) -> None:
    migrate(url)
    assert [found for found in check.look_at("PostgreSQL", Settings(database_url=url)) if found.state != "ok"] == []


@pytest.mark.redis
@pytest.mark.kafka
def test_every_command_works(
    url: str,
    redis_server: RedisServer,
    redis: redis_client.Redis,
    kafka_broker: KafkaBroker,
    kafka_topic: str,
    tmp_path: Path,
) -> None:
    settings = {
        "REDIS_HOST": redis_server.host,
        "REDIS_PORT": str(redis_server.port),
        "KAFKA_BROKERS": kafka_broker.brokers,
        "KAFKA_TOPIC": kafka_topic,
        "DATABASE_URL": url,
    }

    def scoreboard(*command: str) -> str:
        argv = [sys.executable, "-m", "server", *command]
        done = run(argv, env=environment(settings), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    scoreboard("migrate")
    server, sync = ServerProcess(tmp_path, settings), SyncProcess(tmp_path, settings)
    try:
        sync.start()
        server.start()
        wait_until_writable(server)
        for number in range(5):
            assert post(server, f"player{number}", 7).status == 200
        expected = {f"player{number}": 7 for number in range(5)}
        wait_until(lambda: "0 differ" in scoreboard("reconcile"), 30)
        redis.flushall()
        wait_until(lambda: board(server) == expected, 30)
        wait_until_writable(server)
        redis.set("player:player0:score", 9)
        redis.zadd("leaderboard", {"player0": 9})
        argv = [sys.executable, "-m", "server", "reconcile", "--repair"]
        done = run(argv, env=environment(settings), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert "1 differ, 1 repaired" in done.stdout, done.stdout + done.stderr
        assert "0 dead letters" in scoreboard("dead-letters")
        assert "FAIL" not in scoreboard("check")
    finally:
        server.stop()
        sync.stop()
