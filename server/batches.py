"""Batches: what goes to apply_updates.lua, and what comes back. The two files say the same and change together.

Pure: knows no connection, no clock and no HTTP.
"""

from __future__ import annotations

import enum
import hashlib
import time
from typing import Any, Final, NamedTuple

import msgspec

from server.config import Settings
from server.events import FINGERPRINT_LENGTH
from server.key_types import HASH, STRING, Kind
from server.keys import BoardKeys, Keys

APPLIED: Final = 0
COLD: Final = 1
"""States of a whole batch: Redis has no scoreboard of the batch's epoch. Any other: its number is below the last."""

_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(list[int]).decode


class Outcome(enum.IntEnum):
    """What the script made of one update; the value that comes with it stands behind."""

    APPLIED = 0  # the new score
    LIMITED = 1  # how long to wait, in µs
    OUT_OF_RANGE = 2  # the score it would have been added to
    DAMAGED = 3  # nothing: key or member was missing, so a rebuild is needed
    REPLAYED = 4  # the score answered first: nothing was changed
    REUSED = 5  # nothing: the idempotency key came with another payload before
    CROWDED = 6  # nothing: the subject has too many answers kept


class IdempotencyKey(NamedTuple):
    """What a request is remembered by: `name` of server.keys.idempotency_name, and its payload's fingerprint.

    `counted` is the subject whose number of keys is capped, "" when nobody's is.
    """

    name: str
    fingerprint: str
    counted: str


_NO_KEY: Final = IdempotencyKey("", "", "")


def fingerprint(board: str, player: str, delta: int) -> str:
    """Tells payloads apart: FINGERPRINT_LENGTH characters."""
    text = f"{board}\n{player}\n{delta}".encode()  # neither name holds a line end
    return hashlib.blake2b(text, digest_size=FINGERPRINT_LENGTH // 2).hexdigest()


class Batch:
    """One numbered call of the script, kept until it is answered so that it may be sent again."""

    __slots__ = ("command", "epoch", "sent_again", "sent_s", "updates", "waiters")

    def __init__(self, command: bytes, epoch: str, updates: Updates) -> None:
        self.command = command
        self.epoch = epoch
        self.updates = updates
        self.waiters = updates.waiters
        self.sent_again = False
        self.sent_s = time.monotonic()


class Updates:
    """Updates in columns, as the script takes them; place i of each column is one update."""

    __slots__ = ("deltas", "keys", "players", "score_keys", "subjects", "waiters", "which")

    def __init__(self) -> None:
        self.waiters: list[Any] = []
        self.players: list[str] = []
        self.score_keys: list[str] = []
        self.deltas: list[int] = []
        self.subjects: list[str] = []
        self.which: list[int] = []
        self.keys: list[IdempotencyKey | None] = []

    def split(self, count: int) -> Updates:
        """Take the first `count` away."""
        first = Updates()
        for column in self.__slots__:
            values = getattr(self, column)
            setattr(first, column, values[:count])
            del values[:count]
        return first

    def put_first(self, first: Updates) -> None:
        """Let others come before these."""
        for column in self.__slots__:
            getattr(self, column)[:0] = getattr(first, column)


class Lane:
    """The updates of one board: those in flight, and those that wait for the next batch."""

    __slots__ = ("in_flight", "keys", "number", "session", "waiting")

    def __init__(self, keys: BoardKeys, session: str) -> None:
        self.keys = keys
        self.session = session
        self.number = 0
        self.in_flight: Batch | None = None
        self.waiting = Updates()


class Script:
    """How to put updates into words for apply_updates.lua: everything that is the same for all batches."""

    def __init__(self, settings: Settings, keys: Keys) -> None:
        self._keys = keys
        self._rules = _rules(settings)
        self._span_us = max(1_000_000, *(window_us for _, window_us in self._rules))
        self._ttl_s = settings.idempotency_ttl_s
        self._cap = settings.idempotency_max_per_subject

    def which(self, rule: int) -> int:
        """The rule as the script knows it: 0 where it limits nothing."""
        return rule if self._rules[rule - 1][0] else 0

    def argument(self, lane: Lane, epoch: str, updates: Updates) -> bytes:
        """ARGV[1] for the lane's next batch."""
        keys, board = self._keys, lane.keys
        return _encode(
            (
                keys.ready,
                lane.session,
                board.leaderboard,
                board.name,
                epoch,
                lane.number,
                updates.players,
                updates.score_keys,
                updates.deltas,
                self._limits(updates) if any(updates.which) else (),
                self._keyed(updates) if any(updates.keys) else (),
            )
        )

    def remembered(self, lane: Lane, now_s: int) -> dict[str, Kind]:
        """What a batch of the lane reads now beside boards, outbox and marker: by key, what it should be.

        None of it is made anew by a rebuild, and without it nothing is lost but what it remembers.
        """
        keys, limits, counts = self._keys, now_s * 1_000_000 // self._span_us, now_s // self._ttl_s
        spans = [f"{keys.ratelimit}{limits - ago}" for ago in (0, 1)]
        spans += [f"{keys.answer_count}{counts - ago}" for ago in (0, 1)]
        return {lane.session: STRING} | dict.fromkeys(spans, HASH)

    def _limits(self, updates: Updates) -> tuple[Any, ...]:
        return self._keys.ratelimit, self._span_us, self._rules, updates.subjects, updates.which

    def _keyed(self, updates: Updates) -> tuple[Any, ...]:
        names, fingerprints, counted = zip(*(key or _NO_KEY for key in updates.keys), strict=True)
        return self._keys.answer, self._keys.answer_count, self._ttl_s, self._cap, names, fingerprints, counted


def read_reply(reply: bytes) -> tuple[int, list[int]]:
    """The state of a batch, and (outcome, value) of each update, flat."""
    state, *results = _decode(reply)
    return state, results


def _rules(settings: Settings) -> list[tuple[int, int]]:
    """GCRA's (emission interval, window) in µs: that of players and that of game servers; (0, 0) is no limit."""
    rates = (
        (settings.rate_limit_per_second, settings.rate_limit_burst),
        (settings.rate_limit_writers_per_second, settings.rate_limit_writers_burst),
    )
    intervals = [(round(1_000_000 / rate), burst) if rate else (0, 0) for rate, burst in rates]
    return [(interval_us, interval_us * burst) for interval_us, burst in intervals]
