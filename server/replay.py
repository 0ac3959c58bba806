"""The pure part of verifying and rebuilding Redis: where to read the log from, and what its events come to.

Rather refuses than guesses. Knows no Kafka client, no Redis and no clock.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

from server.errors import NotReady
from server.events import FINGERPRINT_LENGTH, INDEX_SPAN, ScoreEvent
from server.fences import Epochs

Version = tuple[int, int]
"""(ms, seq * INDEX_SPAN + index), see ScoreEvent.version."""

NEVER: Final[Version] = (0, 0)


class Log(NamedTuple):
    """A topic as the brokers know it: its id, and by partition the offsets of its first record and past its last."""

    topic_id: str
    bounds: dict[int, tuple[int, int]]


class StoredOffset(NamedTuple):
    """Up to where the database has one partition of the topic that had this id."""

    topic_id: str
    next_offset: int
    epochs: Epochs = MappingProxyType({})
    """Of the last fences before that offset, see server/fences.py."""


class Fold:
    """The latest score of every player that events told of."""

    __slots__ = ("_latest", "last")

    def __init__(self) -> None:
        self.last = NEVER
        """The largest version seen, of whichever player."""
        self._latest: dict[tuple[str, str], tuple[Version, int]] = {}

    def __len__(self) -> int:
        return len(self._latest)

    def add(self, event: ScoreEvent) -> None:
        """Take an event, in any order and any number of times."""
        self.learn(event.board, event.player_id, event.new_score, event.version)

    def learn(self, board: str, player: str, score: int, version: Version) -> None:
        """Take what an event of this version made of a score."""
        known = self._latest.get((board, player))
        if known is None or version > known[0]:
            self._latest[board, player] = version, score
            self.last = max(self.last, version)

    def settle(self, board: str, player: str, score: int, version: Version) -> int:
        """The score of a player the database knows too, who is done with now."""
        self.last = max(self.last, version)
        known = self._latest.pop((board, player), None)
        return known[1] if known is not None and known[0] > version else score

    def rest(self) -> Iterator[tuple[str, str, int]]:
        """(board, player, score) of those that are not done with."""
        for (board, player), (_, score) in self._latest.items():
            yield board, player, score


def end_of_entry(entry_id: str) -> Version:
    """The version that no event of this outbox entry, nor of one before it, lies above."""
    ms, seq = map(int, entry_id.split("-"))
    return ms, seq * INDEX_SPAN + INDEX_SPAN - 1


def entry_of(version: Version) -> str:
    """The id of the outbox entry that an event of this version was in."""
    ms, seq = version
    return f"{ms}-{seq // INDEX_SPAN}"


def may_begin_too_late(log: Log, starts: Mapping[int, int]) -> bool:
    """Whether records that were to be read, from `starts` on, may have expired: a partition has none before them."""
    return any(low and starts[number] <= low for number, (low, _) in log.bounds.items())


def kept_answer(memory: str, score: int) -> tuple[str, str]:
    """(name, answer) as apply_updates.lua keeps them for an event with this memory."""
    return memory[FINGERPRINT_LENGTH:], memory[:FINGERPRINT_LENGTH] + str(score)


def tail_starts(topic: str, log: Log | None, stored: Mapping[int, StoredOffset], *, restart: bool) -> dict[int, int]:
    """By partition, the offset of the first record that the database does not have.

    `restart` goes on with what there is. Raises NotReady, saying what to do, where records are missing.
    """
    if restart:
        stored = {number: offset for number, offset in stored.items() if log and offset.topic_id == log.topic_id}
    if log is None:
        if stored:
            raise NotReady(f"there is no Kafka topic {topic}, but the database has read from it: {_REMEDY}")
        return {}
    others = sorted({offset.topic_id for offset in stored.values()} - {log.topic_id})
    if others:
        raise NotReady(
            f"the Kafka topic {topic} was made anew: the database has read the id {', '.join(others)}, "
            f"it has {log.topic_id}: {_REMEDY}"
        )
    starts = {}
    for number, (low, high) in log.bounds.items():
        wanted = stored[number].next_offset if number in stored else 0
        if not restart and not low <= wanted <= high:
            raise NotReady(
                f"the log of {topic}/{number} holds the offsets {low} to {high}, but the database goes on at {wanted}"
                f"{'' if stored else ', for it has read nothing yet'}: {_REMEDY}"
            )
        starts[number] = min(max(low, wanted), high)
    return starts


_REMEDY: Final = (
    "the wrong KAFKA_BROKERS or DATABASE_URL, or events that are gone for good. "
    "To go on with what there is, set KAFKA_NEW_TOPIC=restart"
)
