"""Reconciliation: what Redis and the database know differently is found, told and put right, and nothing else is."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis as redis_client

from server.config import Settings
from server.embedded import ADDRESS, RedisServer, free_port
from server.events import MAX_SCORE
from server.keys import Keys
from sync import reconcile
from sync.reconcile import NotComparable, Outcome, Reconciliation
from sync.store import Store, migrate
from sync.topics import ensure_topics
from sync.waiting import Stop
from tests.services import ROOT, KafkaBroker, SyncProcess, environment, wait_until
from tests.sync_parts import add_entry, environment_of, event

pytestmark = [pytest.mark.redis, pytest.mark.postgres]
KEYS = Keys()


@pytest.fixture
def settings(
    redis_server: RedisServer, redis: redis_client.Redis, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> Settings:
    """Without a Kafka: what differs is believed at once, rather than waited for."""
    monkeypatch.setattr(reconcile, "SETTLE_WITHIN_S", 0.0)
    monkeypatch.setattr(reconcile._Pipeline, "owes", lambda _: "")
    migrate(database_url)
    redis.hset(KEYS.ready, mapping={"epoch": "1", "run_id": "any"})
    return Settings(
        redis_host=redis_server.host,
        redis_port=redis_server.port,
        database_url=database_url,
        boards=("main", "weekly"),
        kafka_brokers=f"{ADDRESS}:{free_port()}",
    )


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    made = Store(settings.database_url)
    yield made
    made.close()


@pytest.fixture
def database(settings: Settings) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(settings.database_url, autocommit=True) as connection:
        yield connection


def put(redis: redis_client.Redis, scores: dict[str, int], board: str = "main") -> None:
    """Put scores into Redis as a server does, but for the outbox."""
    keys = KEYS.board(board)
    redis.mset({keys.score(player): score for player, score in scores.items()})
    redis.zadd(keys.leaderboard, scores)


def set_last_id(redis: redis_client.Redis, ms: int, seq: int = 0) -> None:
    """Let the outbox be empty, and `ms-seq` the last id it gave out."""
    redis.delete(KEYS.outbox)
    redis.xadd(KEYS.outbox, {"batch": "x"}, id=f"{ms}-{seq}")
    redis.xtrim(KEYS.outbox, maxlen=0, approximate=False)


def persist(store: Store, scores: dict[str, int], ms: int = 1000) -> None:
    store.persist([event(player, ms, score=score) for player, score in scores.items()], "updates", "id", {})


def compared(settings: Settings, *, repair: bool = False) -> tuple[Outcome, list[str]]:
    """What it came to, and what was said."""
    said: list[str] = []
    reconciliation = Reconciliation(settings, Stop(), said.append)
    try:
        return reconciliation.run(repair=repair), said
    finally:
        reconciliation.close()


def rows(database: psycopg.Connection[Any]) -> dict[str, tuple[int, int, int]]:
    found = database.execute("SELECT player_id, score, ver_ms, ver_seq FROM scores").fetchall()
    return {player: (score, ms, seq) for player, score, ms, seq in found}


def test_same_scores_are_the_same(settings: Settings, redis: redis_client.Redis, store: Store) -> None:
    scores = {"ann": 1, "b:o%b": -5, "é漢🎲": 0, "'\"\\{}": 7, "big": MAX_SCORE, "small": -MAX_SCORE}
    put(redis, scores)
    set_last_id(redis, 1000)
    persist(store, scores)
    assert compared(settings) == (Outcome(len(scores), 0, 0), [])


def test_each_difference_is_told_with_its_size(settings: Settings, redis: redis_client.Redis, store: Store) -> None:
    put(redis, {"ann": 125, "new": 7, "same": 1})
    put(redis, {"wendy": 3}, board="weekly")
    set_last_id(redis, 2000)
    persist(store, {"ann": 120, "gone": 5, "same": 1})
    outcome, said = compared(settings)
    assert outcome == Outcome(compared=5, differing=4, repaired=0)
    assert sorted(said) == [
        'main "ann": Redis 125, database 120 (-5)',
        'main "gone": Redis none, database 5',
        'main "new": Redis 7, database none',
        'weekly "wendy": Redis 3, database none',
    ]


def test_repair_writes_what_redis_says_and_keeps_whom_it_does_not_know(
    settings: Settings, redis: redis_client.Redis, store: Store, database: psycopg.Connection[Any]
) -> None:
    put(redis, {"ann": 125, "new": 7})
    set_last_id(redis, 2000, 3)
    persist(store, {"ann": 120, "gone": 5})
    assert compared(settings, repair=True)[0] == Outcome(3, differing=3, repaired=2)
    assert rows(database) == {
        "ann": (125, 2000, 3 * 65536 + 65535),
        "new": (7, 2000, 3 * 65536 + 65535),
        "gone": (5, 1000, 0),
    }
    assert compared(settings, repair=True)[0] == Outcome(3, differing=1, repaired=0)


def test_repaired_score_yields_to_later_events_and_to_no_earlier_one(
    settings: Settings, redis: redis_client.Redis, store: Store, database: psycopg.Connection[Any]
) -> None:
    put(redis, {"ann": 125, "bob": 1})
    set_last_id(redis, 2000, 3)
    compared(settings, repair=True)
    store.persist([event("ann", 2000, seq=3, index=511, score=1)], "updates", "id", {})
    assert rows(database)["ann"][0] == 125
    store.persist([event("ann", 2000, seq=4, score=130)], "updates", "id", {})
    assert rows(database)["ann"] == (130, 2000, 4 * 65536)


def test_score_changed_by_hand_after_a_repair_is_repaired_again(
    settings: Settings, redis: redis_client.Redis, database: psycopg.Connection[Any]
) -> None:
    set_last_id(redis, 2000)
    for score in (5, 6):
        put(redis, {"ann": score})
        assert compared(settings, repair=True)[0] == Outcome(1, 1, 1)
        assert rows(database)["ann"][0] == score


def test_database_that_knows_a_later_event_is_told_and_not_overwritten(
    settings: Settings, redis: redis_client.Redis, store: Store, database: psycopg.Connection[Any]
) -> None:
    put(redis, {"ann": 5})
    set_last_id(redis, 1000)
    persist(store, {"ann": 8}, ms=3000)
    outcome, said = compared(settings, repair=True)
    assert outcome == Outcome(1, 1, 0)
    assert said == ['main "ann": Redis 5, database 8 (+3); the database knows a later event']
    assert rows(database)["ann"] == (8, 3000, 0)


def test_board_that_ranks_another_score_is_a_difference(
    settings: Settings, redis: redis_client.Redis, store: Store
) -> None:
    put(redis, {"ann": 5, "bob": 6, "cy": 7})
    redis.zadd("leaderboard", {"ann": 4})
    redis.zrem("leaderboard", "bob")
    redis.delete(KEYS.board("main").score("cy"))
    set_last_id(redis, 2000)
    persist(store, {"ann": 5, "bob": 6, "cy": 7})
    outcome, said = compared(settings)
    assert outcome == Outcome(3, 3, 0)
    assert sorted(said) == [
        'main "ann": score key 5, leaderboard 4, database 5',
        'main "bob": score key 6, leaderboard none, database 6',
        'main "cy": score key none, leaderboard 7, database 7',
    ]


def test_what_no_update_writes_into_redis_is_no_obstacle(
    settings: Settings, redis: redis_client.Redis, store: Store
) -> None:
    put(redis, {"ann": 7})
    redis.zadd(KEYS.board("main").leaderboard, {"a\0b": 1, b"\xff": 2})  # type: ignore[dict-item]
    redis.set(KEYS.board("main").score("huge"), "9" * 30)
    redis.zadd(KEYS.board("main").leaderboard, {"huge": 10**30})
    set_last_id(redis, 2000)
    persist(store, {"ann": 6, "huge": 5})
    outcome, said = compared(settings, repair=True)
    assert (outcome.differing, outcome.repaired) == (2, 1)
    assert sorted(said) == ['main "ann": Redis 7, database 6 (-1)', 'main "huge": Redis none, database 5']


def test_more_players_than_a_chunk_are_all_compared(
    settings: Settings, redis: redis_client.Redis, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconcile, "CHUNK", 16)
    monkeypatch.setattr(reconcile, "DOUBTS_AT_ONCE", 32)
    scores = {f"player{number}": number for number in range(500)}
    put(redis, scores)
    set_last_id(redis, 2000)
    persist(store, dict(list(scores.items())[:250]))
    assert compared(settings, repair=True)[0] == Outcome(500, 250, 250)
    assert compared(settings)[0] == Outcome(500, 0, 0)


def test_redis_that_was_never_filled_is_compared_with_nothing(
    settings: Settings, redis: redis_client.Redis, store: Store, database: psycopg.Connection[Any]
) -> None:
    redis.flushall()
    persist(store, {"ann": 8})
    with pytest.raises(NotComparable, match="Redis has no scoreboard"):
        compared(settings, repair=True)
    assert rows(database) == {"ann": (8, 1000, 0)}


def test_row_that_moved_on_in_between_is_no_difference(
    settings: Settings, redis: redis_client.Redis, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(redis, {"ann": 5, "bob": 5})
    set_last_id(redis, 2000)
    persist(store, {"ann": 4, "bob": 4})

    def events_come(_: object) -> str:
        persist(store, {"ann": 9}, ms=3000)  # later than what was read
        persist(store, {"bob": 5}, ms=2000)  # what was on its way
        return ""

    monkeypatch.setattr(reconcile._Pipeline, "owes", events_come)
    assert compared(settings) == (Outcome(2, 0, 0), [])


def run(settings: Settings, *arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "server", "reconcile", *arguments]
    env = environment(environment_of(dataclasses.replace(settings, boards=("main",))))
    return subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def with_kafka(settings: Settings, kafka_broker: KafkaBroker, kafka_topic: str) -> Settings:
    made = dataclasses.replace(settings, kafka_brokers=kafka_broker.brokers, kafka_topic=kafka_topic)
    ensure_topics(made)
    return made


@pytest.mark.kafka
def test_exit_status_says_whether_anything_differed(
    with_kafka: Settings, redis: redis_client.Redis, store: Store
) -> None:
    put(redis, {"ann": 125})
    set_last_id(redis, 2000)
    persist(store, {"ann": 120})
    differing = run(with_kafka)
    assert differing.returncode == 1, differing.stderr
    assert differing.stdout.startswith('main "ann": Redis 125, database 120 (-5)\n1 players compared in ')
    assert differing.stdout.endswith(" s: 1 differ\n")
    assert run(with_kafka, "--repair").stdout.endswith(": 1 differ, 1 repaired\n")
    same = run(with_kafka)
    assert (same.returncode, same.stdout.endswith(": 0 differ\n")) == (0, True)


def test_wrong_use_and_what_cannot_be_compared_exit_with_2(settings: Settings, redis: redis_client.Redis) -> None:
    used = run(settings, "--every", "soon")
    assert used.returncode == 2
    assert "expected seconds, or a number with s, m or h, got 'soon'" in used.stderr
    redis.flushall()
    empty = run(settings)
    assert (empty.returncode, empty.stdout) == (2, "")
    assert "could not compare: Redis has no scoreboard" in empty.stderr


@pytest.mark.kafka
def test_events_on_their_way_are_waited_for(
    with_kafka: Settings, redis: redis_client.Redis, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(reconcile, "SETTLE_WITHIN_S", 60.0)  # a busy machine may take longer than anybody would wait
    players = {f"player{number}": number for number in range(40)}
    put(redis, players)
    add_entry(redis, [(player, 1, score) for player, score in players.items()])
    sync = SyncProcess(tmp_path, environment_of(with_kafka) | {"BOARDS": "main"})
    sync.start()  # and takes a while to begin, for a consumer group has to form
    try:
        assert compared(with_kafka) == (Outcome(40, 0, 0), [])
    finally:
        sync.stop()


@pytest.mark.kafka
def test_every_so_often_repairs_until_it_is_stopped(
    with_kafka: Settings, redis: redis_client.Redis, database: psycopg.Connection[Any], tmp_path: Path
) -> None:
    set_last_id(redis, 2000)
    process = SyncProcess(tmp_path, environment_of(with_kafka) | {"BOARDS": "main"})
    process.argv[-1:] = ["reconcile", "--repair", "--every", "1s"]
    process.start()
    try:
        for score in (5, 6):
            put(redis, {"ann": score})
            wait_until(lambda: rows(database).get("ann", (0,))[0] == score, 15)  # noqa: B023
        wait_until(lambda: process.output_tail().endswith(": 0 differ, 0 repaired"), 15)
        assert process.stop() == 0
    finally:
        process.stop()
