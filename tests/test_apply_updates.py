"""apply_updates.lua against the oracle, and what a damaged Redis makes of it."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import pytest
import redis as redis_client
from hypothesis import strategies as st

import server
from server.batches import IdempotencyKey, Lane, Outcome, Script, Updates, fingerprint, read_reply
from server.config import Settings
from server.events import (
    FINGERPRINT_LENGTH,
    MAX_BATCH,
    MAX_SCORE,
    MEMORY_FIELD,
    OUTBOX_FIELD,
    events_of_entry,
    memories_of_entry,
)
from server.keys import Keys, idempotency_name
from tests.board_model import BoardModel, Update

pytestmark = pytest.mark.redis

SCRIPT = (Path(server.__file__).parent / "apply_updates.lua").read_text()
APPLIED, COLD, STALE = 0, 1, 2
EPOCH = "7"

# An interval so long that no time passes within a test.
LIMITS = [(10**9, 3), (10**9, 8)]
SPAN_US = 8 * 10**9
TTL_S = 10**7
CAP = 5
WORDS = Script(
    Settings(
        rate_limit_per_second=1e6 / LIMITS[0][0],
        rate_limit_burst=LIMITS[0][1],
        rate_limit_writers_per_second=1e6 / LIMITS[1][0],
        rate_limit_writers_burst=LIMITS[1][1],
        idempotency_ttl_s=TTL_S,
        idempotency_max_per_subject=CAP,
    ),
    Keys(),
)

PLAYERS = ["ann", "bob", "Ζωή", "a:b", "a%3Ab", "100%", 'q"\\', "x" * 128]
deltas = st.one_of(
    st.integers(-5, 5), st.sampled_from([MAX_SCORE, -MAX_SCORE, MAX_SCORE - 3]), st.integers(-MAX_SCORE, MAX_SCORE)
)
# Each subject has one kind of token, hence one limit.
subjects = st.sampled_from([("s0", 0), ("s1", 1), ("s:1", 1), ("w1", 2)])
updates = st.builds(
    lambda player, delta, subject, key: Update(player, delta, *subject, key),
    st.sampled_from(PLAYERS),
    deltas,
    subjects,
    st.sampled_from(["", "", "k1", "k2", "k:3", "4", "5", "6", "7"]),
)
batches = st.lists(st.lists(updates, min_size=1, max_size=12), min_size=1, max_size=8)


class Session:
    """Sends batches as the server does, and reads back everything a batch may touch."""

    def __init__(self, client: redis_client.Redis, board: str = "main", session: str = "test") -> None:
        self.client = client
        self.keys = Keys()
        self.board = self.keys.board(board)
        self.session = self.keys.session(session)
        self.lane = Lane(self.board, self.session)
        self.script = client.register_script(SCRIPT)
        client.hset(self.keys.ready, mapping={"epoch": EPOCH, "run_id": "x"})

    def send(self, batch: list[Update], *, number: int | None = None, epoch: str = EPOCH) -> list[int]:
        self.lane.number = self.lane.number + 1 if number is None else number
        updates = Updates()
        for update in batch:
            updates.players.append(update.player)
            updates.score_keys.append(self.board.score(update.player))
            updates.deltas.append(update.delta)
            updates.subjects.append(update.subject)
            updates.which.append(update.limit)
            updates.keys.append(self.key(update) if update.key else None)
        argument = WORDS.argument(self.lane, epoch, updates)
        state, results = read_reply(self.script(keys=[self.keys.outbox], args=[argument]))
        return [state, *results]

    def key(self, update: Update) -> IdempotencyKey:
        name = idempotency_name(update.subject, update.key)
        print_ = fingerprint(self.board.name, update.player, update.delta)
        return IdempotencyKey(name, print_, update.subject if update.limit != 2 else "")

    def outcomes(self, batch: list[Update]) -> list[tuple[int, int]]:
        state, *results = self.send(batch)
        assert state == APPLIED
        pairs = iter(results)
        return list(zip(pairs, pairs, strict=True))

    def score(self, player: str) -> int | None:
        stored = self.client.get(self.board.score(player))
        return None if stored is None else int(stored)

    def ranking(self) -> list[tuple[str, int]]:
        entries = self.client.zrange(self.board.leaderboard, 0, -1, desc=True, withscores=True)
        return [(player.decode(), int(score)) for player, score in entries]

    def events(self) -> list[tuple[str, int, int]]:
        entries = self.client.xrange(self.keys.outbox)
        return [
            (event.player_id, event.score_delta, event.new_score)
            for entry_id, fields in entries
            for event in events_of_entry(entry_id.decode(), fields[OUTBOX_FIELD])
        ]

    def limited(self) -> set[str]:
        spans = self.client.keys(f"{self.keys.ratelimit}*")
        return {subject.decode() for span in spans for subject in self.client.hkeys(span)}

    def answers(self) -> dict[str, int]:
        prefix = self.keys.answer
        return {
            key.decode().removeprefix(prefix): int(self.client.get(key)[FINGERPRINT_LENGTH:])
            for key in self.client.keys(f"{prefix}*")
        }

    def memories(self) -> list[str]:
        entries = [fields.get(MEMORY_FIELD) for _, fields in self.client.xrange(self.keys.outbox)]
        return [memory for payload in entries for memory in memories_of_entry(payload, MAX_BATCH).values()]

    def everything(self) -> dict[bytes, bytes]:
        return {key: self.client.dump(key) for key in self.client.keys("*")}


@pytest.fixture
def session(redis: redis_client.Redis) -> Session:
    return Session(redis)


def add(player: str, delta: int, subject: str = "s0", limit: int = 0, key: str = "") -> Update:
    return Update(player, delta, subject, limit, key)


@hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(batches=batches)
def test_any_batches_do_what_the_model_does(redis: redis_client.Redis, batches: list[list[Update]]) -> None:
    redis.flushall()
    session, model = Session(redis), BoardModel(LIMITS, CAP)
    for batch in batches:
        seen = [(outcome, 0 if outcome == Outcome.LIMITED else value) for outcome, value in session.outcomes(batch)]
        assert seen == model.apply(batch)
    assert session.ranking() == model.ranking()
    assert {player: session.score(player) for player in model.scores} == model.scores
    assert session.events() == model.events
    assert session.limited() == model.spent.keys()
    assert session.answers() == {
        idempotency_name(subject, key): kept.score for (subject, key), kept in model.answers.items()
    }
    assert session.memories() == model.memories


@hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(batches=batches)
def test_sending_every_batch_twice_changes_nothing(redis: redis_client.Redis, batches: list[list[Update]]) -> None:
    redis.flushall()
    session = Session(redis)
    for batch in batches:
        first = session.send(batch)
        before = session.everything()
        assert session.send(batch, number=session.lane.number) == first
        assert session.everything() == before


def test_batch_below_the_last_number_is_stale_and_changes_nothing(session: Session) -> None:
    session.send([add("ann", 1)], number=5)
    before = session.everything()
    assert session.send([add("ann", 1)], number=4) == [STALE]
    assert session.everything() == before


def test_next_number_fences_off_a_batch_that_was_given_up(session: Session) -> None:
    session.send([add("bob", 1)], number=2)
    assert session.send([add("ann", 1)], number=1) == [STALE]
    assert session.score("ann") is None


def test_sessions_do_not_share_numbers(redis: redis_client.Redis) -> None:
    one, other = Session(redis, session="one"), Session(redis, session="other")
    assert one.outcomes([add("ann", 1)]) == [(Outcome.APPLIED, 1)]
    assert other.outcomes([add("ann", 1)]) == [(Outcome.APPLIED, 2)]


@pytest.mark.parametrize("epoch", ["6", "8", ""])
def test_batch_of_another_epoch_is_cold(session: Session, epoch: str) -> None:
    before = session.everything()
    assert session.send([add("ann", 1)], epoch=epoch) == [COLD]
    assert session.everything() == before


def test_batch_without_marker_is_cold(session: Session) -> None:
    session.client.delete(session.keys.ready)
    assert session.send([add("ann", 1)]) == [COLD]
    assert session.client.dbsize() == 0


def test_deleted_leaderboard_damages_known_players_and_spares_new_ones(session: Session) -> None:
    session.outcomes([add("ann", 5)])
    session.client.delete(session.board.leaderboard)
    assert session.outcomes([add("ann", 1), add("bob", 1)]) == [(Outcome.DAMAGED, 0), (Outcome.APPLIED, 1)]
    assert session.score("ann") == 5


def test_evicted_score_is_damage_and_does_not_count_from_zero(session: Session) -> None:
    session.outcomes([add("ann", 5)])
    session.client.delete(session.board.score("ann"))
    assert session.outcomes([add("ann", 1)]) == [(Outcome.DAMAGED, 0)]
    assert session.score("ann") is None


@pytest.mark.parametrize("value", [b"many", b"", b"1.5.2"])
def test_score_that_is_no_number_is_damage(session: Session, value: bytes) -> None:
    session.outcomes([add("ann", 5)])
    session.client.set(session.board.score("ann"), value)
    assert session.outcomes([add("ann", 1)]) == [(Outcome.DAMAGED, 0)]


def test_wrong_type_under_a_known_players_key_is_damage(session: Session) -> None:
    session.outcomes([add("ann", 5)])
    session.client.delete(session.board.score("ann"))
    session.client.rpush(session.board.score("ann"), "x")
    assert session.outcomes([add("ann", 1), add("bob", 2)]) == [(Outcome.DAMAGED, 0), (Outcome.APPLIED, 2)]
    assert session.events() == [("ann", 5, 5), ("bob", 2, 2)]


def test_wrong_type_under_a_new_players_key_gives_way(session: Session) -> None:
    session.client.rpush(session.board.score("ann"), "x")
    assert session.outcomes([add("ann", 1)]) == [(Outcome.APPLIED, 1)]
    assert session.score("ann") == 1


@pytest.mark.parametrize("name", ["outbox", "leaderboard", "session", "scoreboard:ready"])
def test_wrong_type_elsewhere_fails_before_anything_is_written(session: Session, name: str) -> None:
    session.outcomes([add("ann", 5)])
    key = session.session if name == "session" else name
    session.client.delete(key)
    session.client.sadd(key, "wrong")
    before = session.everything()
    with pytest.raises(redis_client.ResponseError, match="WRONGTYPE"):
        session.send([add("ann", 1, "s1", 1), add("bob", 1)])
    assert session.everything() == before


@pytest.mark.parametrize("stored", ["", "x", "1.5", "nan", "inf", "1e300", "-9007199254740992"])
def test_score_that_is_none_of_ours_is_damage(session: Session, stored: str) -> None:
    session.outcomes([add("ann", 5)])
    session.client.set(session.board.score("ann"), stored)
    assert session.outcomes([add("ann", 1), add("bob", 1)]) == [(Outcome.DAMAGED, 0), (Outcome.APPLIED, 1)]
    assert session.events() == [("ann", 5, 5), ("bob", 1, 1)]


def test_what_is_remembered_in_words_that_are_none_of_ours_is_nothing(session: Session) -> None:
    session.outcomes([add("ann", 5, "w1", 2, "k1")])
    (limits,) = session.client.keys("ratelimit:*")
    (answer,) = session.client.keys("idempotency:*")
    for kept in ("x", "f" * 16, *("f" * 16 + score for score in ("x", "1.5", "nan", "1e300"))):
        session.client.hset(limits, "w1", "x")
        session.client.set(answer, kept)
        session.client.set(session.session, kept)
        ((outcome, _),) = session.outcomes([add("ann", 5, "w1", 2, "k1")])
        assert outcome == Outcome.APPLIED


def test_arrival_that_is_no_whole_number_gives_a_wait_that_is_one(session: Session) -> None:
    session.outcomes([add("ann", 5, "s1", 1)])
    (limits,) = session.client.keys("ratelimit:*")
    seconds, us = session.client.time()
    session.client.hset(limits, "s1", f"{seconds * 10**6 + us + 2_500_000_000}.5")
    ((outcome, wait_us),) = session.outcomes([add("ann", 5, "s1", 1)])
    assert (outcome, wait_us) == (Outcome.LIMITED, pytest.approx(500_000_000, abs=60_000_000))


def test_batch_refused_for_lack_of_memory_leaves_nothing_behind(session: Session) -> None:
    session.outcomes([add("ann", 5)])
    before = session.everything()
    session.client.config_set("maxmemory", "1mb")
    try:
        with pytest.raises(redis_client.ResponseError, match="maxmemory"):
            session.send([add("ann", 1, "s1", 1), add("bob", 1)])
    finally:
        session.client.config_set("maxmemory", "0")
    assert session.everything() == before


def test_limited_update_says_how_long_to_wait(session: Session) -> None:
    interval_us, burst = LIMITS[0]
    batch = [add("ann", 1, "s1", 1)] * (burst + 1)
    *applied, (outcome, wait_us) = session.outcomes(batch)
    assert [value for _, value in applied] == [1, 2, 3]
    assert outcome == Outcome.LIMITED
    assert 0 < wait_us <= interval_us


def test_limit_is_shared_by_all_boards(redis: redis_client.Redis) -> None:
    main, weekly = Session(redis), Session(redis, "weekly", "other")
    main.outcomes([add("ann", 1, "s1", 1)] * 3)
    assert weekly.outcomes([add("ann", 1, "s1", 1)])[0][0] == Outcome.LIMITED


def test_boards_keep_scores_of_their_own(redis: redis_client.Redis) -> None:
    main, weekly = Session(redis), Session(redis, "weekly", "other")
    main.outcomes([add("ann", 1)])
    weekly.outcomes([add("ann", 10)])
    assert (main.ranking(), weekly.ranking()) == ([("ann", 1)], [("ann", 10)])


def span_of(session: Session, offset: int) -> str:
    seconds, microseconds = session.client.time()
    return f"{session.keys.ratelimit}{(seconds * 1_000_000 + microseconds) // SPAN_US + offset}"


def test_arrival_too_far_ahead_locks_nobody_out_for_longer_than_the_window(session: Session) -> None:
    interval_us, _ = LIMITS[0]
    session.client.hset(span_of(session, 0), "s1", 2**53)
    assert session.outcomes([add("ann", 1, "s1", 1)]) == [(Outcome.LIMITED, interval_us)]


def test_clock_set_back_forgets_limits(session: Session) -> None:
    session.client.hset(span_of(session, 1), "s1", 2**53)
    assert session.outcomes([add("ann", 1, "s1", 1)]) == [(Outcome.APPLIED, 1)]


def test_limit_spent_in_the_last_span_still_counts(session: Session) -> None:
    session.outcomes([add("ann", 1, "s1", 1)] * 3)
    session.client.rename(span_of(session, 0), span_of(session, -1))
    assert session.outcomes([add("ann", 1, "s1", 1)])[0][0] == Outcome.LIMITED


def test_limits_are_freed_after_three_spans(session: Session) -> None:
    session.client.hset(span_of(session, -2), "s1", 1)
    session.outcomes([add("ann", 1, "s1", 1)])
    assert session.limited() == {"s1"}
    assert session.client.exists(span_of(session, -2)) == 0
    assert 0 < session.client.pttl(span_of(session, 0)) <= 3 * SPAN_US // 1000


def test_batch_without_an_accepted_update_leaves_no_event(session: Session) -> None:
    session.outcomes([add("ann", MAX_SCORE)])
    session.client.delete(session.keys.outbox)
    assert session.outcomes([add("ann", 1)]) == [(Outcome.OUT_OF_RANGE, MAX_SCORE)]
    assert not session.client.exists(session.keys.outbox)


def test_full_batch_of_512_different_players_is_applied(session: Session) -> None:
    batch = [add(f"p{number}", number, f"t{number}", 2) for number in range(512)]
    assert session.outcomes(batch) == [(Outcome.APPLIED, number) for number in range(512)]
    assert len(session.events()) == 512
