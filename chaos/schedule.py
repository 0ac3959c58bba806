"""What is done to which part, and when: drawn from a seed, so that the same seed does the same again.

Pure: knows no process and no clock.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Final, Literal, NamedTuple

PARTS: Final = ("server", "relay", "second relay", "persister", "Redis", "Kafka", "PostgreSQL")

LOSSES: Final = ("truncate", "promote", "flush")
LARGEST_CUT_BYTES: Final = 500_000
"""About half a second of a full load."""

PAUSES: Final = 0.25
"""Share of the hits that are a SIGSTOP."""

PAIRS: Final = 0.35
"""Share of the steps that hit two parts at once, or one just behind the other."""

LONGEST_DOWN_S: Final = 2.5
LONGEST_PAUSE_S: Final = 5.0
"""Longer than the relay's lease and the request deadline, of 2 s each: a part that wakes finds the world changed."""

LONGEST_QUIET_S: Final = 3.0

OUTAGE_S: Final = 120.0
HANG_S: Final = 60.0
"""Of the stores whose absence nobody should notice."""


class Hit(NamedTuple):
    """One part, killed with -9 or paused `after_s` into its step, and started again or resumed `for_s` later."""

    part: str
    how: Literal["kill", "pause"]
    after_s: float
    for_s: float


class Step(NamedTuple):
    """The hits that overlap, then `quiet_s` from the moment all parts answer again."""

    hits: tuple[Hit, ...]
    quiet_s: float


def steps(seed: int, kills: int) -> list[Step]:
    """Steps with `kills` kills between them, spread evenly over the parts."""
    rng = random.Random(seed)
    parts = _dealt(rng, PARTS)
    drawn: list[Step] = []
    left = kills
    while left:
        hit_parts = [next(parts)]
        if rng.random() < PAIRS:
            hit_parts.append(next(part for part in parts if part != hit_parts[0]))
        hits = []
        for place, part in enumerate(hit_parts):
            hit = _hit(rng, part, rng.uniform(0, 1.5) * place)
            if hit.how == "kill" and not left:
                continue
            left -= hit.how == "kill"
            hits.append(hit)
        drawn.append(Step(tuple(hits), round(rng.uniform(0.2, LONGEST_QUIET_S), 3)))
    return drawn


def outages() -> list[Step]:
    """Kafka, then PostgreSQL, away for minutes: once killed, once hanging."""
    hits = [hit for part in ("Kafka", "PostgreSQL") for hit in _long_hits(part)]
    return [Step((hit,), LONGEST_QUIET_S) for hit in hits]


def _long_hits(part: str) -> tuple[Hit, Hit]:
    return Hit(part, "kill", 0.0, OUTAGE_S), Hit(part, "pause", 0.0, HANG_S)


class Loss(NamedTuple):
    """What Redis forgets, with the relay dead for `relay_s` before it so that some of that is not in Kafka either."""

    how: str
    relay_s: float
    lag_s: float  # of the replica that is promoted
    cut_bytes: int  # off the end of the append-only file
    quiet_s: float


def losses(seed: int, count: int) -> list[Loss]:
    """`count` losses, spread evenly over the ways there are."""
    rng = random.Random(seed)
    ways = _dealt(rng, LOSSES)
    return [
        Loss(
            how=next(ways),
            relay_s=round(rng.choice((0, rng.uniform(0.05, 0.5))), 3),
            lag_s=round(rng.uniform(0.05, 1.5), 3),
            cut_bytes=rng.randint(1, LARGEST_CUT_BYTES),
            quiet_s=round(rng.uniform(1, LONGEST_QUIET_S), 3),
        )
        for _ in range(count)
    ]


def _dealt(rng: random.Random, cards: tuple[str, ...]) -> Iterator[str]:
    while True:
        deck = list(cards)
        rng.shuffle(deck)
        yield from deck


def _hit(rng: random.Random, part: str, after_s: float) -> Hit:
    if rng.random() < PAUSES:
        return Hit(part, "pause", round(after_s, 3), round(rng.uniform(0.3, LONGEST_PAUSE_S), 3))
    return Hit(part, "kill", round(after_s, 3), round(rng.uniform(0.1, LONGEST_DOWN_S), 3))
