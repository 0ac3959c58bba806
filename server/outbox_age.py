"""Since when the outbox's oldest entry waits, also when its id says something else.

An id is the time that Redis had; if its clock was ahead and was set back, ids stay in the future for as long as that
was. But ids rise: an entry is younger than a look that found a smaller last id, and older than one that found its own.
Between the two looks, the clock decides. Pure: times are arguments.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from typing import Final

from server.redis_clock import RedisClock

LOOKS_KEPT: Final = 600
"""Looks that found another last id than the one before; what is older than all of them is at least that old."""

EntryId = tuple[int, int]


@dataclasses.dataclass(slots=True)
class _Look:
    """What was the last id, and from when to when it was seen to be."""

    last_id: EntryId
    first_s: float
    until_s: float


class OutboxAge:
    """What a server sees of one outbox, look by look."""

    __slots__ = ("_after_s", "_clock", "_looks", "since_s")

    def __init__(self, clock: RedisClock) -> None:
        self.since_s: float | None = None
        """When the oldest entry was written, by the monotonic clock; None while the outbox is empty."""
        self._clock = clock
        self.forget()

    def forget(self) -> None:
        """Ids begin anew, or may: it is another Redis, or another stream."""
        self._looks: deque[_Look] = deque(maxlen=LOOKS_KEPT)
        self._after_s = -math.inf

    def look(self, oldest: bytes | None, last: bytes, now_s: float) -> None:
        """Take the id of the oldest entry, None without any, and the last one that was given."""
        last_id = _entry_id(last)
        if self._looks and last_id < self._looks[-1].last_id:
            self.forget()
        looks = self._looks
        if looks and looks[-1].last_id == last_id:
            looks[-1].until_s = now_s
        else:
            looks.append(_Look(last_id, now_s, now_s))
        if oldest is None:
            self.since_s = None
            return
        oldest_id = _entry_id(oldest)
        while looks[0].last_id < oldest_id and len(looks) > 1:
            self._after_s = looks.popleft().until_s
        told_s = self._clock.moment_s(oldest_id[0])
        self.since_s = min(max(told_s, self._after_s), looks[0].first_s)


def _entry_id(text: bytes) -> EntryId:
    ms, _, seq = text.partition(b"-")
    return int(ms), int(seq)
