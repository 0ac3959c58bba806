"""TimescaleDB beyond what the tests of store and persister ask of every server: chunks, and moving to them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from sync.store import Store, migrate
from tests.databases import migrate_as_before
from tests.sync_parts import event

pytestmark = pytest.mark.timescale
DAY_MS = 86_400_000


@pytest.fixture
def database(timescale_url: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(timescale_url, autocommit=True) as connection:
        yield connection


def chunks(database: psycopg.Connection[Any]) -> int:
    # The roll-ups of the community edition have chunks of their own.
    query = "SELECT count(*) FROM timescaledb_information.chunks WHERE hypertable_name = 'score_events'"
    row = database.execute(query).fetchone()
    assert row is not None
    return int(row[0])


def fill(url: str, days: list[int]) -> None:
    """Persist an event for each of these numbers of days ago."""
    now_ms = time.time_ns() // 1_000_000
    store = Store(url)
    events = [event("ann", now_ms - ago * DAY_MS, score=100 - ago) for ago in days]
    store.persist(events, "updates", "id", {0: len(days)})
    store.close()


def test_history_has_a_chunk_a_day(timescale_url: str, database: psycopg.Connection[Any]) -> None:
    migrate(timescale_url)
    fill(timescale_url, [1, 2, 3, 4])
    assert chunks(database) == 4


def test_plain_database_is_upgraded_in_place(timescale_url: str, database: psycopg.Connection[Any]) -> None:
    without = f"{timescale_url}?options=-c%20timescaledb.disable_load%3Don"
    migrate(without)
    fill(without, [1, 2, 40])
    assert database.execute("SELECT count(*) FROM pg_extension WHERE extname = 'timescaledb'").fetchone() == (0,)
    before = database.execute("SELECT * FROM score_events ORDER BY at").fetchall()
    for _ in range(2):
        migrate(timescale_url)
    # A connection made before the extension was there has not loaded it.
    with psycopg.connect(timescale_url, autocommit=True) as later:
        assert chunks(later) == 3
        assert later.execute("SELECT * FROM score_events ORDER BY at").fetchall() == before
        assert later.execute("SELECT player_id, score FROM scores").fetchall() == [("ann", 99)]
        assert later.execute("SELECT sum(events) FROM score_daily").fetchone() == (3,)
    fill(timescale_url, [1, 2, 40, 0])
    with psycopg.connect(timescale_url, autocommit=True) as later:
        assert later.execute("SELECT count(*) FROM consumer_offsets WHERE next_offset = 4").fetchone() == (1,)


def test_chunks_that_are_there_get_the_new_order(timescale_url: str, database: psycopg.Connection[Any]) -> None:
    migrate_as_before(timescale_url)
    fill(timescale_url, [1, 2, 3])
    migrate(timescale_url)
    query = """
        SELECT count(*) FILTER (WHERE attcollation = '"C"'::regcollation), count(*)
        FROM timescaledb_information.chunks
        JOIN pg_attribute ON attrelid = format('%I.%I', chunk_schema, chunk_name)::regclass
        WHERE hypertable_name = 'score_events' AND attname IN ('board', 'player_id')
    """
    with psycopg.connect(timescale_url) as later:
        assert later.execute(query).fetchone() == (6, 6)
    fill(timescale_url, [1, 2, 3, 4])
    assert chunks(database) == 4


def test_old_history_goes_by_the_chunk(timescale_url: str, database: psycopg.Connection[Any]) -> None:
    migrate(timescale_url, history_days=30)
    fill(timescale_url, [1, 29, 32, 40, 400])
    store = Store(timescale_url)
    assert store.drop_history(days=30, most=1) is False
    store.close()
    assert chunks(database) == 2
    assert database.execute("SELECT count(*) FROM score_events").fetchone() == (2,)
    assert database.execute("SELECT score FROM scores").fetchone() == (99,)
