"""What every connection to the database has in common: the URL counts, the environment too, names are UTF-8."""

from __future__ import annotations

import asyncio
import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
import redis as redis_client
from psycopg.conninfo import conninfo_to_dict

from server import check, postgres
from server.config import Settings
from server.database import Database
from server.embedded import RedisServer
from server.keys import Keys
from sync.reconcile import Outcome, Reconciliation
from sync.store import Store, migrate
from sync.waiting import Stop
from tests.services import ROOT, environment
from tests.sync_parts import event

URL = "postgresql://ann@db.example/scores"
NAMES = ["Žižka", "漢字", "🎲"]


def test_url_wins_over_what_we_would_say() -> None:
    ours = postgres.parameters(URL, "scoreboard-test")
    assert ours["fallback_application_name"] == "scoreboard-test"
    assert (ours["connect_timeout"], ours["keepalives_idle"], ours["tcp_user_timeout"]) == (5, 5, 20_000)
    said = "connect_timeout=9&keepalives_idle=60&application_name=mine&options=-csearch_path%3Dfoo&sslmode=require"
    found = postgres.parameters(f"{URL}?{said}", "scoreboard-test")
    for name, value in conninfo_to_dict(f"{URL}?{said}").items():
        assert found[name] == value


def test_environment_wins_over_what_we_would_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGCONNECT_TIMEOUT", "9")
    assert "connect_timeout" not in postgres.parameters(URL, "test")


@pytest.mark.parametrize("named_by", ["the URL", "the environment"])
def test_service_file_wins_over_what_we_would_say(named_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if named_by == "the environment":
        monkeypatch.setenv("PGSERVICE", "scores")
    found = postgres.parameters("" if named_by == "the environment" else "service=scores", "test")
    assert not {"connect_timeout", "keepalives_idle", "tcp_user_timeout"} & set(found)
    assert found["client_encoding"] == "UTF8"


@pytest.mark.postgres
def test_application_is_named_by_its_role_unless_it_has_a_name(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def name(url: str) -> Any:
        with postgres.connect(url, "scoreboard-test") as connection:
            row = connection.execute("SELECT current_setting('application_name')").fetchone()
            return row and row[0]

    assert name(database_url) == "scoreboard-test"
    assert name(f"{database_url}?application_name=mine") == "mine"
    monkeypatch.setenv("PGAPPNAME", "ours")
    assert name(database_url) == "ours"


async def read(url: str) -> tuple[list[tuple[str, int]], list[str], set[int]]:
    """As the server does: the top, the boards and the partitions."""
    database = Database(url)
    await database.open()
    try:
        async with database.snapshot() as snapshot:
            boards, offsets = await snapshot.boards(), set(await snapshot.offsets("t"))
            snapshot_players = [row[1] async for rows in snapshot.scores() for row in rows]
        top = await database.top("main", 10)
        assert sorted(snapshot_players) == sorted(player for player, _ in top)
        return top, boards, offsets
    finally:
        await database.close()


@pytest.mark.postgres
@pytest.mark.redis
@pytest.mark.parametrize("how", ["URL", "words", "environment", "service"])
def test_options_count_for_every_command(
    how: str,
    database_url: str,
    redis_server: RedisServer,
    redis: redis_client.Redis,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    with psycopg.connect(database_url, autocommit=True) as direct:
        direct.execute("CREATE SCHEMA another")
        url = _with_options(how, "-csearch_path=another", database_url, monkeypatch, tmp_path)
        migrate(url)
        store = Store(url)
        store.persist([event("ann", 1000, score=7)], "t", "id", {3: 1})
        store.close()
        assert asyncio.run(read(url)) == ([("ann", 7)], ["main"], {3})
        assert [found for found in check.look_at("PostgreSQL", Settings(database_url=url)) if found.state != "ok"] == []
        redis.hset(Keys().ready, mapping={"epoch": "1", "run_id": "any"})
        settings = Settings(redis_host=redis_server.host, redis_port=redis_server.port, database_url=url)
        reconciliation = Reconciliation(dataclasses.replace(settings, kafka_brokers="127.0.0.1:1"), Stop(), print)
        monkeypatch.setattr("sync.reconcile.SETTLE_WITHIN_S", 0.0)
        monkeypatch.setattr("sync.reconcile._Pipeline.owes", lambda _: "")
        assert reconciliation.run(repair=False) == Outcome(1, 1, 0)
        reconciliation.close()
        tables = "SELECT DISTINCT schemaname FROM pg_tables WHERE tablename = 'scores'"
        assert direct.execute(tables).fetchall() == [("another",)]


def _with_options(how: str, options: str, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    words = conninfo_to_dict(url)
    if how == "URL":
        return f"{url}?options={quote(options)}"
    if how == "words":
        return psycopg.conninfo.make_conninfo("", **words, options=options)
    if how == "environment":
        monkeypatch.setenv("PGOPTIONS", options)
        return url
    lines = [f"{name}={value}" for name, value in {**words, "options": options}.items()]
    (tmp_path / "services").write_text("\n".join(["[scores]", *lines, ""]))
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
    return "service=scores"


def _said_by_url(url: str, _: pytest.MonkeyPatch) -> str:
    return f"{url}?client_encoding=LATIN1"


def _said_by_options(url: str, _: pytest.MonkeyPatch) -> str:
    return f"{url}?options={quote('-cclient_encoding=LATIN1')}"


def _said_by_environment(url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    return url


def _said_by_database(url: str, _: pytest.MonkeyPatch) -> str:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {url.rpartition('/')[2]} SET client_encoding = 'LATIN1'")
    return url


@pytest.mark.postgres
@pytest.mark.parametrize("say", [_said_by_url, _said_by_options, _said_by_environment, _said_by_database])
def test_names_are_utf_8_whatever_encoding_is_asked_for(
    say: Callable[[str, pytest.MonkeyPatch], str], database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = say(database_url, monkeypatch)
    migrate(url)
    store = Store(url)
    store.persist([event(name, 1000, index=index) for index, name in enumerate(NAMES)], "t", "id", {0: 1})
    assert set(store.scores_of("main", NAMES)) == set(NAMES)
    store.close()
    top, _, _ = asyncio.run(read(url))
    assert {player for player, _ in top} == set(NAMES)


def test_variables_of_the_shell_do_not_reach_the_tests() -> None:
    others = dict.fromkeys(("PGSSLMODE", "PGHOSTADDR", "PGOPTIONS", "PGSERVICE", "PGCLIENTENCODING"), "none")
    code = f"import os, tests.conftest; assert not set({[*others]}) & set(os.environ)"
    subprocess.run([sys.executable, "-c", code], env=environment(others), cwd=ROOT, check=True)
