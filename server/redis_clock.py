"""Redis' own time, which outbox ids and events carry: what their age is measured against.

Pure: whoever asks Redis for its TIME says here what came. Until then this machine's clock stands in for it.
"""

from __future__ import annotations

import time
from typing import Any


class RedisClock:
    """How far the clock of one Redis is from this process's monotonic clock, as last asked.

    Read from several threads; one writes.
    """

    __slots__ = ("_ahead_ms",)

    def __init__(self) -> None:
        self._ahead_ms = 1000 * (time.time() - time.monotonic())

    def learn(self, reply: Any, asked_s: float, answered_s: float) -> None:
        """Take the reply to TIME, which is (Unix seconds, µs), and when it was asked for and came (monotonic)."""
        seconds, micros = reply
        # The middle of the two is wrong by half of the round trip at most.
        self._ahead_ms = 1000 * int(seconds) + int(micros) / 1000 - 500 * (asked_s + answered_s)

    def now_ms(self) -> int:
        """Unix time in ms, now."""
        return self.at_ms(time.monotonic())

    def at_ms(self, moment_s: float) -> int:
        """Unix time in ms at a moment of the monotonic clock."""
        return int(1000 * moment_s + self._ahead_ms)

    def moment_s(self, unix_ms: int) -> float:
        """The moment of the monotonic clock at a Unix time in ms."""
        return (unix_ms - self._ahead_ms) / 1000

    def age_s(self, unix_ms: int | None) -> float:
        """How long ago that was; 0 for None, and for what is still to come."""
        return 0.0 if unix_ms is None else max(0, self.now_ms() - unix_ms) / 1000
