"""The oracle: one small in-memory scoreboard that says what Redis must say."""

from __future__ import annotations

import dataclasses

from server.events import MAX_SCORE
from server.scores import Outcome


@dataclasses.dataclass(frozen=True)
class Update:
    """One change asked for. `limit` indexes into the model's limits; 0 is unlimited."""

    player: str
    delta: int
    subject: str
    limit: int


class BoardModel:
    """One board, its limits and its outbox."""

    def __init__(self, limits: list[tuple[int, int]]) -> None:
        """`limits` are (interval, burst): time stands still, so a subject gets exactly `burst` updates."""
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
            # A subject may meet both limits: GCRA keeps one time for it, so each asks what is spent in its own units.
            if self.spent.get(update.subject, 0) >= burst:
                return Outcome.LIMITED, 0
            self.spent[update.subject] = self.spent.get(update.subject, 0) + 1
        score = self.scores.get(update.player, 0)
        total = score + update.delta
        if abs(total) > MAX_SCORE:
            return Outcome.OUT_OF_RANGE, score
        self.scores[update.player] = total
        self.events.append((update.player, update.delta, total))
        return Outcome.APPLIED, total

    def ranking(self) -> list[tuple[str, int]]:
        """Highest first, equal scores by player id (as bytes) descending."""
        return sorted(self.scores.items(), key=lambda entry: (entry[1], entry[0].encode()), reverse=True)
