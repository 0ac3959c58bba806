"""Connections to the database that fall silent: each part notices, goes on over another, and can be stopped."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
import redis as redis_client

from server import check, database
from server.config import Settings
from server.database import Database
from server.embedded import RedisServer
from server.errors import NotReady
from server.keys import Keys
from server.postgres import Unanswered
from sync import session, store
from sync.persister import Persister
from sync.reconcile import Reconciliation
from sync.store import Store, migrate
from sync.waiting import Stop, Stopped
from tests.client import store_scores
from tests.services import KafkaBroker, SyncProcess, wait_until
from tests.silent_proxy import SilentProxy, silent_proxy
from tests.sync_parts import environment_of, event, migrated, put_records, running

pytestmark = pytest.mark.postgres


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No statement gets more than a moment."""
    for module in (session, check):
        monkeypatch.setattr(module, "ANSWER_WITHIN_S", 0.5)
    monkeypatch.setattr(session, "RETRY_WITHIN_S", 0.1)
    monkeypatch.setattr(database, "STEP_TIMEOUT_S", 0.5)


@pytest.fixture
def between(database_url: str) -> Iterator[tuple[SilentProxy, str]]:
    """A database that has the tables, the proxy before it, and the URL that leads through."""
    migrate(database_url)
    with silent_proxy(database_url) as (proxy, url):
        yield proxy, url


@pytest.fixture
def proxy(between: tuple[SilentProxy, str]) -> SilentProxy:
    return between[0]


@pytest.fixture
def url(between: tuple[SilentProxy, str]) -> str:
    return between[1]


@pytest.fixture
def settings(kafka_broker: KafkaBroker, kafka_topic: str, database_url: str, url: str) -> Settings:
    direct = migrated(kafka_broker, kafka_topic, database_url, partitions=3)
    return dataclasses.replace(direct, database_url=url)


@pytest.mark.kafka
@pytest.mark.usefixtures("impatient")
def test_persister_goes_on_over_another_connection(settings: Settings, proxy: SilentProxy) -> None:
    with running(Persister, settings) as part:
        put_records(settings, [event("ann", 1000)])
        wait_until(lambda: part.persisted_events == 1)
        proxy.swallow()
        put_records(settings, [event("ann", 2000 + i, score=i) for i in range(100)])
        wait_until(lambda: part.outages == 1)
        wait_until(lambda: part.persisted_events == 101)
        wait_until(lambda: not part.database_outage.goes_on)
        assert part.outages == 1


@pytest.mark.kafka
@pytest.mark.usefixtures("impatient")
def test_persister_goes_on_when_nobody_answered_for_a_while(
    settings: Settings, proxy: SilentProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGCONNECT_TIMEOUT", "2")
    with running(Persister, settings) as part:
        put_records(settings, [event("ann", 1000)])
        wait_until(lambda: part.persisted_events == 1)
        proxy.swallow(new_ones=True)  # so that a request to cancel is lost as well
        put_records(settings, [event("ann", 2000)])
        wait_until(lambda: part.database_outage.goes_on)
        proxy.wake()
        wait_until(lambda: part.persisted_events == 2, 20)
        assert part.outages == 1


@pytest.mark.kafka
def test_persister_that_waits_for_an_answer_shares_its_partitions(
    settings: Settings, proxy: SilentProxy, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patient:
        patient.setattr(session, "ANSWER_WITHIN_S", 600.0)
        with running(Persister, settings) as first:
            put_records(settings, [event("ann", 1000)])
            wait_until(lambda: first.persisted_events == 1)
            proxy.swallow()
            put_records(settings, [event(f"player{i}", 2000, score=i) for i in range(30)])
            wait_until(lambda: proxy.swallowed)
            with running(Persister, dataclasses.replace(settings, database_url=database_url)) as second:
                wait_until(lambda: second.persisted_events, 20)


@pytest.mark.kafka
def test_persister_that_waits_for_an_answer_is_stopped_at_once(
    settings: Settings, proxy: SilentProxy, database_url: str, tmp_path: Path
) -> None:
    process = SyncProcess(tmp_path, environment_of(settings), "persister")
    process.start()
    try:
        put_records(settings, [event("ann", 1000)])
        with psycopg.connect(database_url, autocommit=True) as direct:
            wait_until(lambda: direct.execute("SELECT FROM scores").fetchone() is not None, 20)
        proxy.swallow(new_ones=True)
        put_records(settings, [event("ann", 2000)])
        wait_until(lambda: proxy.swallowed)
        process.ask_to_stop()
        assert process.wait(5) == 0
    finally:
        process.stop()


@pytest.mark.kafka
def test_persister_that_cannot_connect_is_stopped_at_once(
    settings: Settings, proxy: SilentProxy, tmp_path: Path
) -> None:
    proxy.swallow(new_ones=True)
    # Longer than the test waits: it is not the end of this that lets the process go.
    patient = environment_of(settings) | {"PGCONNECT_TIMEOUT": "60"}
    process = SyncProcess(tmp_path, patient, "persister")
    process.start()
    try:
        wait_until(lambda: proxy.swallowed, 20)
        process.ask_to_stop()
        assert process.wait(5) == 0
    finally:
        process.stop()


@pytest.mark.usefixtures("impatient")
def test_time_out_is_told_at_once_and_doubles_the_next_time(proxy: SilentProxy, url: str) -> None:
    writing = Store(url)
    with pytest.raises(Unanswered, match=r"did not answer within 0\.5 s"):
        swallowed_at(proxy, b"FROM consumer_offsets", lambda: writing.offsets("t"))
    with pytest.raises(Unanswered, match="did not answer within 1 s"):
        swallowed_at(proxy, b"FROM consumer_offsets", lambda: writing.offsets("t"))
    assert writing.offsets("t") == {}
    with pytest.raises(Unanswered, match=r"did not answer within 0\.5 s"):
        swallowed_at(proxy, b"S", lambda: writing.offsets("t"))
    writing.close()


def swallowed_at(proxy: SilentProxy, text: bytes, work: Callable[[], object]) -> None:
    proxy.swallow_at = text
    work()


@pytest.mark.usefixtures("impatient")
def test_slow_statement_is_cancelled_in_the_database_too(url: str, database_url: str) -> None:
    writing = Store(url)
    with psycopg.connect(database_url) as direct:
        direct.execute("LOCK scores")
        with pytest.raises(Unanswered):
            writing.persist([event("ann", 1000)], "t", "id", {0: 1})
        waits = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        wait_until(lambda: direct.execute(waits).fetchone() is None)
    assert writing.persist([event("ann", 1000)], "t", "id", {0: 1}).new_events == 1
    writing.close()


@pytest.mark.usefixtures("impatient")
def test_migration_that_falls_silent_is_given_up(proxy: SilentProxy, url: str, database_url: str) -> None:
    with pytest.raises(Unanswered):
        swallowed_at(proxy, b"pg_advisory_xact_lock", lambda: migrate(url))
    with psycopg.connect(database_url, autocommit=True) as direct:
        # What the database hears no more of must not hold the lock of all migrations for ever.
        limits = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE state = 'idle in transaction'"
        direct.execute(f"{limits} AND datname = current_database()")
    migrate(url)


@pytest.mark.usefixtures("impatient")
def test_migration_takes_as_long_as_the_database_works_on_it(
    url: str, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, is_active = [], store._is_active

    def counted(database_url: str, backend: int | None) -> bool:
        looked.append(is_active(database_url, backend))
        return looked[-1]

    monkeypatch.setattr(store, "_is_active", counted)
    migrating = threading.Thread(target=migrate, args=(url,))
    with psycopg.connect(database_url) as direct:
        direct.execute("SELECT pg_advisory_xact_lock(7203001)")
        migrating.start()
        wait_until(lambda: len(looked) >= 3)
    migrating.join(10)
    assert not migrating.is_alive()
    assert all(looked)


def test_migration_ends_when_it_is_asked_to_stop(database_url: str) -> None:
    stop = Stop()
    with psycopg.connect(database_url) as direct:
        direct.execute("SELECT pg_advisory_xact_lock(7203001)")
        threading.Timer(0.2, stop.request).start()
        with pytest.raises(Stopped):
            migrate(database_url, meanwhile=stop.heed)


def test_server_reads_a_top_over_another_connection(proxy: SilentProxy, url: str, database_url: str) -> None:
    store_scores(database_url, ("main", "ann", 7))

    async def read() -> None:
        reading = Database(url, 0.5)
        await reading.open()
        assert await reading.top("main", 10) == [("ann", 7)]
        proxy.swallow()
        reading._tops.clear()  # they serve for a second
        with pytest.raises((TimeoutError, psycopg.OperationalError)):
            await reading.top("main", 10)
        async with asyncio.timeout(10):
            while True:
                try:
                    assert await reading.top("main", 10) == [("ann", 7)]
                    break
                except (TimeoutError, psycopg.OperationalError):
                    continue
        await reading.close()

    asyncio.run(read())


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("swallowed", [b"FROM consumer_offsets", b"FROM scores", b"FETCH FORWARD"])
def test_snapshot_that_falls_silent_is_not_waited_for(proxy: SilentProxy, url: str, swallowed: bytes) -> None:
    async def read() -> None:
        async with Database(url).snapshot() as snapshot:
            proxy.swallow_at = swallowed
            await snapshot.offsets("t")
            async for _ in snapshot.scores():
                pass

    async def within() -> None:
        async with asyncio.timeout(10):
            await read()

    with pytest.raises(NotReady, match="the database does not answer in time"):
        asyncio.run(within())


@pytest.mark.usefixtures("impatient")
def test_check_says_that_no_answer_comes(proxy: SilentProxy, url: str) -> None:
    proxy.swallow_at = b"pg_extension"
    *_, last = check.look_at("PostgreSQL", Settings(database_url=url))
    assert (last.state, last.found) == (check.State.FAIL, "the database did not answer within 0.5 s")


@pytest.mark.redis
@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("stopped", [False, True])
def test_reconcile_does_not_wait_for_ever(
    proxy: SilentProxy, url: str, redis_server: RedisServer, redis: redis_client.Redis, *, stopped: bool
) -> None:
    redis.hset(Keys().ready, mapping={"epoch": "1", "run_id": "any"})
    settings = Settings(redis_host=redis_server.host, redis_port=redis_server.port, database_url=url)
    stop = Stop()
    reconciliation = Reconciliation(settings, stop, print)
    proxy.swallow_at = b"FROM scores"
    if stopped:
        threading.Timer(0.1, stop.request).start()
    with pytest.raises(Exception, match="stopped midway" if stopped else "the database did not answer"):
        reconciliation.run(repair=False)
    reconciliation.close()
