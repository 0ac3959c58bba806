"""The demo tournament: matches that can be followed, in which nobody runs away, and which somebody wins."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest

from server.demo import CEREMONY_S, FINALE_S, FINALISTS, MATCH_S, PLAYERS, Move, Tournament

SEEDS = range(5)


def match(seed: int) -> Iterator[tuple[float, Move, dict[str, int]]]:
    """(seconds since it began, move, scores behind it) of a first match."""
    tournament = Tournament(PLAYERS, random.Random(seed))
    played_s = 0.0
    for number in itertools.count():
        move = tournament.next()
        if move.after_s == CEREMONY_S:
            return
        tournament.scores[move.player] += move.delta
        if number >= len(PLAYERS):
            played_s += move.after_s
            yield played_s, move, dict(tournament.scores)


def leader(scores: dict[str, int]) -> str:
    return max(scores, key=lambda player: (scores[player], player))


@pytest.mark.parametrize("seed", SEEDS)
def test_everybody_scores_and_the_field_stays_together(seed: int) -> None:
    scores = [scores for played_s, _, scores in match(seed) if played_s < MATCH_S - FINALE_S][-1]
    ranked = sorted(scores.values())
    assert ranked[0] > 0
    assert ranked[-1] < 2.5 * ranked[len(ranked) // 2]


@pytest.mark.parametrize("seed", SEEDS)
def test_lead_changes_now_and_then_but_not_all_the_time(seed: int) -> None:
    leaders = [leader(scores) for played_s, _, scores in match(seed) if played_s > 20]
    changes = sum(one != other for one, other in itertools.pairwise(leaders))
    assert 3 <= changes <= 12 * MATCH_S / 60


def test_points_come_in_bursts() -> None:
    pauses = sorted(move.after_s for _, move, _ in match(1))
    assert pauses[len(pauses) // 2] < 0.2
    assert pauses[-len(pauses) // 20] > 0.7


@pytest.mark.parametrize("seed", SEEDS)
def test_title_is_fought_for_by_the_best_in_the_end(seed: int) -> None:
    seen = list(match(seed))
    before = next(scores for played_s, _, scores in seen if played_s >= MATCH_S - FINALE_S)
    best = sorted(before, key=lambda player: before[player], reverse=True)[: FINALISTS + 1]
    final = seen[-1][2]
    assert leader(final) in best
    assert sum(final.values()) - sum(before.values()) > sum(before.values()) * FINALE_S / (MATCH_S - FINALE_S)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_score_falls_below_zero(seed: int) -> None:
    assert all(min(scores.values()) >= 0 for _, _, scores in match(seed))


def test_next_match_begins_at_zero_and_the_champion_stays_up_longest() -> None:
    tournament = Tournament(PLAYERS, random.Random(1))
    while (move := tournament.next()).after_s < CEREMONY_S:
        tournament.scores[move.player] += move.delta
    champion = leader(tournament.scores)
    assert (move.player, move.delta) == (champion, 0)
    while any(tournament.scores.values()):
        assert tournament.scores[champion]
        move = tournament.next()
        tournament.scores[move.player] += move.delta
    assert move.player == champion


def test_scores_of_an_earlier_start_are_found_out_and_taken_back() -> None:
    tournament = Tournament(PLAYERS, random.Random(1))
    for number in range(len(PLAYERS)):
        move = tournament.next()
        assert move.delta == 0
        tournament.scores[move.player] = 1000 + number
    for _ in PLAYERS:
        move = tournament.next()
        tournament.scores[move.player] += move.delta
    assert set(tournament.scores.values()) == {0}


def test_move_that_was_refused_is_not_counted() -> None:
    tournament = Tournament(PLAYERS, random.Random(1))
    for _ in range(500):
        tournament.next()
    assert set(tournament.scores.values()) == {0}


def test_same_seed_plays_the_same_match() -> None:
    assert [move for _, move, _ in match(7)] == [move for _, move, _ in match(7)]
