"""Pages: the first players of a board as clients see them, and those who wait for them.

Pure: knows no connection and no HTTP.
"""

from __future__ import annotations

from typing import Any

import msgspec

from server.database import Entry
from server.keys import BoardKeys
from server.redis_connection import pack


class Page:
    """The readers of one (board, limit): those in flight, and those that wait for the next read."""

    __slots__ = ("command", "in_flight", "json", "reply", "sent_s", "waiters")

    def __init__(self, board: BoardKeys, limit: int) -> None:
        self.command = pack(("ZREVRANGE", board.leaderboard, 0, limit - 1, "WITHSCORES"))
        self.in_flight: list[Any] = []
        self.waiters: list[Any] = []
        self.sent_s = 0.0
        self.reply: list[bytes] | None = None
        self.json = b"[]"


class Entity(msgspec.Struct, rename="camel", gc=False):
    """One line of a leaderboard, as clients see it."""

    player_id: str
    score: int


def entries_of(reply: list[bytes]) -> list[Entry]:
    """(player, score) of what ZREVRANGE … WITHSCORES says; scores come as doubles in text."""
    pairs = iter(reply)
    return [(player.decode(), int(float(score))) for player, score in zip(pairs, pairs, strict=True)]


def page_json(entries: list[Entry]) -> bytes:
    """`[{"playerId": …, "score": …}, …]`"""
    return msgspec.json.encode([Entity(player, score) for player, score in entries])
