"""Chain breaks: whether each event of a player goes on from the score that the one before it made.

A break says that a change of that player is missing from the history: an event in between was lost with Redis or
Kafka, was put aside as a dead letter, counted as void though Redis had it, or the score was changed by hand. Events
that come once more are no breaks, nor is a Redis that was given back what Kafka has. Remembers the players that were
seen lately, of the partitions read now; of others, and after a start, the first event is taken as it comes.

Pure: knows no Kafka client and no database.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from server.events import INDEX_SPAN, ScoreEvent

PLAYERS: Final = 50_000
"""Players of whom the last score is remembered at least; twice as many at most, in 35 MB."""


class Chain:
    """Follows the events of one reader, which has to read each partition in order."""

    __slots__ = ("_before", "_latest", "_players", "breaks")

    def __init__(self, players: int = PLAYERS) -> None:
        self.breaks = 0
        self._players = players
        # Two generations, by hash: a list of whom was used last would cost more than all the rest.
        self._latest: dict[int, tuple[int, str, int]] = {}
        self._before: dict[int, tuple[int, str, int]] = {}

    def forget(self) -> None:
        """Read other partitions from here on: others may have moved on meanwhile what we knew."""
        self._latest, self._before = {}, {}

    def follow(self, events: Iterable[ScoreEvent]) -> None:
        """Count the breaks in these, which follow those before."""
        latest, before = self._latest, self._before
        for event in events:
            player = hash((event.board, event.player_id))
            last = latest.get(player) or before.get(player)
            if last is not None:
                at, event_id, score = last
                if event.at <= at and (event.at < at or event.version <= _version(event_id)):
                    continue  # it came once more
                if event.new_score - event.score_delta != score:
                    self.breaks += 1
            latest[player] = (event.at, event.event_id, event.new_score)
            if len(latest) >= self._players:
                before = self._before = latest
                latest = self._latest = {}


def _version(event_id: str) -> tuple[int, int]:
    ms, seq, index = event_id.split("-")
    return int(ms), int(seq) * INDEX_SPAN + int(index)
