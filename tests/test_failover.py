"""A database on two hosts: the standby can be read, and when it takes over, sync follows and loses nothing."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import redis as redis_client

from server import check
from server.config import Settings
from server.database import Database
from server.embedded import ADDRESS, PostgresServer, RedisServer
from sync.persister import Persister
from sync.store import Store, migrate
from tests.client import board, wait_until_writable
from tests.services import KafkaBroker, ServerProcess, wait_until
from tests.sync_parts import environment_of, event, migrated, put_records, running

pytestmark = pytest.mark.postgres


class Standby(PostgresServer):
    """Follows a primary, from a copy of it."""

    def __init__(self, data: Path, primary: PostgresServer) -> None:
        super().__init__(data, options={"fsync": "off"})
        self._primary = primary

    def _make_cluster(self, binaries: Path) -> None:
        uid, gid = self.owner or (None, None)
        self.data.mkdir(mode=0o700)
        if self.owner:
            os.chown(self.data, *self.owner)
        argv = [str(binaries / "pg_basebackup"), "-D", "/proc/self/cwd", "-R", "-c", "fast", "--no-sync"]
        argv += ["-h", ADDRESS, "-p", str(self._primary.port), "-U", "postgres"]
        subprocess.run(argv, cwd=self.data, user=uid, group=gid, extra_groups=[] if uid else None, check=True)

    def promote(self) -> None:
        """Make it the primary."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute("SELECT pg_promote()")

    def has(self, player: str) -> bool:
        """Whether a player's score has come as far as here."""
        with psycopg.connect(self.url) as connection:
            return connection.execute("SELECT FROM scores WHERE player_id = %s", (player,)).fetchone() is not None


@pytest.fixture
def primary(tmp_path: Path) -> Iterator[PostgresServer]:
    server = PostgresServer(tmp_path / "primary", options={"fsync": "off"})
    try:
        server.start()
        migrate(server.url)
        yield server
    finally:
        server.stop()


@pytest.fixture
def standby(primary: PostgresServer, tmp_path: Path) -> Iterator[Standby]:
    server = Standby(tmp_path / "standby", primary)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def both(*servers: PostgresServer) -> str:
    """The URL that names them all, and wants the one that can be written to."""
    hosts = ",".join(f"{ADDRESS}:{server.port}" for server in servers)
    return f"postgresql://postgres@{hosts}/scoreboard?target_session_attrs=read-write"


def write(url: str, player: str) -> None:
    store = Store(url)
    store.persist([event(player, 1000, score=7)], "t", "id", {0: 1})
    store.close()


async def read(url: str) -> tuple[list[tuple[str, int]], set[int], list[str]]:
    database = Database(url)
    await database.open()
    try:
        async with database.snapshot() as snapshot:
            offsets = set(await snapshot.offsets("t"))
            players = [row[1] async for rows in snapshot.scores() for row in rows]
        return await database.top("main", 10), offsets, players
    finally:
        await database.close()


def test_standby_is_read_and_told_apart(primary: PostgresServer, standby: Standby) -> None:
    write(primary.url, "ann")
    wait_until(lambda: standby.has("ann"))
    assert asyncio.run(read(standby.url)) == ([("ann", 7)], {0}, ["ann"])
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        write(standby.url, "bob")
    found = [each for each in check.look_at("PostgreSQL", Settings(database_url=standby.url)) if each.state != "ok"]
    assert [(each.state, each.found) for each in found] == [(check.State.FAIL, "it is a read-only standby")]
    (advice,) = [each.advice for each in found]
    assert "target_session_attrs=read-write" in advice
    for url in (primary.url, both(standby, primary)):
        assert [each for each in check.look_at("PostgreSQL", Settings(database_url=url)) if each.state != "ok"] == []
    with psycopg.connect(primary.url, autocommit=True) as connection:
        connection.execute("ALTER DATABASE scoreboard SET default_transaction_read_only = on")
    (found_now,) = [each for each in check.look_at("PostgreSQL", Settings(database_url=primary.url)) if each.advice][
        -1:
    ]
    assert found_now.state == check.State.FAIL
    assert "default_transaction_read_only" in found_now.found


def test_whichever_host_can_be_written_to_is_found(primary: PostgresServer, standby: Standby) -> None:
    for url in (both(primary, standby), both(standby, primary)):
        migrate(url)
        write(url, "ann")
        assert asyncio.run(read(url))[0] == [("ann", 7)]
    wait_until(lambda: standby.has("ann"))
    assert asyncio.run(read(both(primary, standby).replace("read-write", "prefer-standby")))[0] == [("ann", 7)]


@pytest.mark.redis
@pytest.mark.kafka
def test_server_fills_redis_from_a_standby(
    primary: PostgresServer,
    standby: Standby,
    redis_server: RedisServer,
    redis: redis_client.Redis,
    kafka_broker: KafkaBroker,
    kafka_topic: str,
    tmp_path: Path,
) -> None:
    settings = migrated(kafka_broker, kafka_topic, primary.url, partitions=2)
    write(primary.url, "ann")
    wait_until(lambda: standby.has("ann"))
    here = {"DATABASE_URL": standby.url, "REDIS_HOST": redis_server.host, "REDIS_PORT": str(redis_server.port)}
    server = ServerProcess(tmp_path, environment_of(settings) | here)
    try:
        server.start()
        wait_until_writable(server)
        assert board(server) == {"ann": 7}
        assert redis.zscore("leaderboard", "ann") == 7
    finally:
        server.stop()


@pytest.mark.kafka
def test_persister_follows_to_the_host_that_takes_over_and_stores_again_what_was_lost(
    primary: PostgresServer, standby: Standby, kafka_broker: KafkaBroker, kafka_topic: str
) -> None:
    settings = migrated(kafka_broker, kafka_topic, both(primary, standby), partitions=2)
    with running(Persister, settings) as part:
        put_records(settings, [event(f"early{number}", 1000) for number in range(20)])
        wait_until(lambda: part.persisted_events == 20)
        wait_until(lambda: all(standby.has(f"early{number}") for number in range(20)))
        standby.stop()  # and so does not get what follows
        put_records(settings, [event(f"lost{number}", 2000) for number in range(20)])
        wait_until(lambda: part.persisted_events == 40)
        primary.kill()
        standby.start()
        put_records(settings, [event(f"late{number}", 3000) for number in range(20)])
        wait_until(lambda: part.outages == 1)
        standby.promote()
        names = [f"{when}{number}" for when in ("early", "lost", "late") for number in range(20)]
        wait_until(lambda: all(standby.has(name) for name in names), 20)
        wait_until(lambda: not part.database_outage.goes_on)
    with psycopg.connect(standby.url) as connection:
        assert connection.execute("SELECT count(*) FROM score_events").fetchone() == (60,)


@pytest.mark.kafka
def test_database_that_becomes_read_only_is_waited_for(
    database_url: str, kafka_broker: KafkaBroker, kafka_topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = migrated(kafka_broker, kafka_topic, database_url, partitions=2)
    name = database_url.rpartition("/")[2]
    with running(Persister, settings) as part, psycopg.connect(database_url, autocommit=True) as admin:
        put_records(settings, [event("ann", 1000)])
        wait_until(lambda: part.persisted_events == 1)
        admin.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE '%persister'")
        put_records(settings, [event("ann", 2000, score=2)])
        wait_until(lambda: "the database refuses, trying on: cannot execute" in caplog.text)
        admin.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
        wait_until(lambda: part.persisted_events == 2)
        assert part.outages == 1


@pytest.mark.kafka
def test_persister_leaves_a_host_that_became_read_only(
    primary: PostgresServer, standby: Standby, kafka_broker: KafkaBroker, kafka_topic: str
) -> None:
    settings = migrated(kafka_broker, kafka_topic, primary.url, partitions=2)
    settings = dataclasses.replace(settings, database_url=both(primary, standby))
    with running(Persister, settings) as part:
        put_records(settings, [event("ann", 1000)])
        wait_until(lambda: part.persisted_events == 1)
        wait_until(lambda: standby.has("ann"))
        with psycopg.connect(primary.url, autocommit=True) as admin:
            # As a managed service does that demotes it without ending the connections.
            admin.execute("ALTER SYSTEM SET default_transaction_read_only = on")
            admin.execute("SELECT pg_reload_conf()")
        standby.promote()
        put_records(settings, [event("bob", 2000)])
        wait_until(lambda: standby.has("bob"), 20)
        assert part.persisted_events == 2
