"""Pages: the first players of a board as clients see them, and those who wait for them.

Pure: knows no connection and no HTTP.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import msgspec

from server.database import Entry
from server.keys import BoardKeys, BoardsKeys
from server.redis_connection import pack

KEPT_PAGES: Final = 64
"""Pages to remember at most while nobody reads them: of 1000 players with long names, one takes 400 KB."""


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


class Pages:
    """The pages that were asked for of late, by (board, limit); what nobody reads any more goes, the oldest first."""

    def __init__(self, keys: BoardsKeys) -> None:
        self._keys = keys
        self._pages: dict[tuple[str, int], Page] = {}

    def __iter__(self) -> Iterator[Page]:
        return iter(self._pages.values())

    def of(self, board: str, limit: int) -> Page:
        """The page, made when it is not there."""
        place = board, limit
        page = self._pages.pop(place, None)
        if page is None:
            self.forget(KEPT_PAGES - 1)
            page = Page(self._keys.board(board), limit)
        self._pages[place] = page  # a dict keeps its order: who is asked for stands last
        return page

    def forget(self, kept: int = KEPT_PAGES) -> None:
        """Keep that many; those with readers stay, however many, for each reader is owed an answer."""
        over = len(self._pages) - kept
        if over > 0:
            idle = [place for place, page in self._pages.items() if not page.in_flight and not page.waiters]
            for place in idle[:over]:
                del self._pages[place]


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
