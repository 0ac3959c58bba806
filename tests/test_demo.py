"""The demo tournament: everybody scores, nobody runs away, places change."""

from __future__ import annotations

import random
from collections import Counter

from server.demo import PLAYERS, Tournament


def play(updates: int, seed: int = 1) -> list[tuple[str, int]]:
    tournament = Tournament(PLAYERS, random.Random(seed))
    return [tournament.next() for _ in range(updates)]


def totals(changes: list[tuple[str, int]]) -> Counter[str]:
    scores: Counter[str] = Counter()
    for player, delta in changes:
        scores[player] += delta
    return scores


def test_everybody_scores_and_the_field_stays_close() -> None:
    scores = totals(play(5000))
    assert set(scores) == set(PLAYERS)
    assert min(scores.values()) > 0.5 * max(scores.values())


def test_the_lead_changes_hands() -> None:
    changes = play(3000)
    leaders = {totals(changes[:played]).most_common(1)[0][0] for played in range(100, 3000, 100)}
    assert len(leaders) >= 3


def test_no_score_falls_below_zero() -> None:
    changes = play(2000)
    running: Counter[str] = Counter()
    for player, delta in changes:
        running[player] += delta
        assert running[player] >= 0
