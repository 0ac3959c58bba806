"""The server's Redis Cluster: one Scores for each hash tag in use, and in front of them what looks like one.

Each has its own connection, to the master of its slot, and is verified, replayed and rebuilt on its own: boards whose
master is away do not hold up others. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from server.batches import IdempotencyKey
from server.instruments import RedisFigures
from server.keys import tag_of
from server.redis_clock import RedisClock
from server.scores import BoardCommand, Reader, Scores, Waiter


class Shards:
    """Picks the Scores of a board; figures are those of all together."""

    def __init__(self, by_tag: dict[str, Scores], boards: tuple[str, ...]) -> None:
        self._all = list(by_tag.values())
        self._by_board = {board: by_tag[tag_of(board)] for board in boards}

    @property
    def epoch(self) -> str | None:
        """Of all shards, or None while any of them is not ready."""
        epochs = [shard.epoch for shard in self._all if shard.epoch is not None]
        return ",".join(epochs) if len(epochs) == len(self._all) else None

    @property
    def reason(self) -> str:
        """Which boards wait, and what for."""
        waiting: dict[str, list[str]] = {}
        for board, shard in self._by_board.items():
            if shard.epoch is None:
                waiting.setdefault(shard.reason, []).append(board)
        return "; ".join(f"{', '.join(boards)}: {reason}" for reason, boards in waiting.items())

    @property
    def outbox_full(self) -> bool:
        """Whether any of the outboxes is."""
        return any(shard.outbox_full for shard in self._all)

    @property
    def outbox_used(self) -> float:
        """How much of OUTBOX_MAX_BYTES the largest one takes."""
        return max(shard.outbox_used for shard in self._all)

    @property
    def outbox_bytes(self) -> int:
        """Of all outboxes; the largest one may have OUTBOX_MAX_BYTES."""
        return sum(shard.outbox_bytes for shard in self._all)

    @property
    def outbox_since_s(self) -> float | None:
        """Since when the oldest entry in any outbox waits; see Scores."""
        return min((shard.outbox_since_s for shard in self._all if shard.outbox_since_s is not None), default=None)

    @property
    def clocks(self) -> list[RedisClock]:
        """Of all masters."""
        return [shard.clock for shard in self._all]

    def clock_of(self, board: str) -> RedisClock:
        """The clock that a board's events carry the time of, each master having its own."""
        return self._by_board.get(board, self._all[0]).clock

    @property
    def figures(self) -> RedisFigures:
        """Theirs, which they share."""
        return self._all[0].figures

    def submit(
        self,
        board: str,
        player: str,
        delta: int,
        subject: str,
        limit: int,
        waiter: Waiter,
        key: IdempotencyKey | None = None,
    ) -> None:
        """See Scores."""
        self._by_board[board].submit(board, player, delta, subject, limit, waiter, key)

    def flush(self) -> None:
        """See Scores."""
        for shard in self._all:
            shard.flush()

    def read_page(self, board: str, limit: int, reader: Reader) -> None:
        """See Scores."""
        self._by_board[board].read_page(board, limit, reader)

    def read(self, commands: list[BoardCommand], on_replies: Callable[[list[Any] | None], None]) -> None:
        """See Scores; the replies of a shard that cannot be read are None."""
        places: dict[Scores, list[int]] = {}
        for place, (board, _) in enumerate(commands):
            places.setdefault(self._by_board[board], []).append(place)
        replies: list[Any] = [None] * len(commands)
        waiting = len(places)

        def collect(of_shard: list[int], some: list[Any] | None) -> None:
            nonlocal waiting
            for place, reply in zip(of_shard, some or (), strict=some is not None):
                replies[place] = reply
            waiting -= 1
            if not waiting:
                on_replies(replies)

        for shard, of_shard in places.items():
            chosen = [commands[place] for place in of_shard]
            shard.read(chosen, partial(collect, of_shard))

    async def run(self) -> None:
        """Keep a verified connection to each master, for ever."""
        async with asyncio.TaskGroup() as group:
            for shard in self._all:
                group.create_task(shard.run())
