"""The store: what is written twice counts once, in whatever order it comes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.embedded import PostgresServer
from server.events import MAX_SCORE, ScoreEvent
from sync.store import CommitsLost, Persisted, Store, StoredOffset, WrongEncoding, migrate
from tests.databases import database_of, migrate_as_before
from tests.sync_parts import event

pytestmark = pytest.mark.postgres


@pytest.fixture(params=["postgres", pytest.param("timescale", marks=pytest.mark.timescale)])
def database_url(request: pytest.FixtureRequest, database_url: str) -> str:
    """An empty database, on either kind of server."""
    return str(request.getfixturevalue("timescale_url")) if request.param == "timescale" else database_url


@pytest.fixture
def database(database_url: str) -> Iterator[psycopg.Connection[Any]]:
    migrate(database_url)
    with psycopg.connect(database_url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def store(database_url: str, database: psycopg.Connection[Any]) -> Iterator[Store]:
    made = Store(database_url)
    yield made
    made.close()


def persist(store: Store, events: list[ScoreEvent], offsets: dict[int, int] | None = None) -> Persisted:
    return store.persist(events, "updates", "id-1", offsets or {})


def scores(database: psycopg.Connection[Any]) -> dict[str, tuple[int, int, int]]:
    rows = database.execute("SELECT player_id, score, ver_ms, ver_seq FROM scores")
    return {player: (score, ms, seq) for player, score, ms, seq in rows}


def test_schema_is_applied_twice_without_harm(
    database_url: str, database: psycopg.Connection[Any], store: Store
) -> None:
    persist(store, [event("ann", 1000, score=7)])
    migrate(database_url)
    assert scores(database) == {"ann": (7, 1000, 0)}


def test_schema_is_applied_by_many_at_once(database_url: str) -> None:
    failures: list[Exception] = []

    def apply() -> None:
        try:
            migrate(database_url)
        except psycopg.Error as error:
            failures.append(error)

    threads = [threading.Thread(target=apply) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


KEYS = {
    ("scores", "board"), ("scores", "player_id"), ("score_events", "board"), ("score_events", "player_id"),
    ("consumer_offsets", "consumer_group"), ("consumer_offsets", "topic"),
}  # fmt: skip
_UNSORTED = """
    SELECT attrelid::regclass::text, attname FROM pg_attribute
    WHERE attrelid::regclass::text IN ('scores', 'score_events', 'consumer_offsets')
      AND attname IN ('board', 'player_id', 'consumer_group', 'topic') AND attcollation <> '"C"'::regcollation
"""


def keys_in_another_order(database: psycopg.Connection[Any]) -> set[tuple[str, str]]:
    return {(table, column) for table, column in database.execute(_UNSORTED)}


def test_keys_sort_by_their_bytes_in_new_tables_and_in_those_that_are_there(database_url: str) -> None:
    migrate_as_before(database_url)
    names = ["a", "B", "ab", "A b", "_", "é", "漢", "🎲", "Ž", "z"]
    store = Store(database_url)
    persist(store, [event(name, 1000 + i, score=i) for i, name in enumerate(names)], {0: 10})
    with psycopg.connect(database_url, autocommit=True) as connection:
        assert keys_in_another_order(connection) == KEYS
        connection.execute("CREATE ROLE reader_of_tests")
        try:
            connection.execute("GRANT SELECT ON score_hourly TO reader_of_tests WITH GRANT OPTION")
            connection.execute("GRANT SELECT ON score_daily TO PUBLIC")
            for _ in range(2):
                migrate(database_url)
                assert keys_in_another_order(connection) == set()
            acl = "SELECT relacl::text FROM pg_class WHERE relname = %s"
            assert "reader_of_tests=r*/" in connection.execute(acl, ("score_hourly",)).fetchall()[0][0]
            assert ",=r/" in connection.execute(acl, ("score_daily",)).fetchall()[0][0]
        finally:
            connection.execute("DROP OWNED BY reader_of_tests")
            connection.execute("DROP ROLE reader_of_tests")
        again = persist(store, [event(name, 1000 + i, score=i) for i, name in enumerate(names)], {0: 10})
        assert again == Persisted(0, 0, 0), "the new indexes know what was there"
        assert [name for name, _ in store.scores_after("main", "", 100)] == sorted(names)
        assert connection.execute("SELECT count(*), sum(events) FROM score_daily").fetchone() == (10, 10)
    store.close()


def test_keys_change_while_others_write(database_url: str) -> None:
    migrate_as_before(database_url)
    failures: list[Exception] = []
    written = threading.Semaphore(0)
    changed = threading.Event()

    def write(number: int) -> None:
        store, ms = Store(database_url), 1000
        try:
            while not changed.is_set():
                persist(store, [event(f"player{i}", ms) for i in range(20)], {number: ms})
                written.release()
                ms += 1
        except psycopg.Error as error:
            failures.append(error)
            written.release()
        finally:
            store.close()

    threads = [threading.Thread(target=write, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            written.acquire()
        migrate(database_url)
    finally:
        changed.set()
        for thread in threads:
            thread.join()
    assert failures == []
    with psycopg.connect(database_url) as connection:
        assert keys_in_another_order(connection) == set()


def test_views_of_others_keep_the_old_order_and_are_told(
    database_url: str, database: psycopg.Connection[Any], store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    database.execute('ALTER TABLE scores ALTER player_id TYPE text COLLATE "default"')
    database.execute("CREATE VIEW mine AS SELECT max(score), player_id FROM scores GROUP BY player_id")
    migrate(database_url)
    assert keys_in_another_order(database) == {("scores", "player_id")}
    assert "the keys of scores keep the order of the database: cannot alter type" in caplog.text
    persist(store, [event(name, 1000, score=7) for name in ("a", "B", "é")])
    assert len(scores(database)) == 3
    database.execute("DROP VIEW mine")
    migrate(database_url)
    assert keys_in_another_order(database) == set()


def test_table_that_somebody_reads_for_long_is_not_waited_for(
    database_url: str, database: psycopg.Connection[Any], caplog: pytest.LogCaptureFixture
) -> None:
    database.execute('ALTER TABLE scores ALTER player_id TYPE text COLLATE "default"')
    with psycopg.connect(database_url) as reader:
        reader.execute("SELECT count(*) FROM scores")
        migrate(f"{database_url}?options=-c%20lock_timeout%3D50ms")
    assert "the keys of scores keep the order of the database: canceling statement due to lock timeout" in caplog.text
    migrate(database_url)
    assert keys_in_another_order(database) == set()


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1", "WIN1252"])
def test_database_that_cannot_hold_every_name_is_refused(postgres_server: PostgresServer, encoding: str) -> None:
    with database_of(postgres_server, encoding) as url:
        with pytest.raises(WrongEncoding, match=f"expected the encoding UTF8, which holds every name, got {encoding}"):
            migrate(url)
        with psycopg.connect(url) as connection:
            assert connection.execute("SELECT count(*) FROM pg_class WHERE relname = 'scores'").fetchone() == (0,)


def test_events_scores_and_offsets_are_written_together(database: psycopg.Connection[Any], store: Store) -> None:
    done = persist(store, [event("ann", 1000, score=1), event("ann", 1001, score=2), event("bob", 1001)], {0: 5, 3: 9})
    assert done == Persisted(new_events=3, players_advanced=2, offsets_advanced=2)
    assert scores(database) == {"ann": (2, 1001, 0), "bob": (1, 1001, 0)}
    assert store.offsets("updates") == {0: StoredOffset("id-1", 5), 3: StoredOffset("id-1", 9)}
    assert store.offsets("another") == {}


def test_batch_written_again_changes_nothing(store: Store) -> None:
    batch = [event("ann", 1000, index=i, score=i) for i in range(10)]
    persist(store, batch, {0: 10})
    assert persist(store, batch, {0: 10}) == Persisted(0, 0, 0)


def test_earlier_event_that_comes_late_turns_no_score_back(database: psycopg.Connection[Any], store: Store) -> None:
    persist(store, [event("ann", 1000, seq=10, score=10)])
    done = persist(store, [event("ann", 1000, seq=9, score=9), event("ann", 999, seq=99, score=8)])
    assert done == Persisted(new_events=2, players_advanced=0, offsets_advanced=0)
    assert scores(database)["ann"][0] == 10


def test_offset_never_goes_back(store: Store) -> None:
    persist(store, [], {0: 10})
    persist(store, [], {0: 4})
    assert store.offsets("updates")[0].next_offset == 10


def test_epoch_of_the_last_fence_is_kept_with_the_offset(store: Store) -> None:
    store.persist([], "updates", "id-1", {0: 5, 1: 5}, {0: {"": 7, "3": 9}})
    store.persist([], "updates", "id-1", {0: 4}, {0: {"": 3}})
    offsets = store.offsets("updates")
    assert offsets == {0: StoredOffset("id-1", 5, {"": 7, "3": 9}), 1: StoredOffset("id-1", 5)}


def test_offset_of_another_topic_is_neither_moved_nor_kept_when_forgotten(store: Store) -> None:
    persist(store, [], {0: 10})
    store.persist([], "updates", "id-2", {0: 20})
    assert store.offsets("updates") == {0: StoredOffset("id-1", 10)}
    store.forget_offsets("updates", but_of="id-1")
    assert store.offsets("updates") == {0: StoredOffset("id-1", 10)}
    store.forget_offsets("updates", but_of="id-2")
    assert store.offsets("updates") == {}


def test_any_name_and_any_score_survive(database: psycopg.Connection[Any], store: Store) -> None:
    names = ['"', "\\", '\\"', "{}", "a,b", "NULL", " ", "%s", "é漢🎲", "'", "x" * 128]
    persist(store, [event(name, 1000, index=i, score=-MAX_SCORE) for i, name in enumerate(names)])
    assert set(scores(database)) == set(names)
    assert {score for score, _, _ in scores(database).values()} == {-MAX_SCORE}


def test_refused_batch_leaves_nothing_behind(database: psycopg.Connection[Any], store: Store) -> None:
    with pytest.raises(psycopg.DataError):
        persist(store, [event("ann", 1000), event("b\0b", 1000)], {0: 2})
    assert scores(database) == {}
    assert store.offsets("updates") == {}


def test_old_history_goes_and_scores_stay(database: psycopg.Connection[Any], store: Store) -> None:
    now_ms, day_ms = time.time_ns() // 1_000_000, 86_400_000
    persist(store, [event(f"old{i}", now_ms - 40 * day_ms + i) for i in range(25)])
    persist(store, [event(f"new{i}", now_ms - 20 * day_ms + i) for i in range(25)])
    while store.drop_history(days=30, most=10):
        pass
    left = database.execute("SELECT player_id FROM score_events").fetchall()
    assert {player for (player,) in left} == {f"new{i}" for i in range(25)}
    assert len(scores(database)) == 50


def test_lost_connection_is_made_again(database: psycopg.Connection[Any], store: Store) -> None:
    persist(store, [event("ann", 1000)])
    end_other_connections(database)
    assert persist(store, [event("ann", 1001)]).new_events == 1


def test_database_that_forgot_what_it_confirmed_is_found_out(database: psycopg.Connection[Any], store: Store) -> None:
    persist(store, [event("ann", 1000), event("bob", 1000)], {0: 5, 1: 7})
    database.execute("UPDATE consumer_offsets SET next_offset = 3 WHERE partition = 0")
    database.execute("DELETE FROM consumer_offsets WHERE partition = 1")
    end_other_connections(database)
    with pytest.raises(CommitsLost, match="lost up to 9 events of updates"):
        persist(store, [event("ann", 1001)], {0: 6})
    assert store.offsets("updates") == {0: StoredOffset("id-1", 3)}
    end_other_connections(database)
    assert persist(store, [event("ann", 1001)], {0: 6}).new_events == 1


def end_other_connections(database: psycopg.Connection[Any]) -> None:
    database.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )


def test_writers_at_once_neither_deadlock_nor_lose(database_url: str, database: psycopg.Connection[Any]) -> None:
    events = [event(f"player{i % 50}", 1000 + i, score=i) for i in range(2000)]
    failures: list[Exception] = []

    def write(mine: list[ScoreEvent]) -> None:
        store = Store(database_url)
        try:
            for start in range(0, len(mine), 100):
                persist(store, mine[start : start + 100])
        except psycopg.Error as error:
            failures.append(error)
        finally:
            store.close()

    threads = [threading.Thread(target=write, args=(events[offset::2] + events[::-1],)) for offset in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert scores(database) == {f"player{i % 50}": (i, 1000 + i, 0) for i in range(1950, 2000)}
    assert database.execute("SELECT count(*) FROM score_events").fetchone() == (2000,)


_events = st.builds(
    event,
    st.sampled_from(["ann", "bob", "cy"]),
    st.integers(1, 4),
    seq=st.integers(0, 11),
    index=st.integers(0, 2),
    delta=st.integers(-5, 5),
    score=st.integers(-100, 100),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches=st.lists(st.lists(_events, max_size=12), max_size=6), data=st.data())
def test_any_order_and_repetition_ends_in_the_latest_versions(
    batches: list[list[ScoreEvent]], data: st.DataObject, database: psycopg.Connection[Any], store: Store
) -> None:
    unique = {one.event_id: one for batch in batches for one in batch}  # one id is one event
    sequence = [unique[one.event_id] for batch in batches for one in batch]
    shuffled = data.draw(st.permutations(sequence + sequence[:5]))
    database.execute("TRUNCATE scores, score_events, consumer_offsets")
    while shuffled:
        size = data.draw(st.integers(1, len(shuffled)))
        persist(store, shuffled[:size])
        shuffled = shuffled[size:]
    model: dict[str, tuple[int, int, int]] = {}
    for one in sorted(unique.values(), key=lambda one: one.version):
        model[one.player_id] = (one.new_score, *one.version)
    assert scores(database) == model
    assert database.execute("SELECT count(*) FROM score_events").fetchone() == (len(unique),)
