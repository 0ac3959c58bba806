"""The oracle: one small in-memory scoreboard that says what Redis must say."""

from __future__ import annotations

import dataclasses

from server.batches import Outcome, fingerprint
from server.events import MAX_SCORE
from server.keys import idempotency_name


@dataclasses.dataclass(frozen=True)
class Update:
    """One change asked for. `limit` indexes into the model's limits; 0 is unlimited."""

    player: str
    delta: int
    subject: str
    limit: int
    key: str = ""


@dataclasses.dataclass(frozen=True)
class Kept:
    """What is remembered for an idempotency key."""

    player: str
    delta: int
    score: int


class BoardModel:
    """One board, its limits and its outbox."""

    def __init__(self, limits: list[tuple[int, int]], cap: int) -> None:
        """`limits` are (interval, burst): time stands still, so a subject gets exactly `burst` updates.

        `cap` is how many answers are kept for a subject whose limit is not the second.
        """
        self.cap = cap
        self.answers: dict[tuple[str, str], Kept] = {}
        self.memories: list[str] = []
        self.limits = limits
        self.scores: dict[str, int] = {}
        self.spent: dict[str, int] = {}
        self.events: list[tuple[str, int, int]] = []

    def apply(self, batch: list[Update]) -> list[tuple[int, int]]:
        """(outcome, value) of each update; the value of LIMITED is whatever the clock makes it, here 0."""
        return [self._apply(update) for update in batch]

    def _apply(self, update: Update) -> tuple[int, int]:
        if update.limit:
            _, burst = self.limits[update.limit - 1]
            if self.spent.get(update.subject, 0) >= burst:
                return Outcome.LIMITED, 0
            self.spent[update.subject] = self.spent.get(update.subject, 0) + 1
        kept = self.answers.get((update.subject, update.key)) if update.key else None
        if kept is not None:
            same = (kept.player, kept.delta) == (update.player, update.delta)
            return (Outcome.REPLAYED, kept.score) if same else (Outcome.REUSED, 0)
        owned = sum(subject == update.subject for subject, _ in self.answers)
        if update.key and update.limit != 2 and owned >= self.cap:
            return Outcome.CROWDED, 0
        score = self.scores.get(update.player, 0)
        total = score + update.delta
        if abs(total) > MAX_SCORE:
            return Outcome.OUT_OF_RANGE, score
        self.scores[update.player] = total
        self.events.append((update.player, update.delta, total))
        if update.key:
            self.answers[update.subject, update.key] = Kept(update.player, update.delta, total)
            name = idempotency_name(update.subject, update.key)
            self.memories.append(fingerprint("main", update.player, update.delta) + name)
        return Outcome.APPLIED, total

    def ranking(self) -> list[tuple[str, int]]:
        """Highest first, equal scores by player id (as bytes) descending."""
        return sorted(self.scores.items(), key=lambda entry: (entry[1], entry[0].encode()), reverse=True)
