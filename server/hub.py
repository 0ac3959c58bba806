"""Who watches what, what changed, who lags: the live board without any I/O.

Events only mark players as changed. A flush then reads the boards from Redis and says here what it read; the hub
answers with what to send to whom. So late or repeated events never turn a score back, and a watcher that joins, or
that lagged, is brought up to date by the same flush that serves everybody else: whatever order things happen in,
each connection sees Redis move forward. Knows no sockets, no Redis and no clock: `now_ms` is an argument.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator
from typing import Any, Final

from server.budget import Budget
from server.messages import list_message, score_message, skipped_message

Entry = tuple[str, int]
"""(player, score)"""

SHARD_SIZE: Final = 100
"""Watchers of one topic: publishing to one topic is one turn of the loop, and a POST waits for no more than that."""

LAGGING_LIMIT_MS: Final = 30_000
"""A connection that lags longer than this is closed."""

FLUSH_SHARE: Final = 0.7
"""Share of the loop's time that flushing may take; the interval stretches until it is kept."""

MAX_SCORE_UPDATES: Final = 200
MAX_FRAMES: Final = 100_000
"""Most score updates of a flush for those who want all, and most frames (updates times watchers) they may make."""


@dataclasses.dataclass(slots=True, eq=False)
class Watcher:
    """One connection: what it asked for, and where it stands."""

    board: str
    limit: int
    all_scores: bool
    players: set[str]
    connection: Any = None
    """Whatever the caller sends to; the hub only hands it back."""
    shard: Shard | None = None
    """Where it is subscribed; None until its snapshot, and while it lags."""
    resync: bool = False
    asked: set[str] = dataclasses.field(default_factory=set)
    """Players whose current score the next flush owes it."""
    lagging_since_ms: int | None = None
    address: str | None = None
    """Where it comes from, as limits count it; None for one that no limit by address counts."""
    messages: Budget = dataclasses.field(default_factory=Budget)
    """For what it sends."""
    errors: Budget = dataclasses.field(default_factory=Budget)
    """For what it sends that makes no sense."""
    told_trouble: str = ""
    """Why it was last told that the board is not live; silence means that it is."""


@dataclasses.dataclass(slots=True, eq=False)
class Shard:
    """Up to SHARD_SIZE watchers of the same list and mode, served by one topic."""

    topic: bytes
    limit: int
    all_scores: bool
    watchers: set[Watcher] = dataclasses.field(default_factory=set)
    unchecked_bytes: int = 0
    """Published since its watchers' buffers were last looked at: none of them can have grown by more."""


@dataclasses.dataclass(slots=True)
class Read:
    """What a flush needs of one board: its first `limit` players, and the scores of `players`."""

    board: str
    limit: int
    players: list[str]


@dataclasses.dataclass(slots=True)
class Publish:
    """Send `messages` to everyone in `shard`, in one turn of the loop."""

    shard: Shard
    messages: list[bytes]


@dataclasses.dataclass(slots=True)
class Send:
    """Send `messages` to one watcher, then subscribe it to the topic of its shard if `joined`."""

    watcher: Watcher
    messages: list[bytes]
    joined: bool


@dataclasses.dataclass(slots=True)
class _List:
    """The first `limit` players as last published. `seq` rises by one with every change."""

    seq: int = 0
    entries: list[Entry] | None = None


class _Board:
    """One board's watchers and changes."""

    __slots__ = (
        "changed", "dirty", "lists", "name", "named", "oldest_ms", "reading", "reading_oldest_ms", "serving", "shards",
        "waiting", "watchers",
    )  # fmt: skip

    def __init__(self, name: str) -> None:
        self.name = name
        self.watchers: set[Watcher] = set()
        self.waiting: set[Watcher] = set()  # the next flush owes them a snapshot, or scores they asked for
        self.serving: dict[Watcher, set[str]] = {}  # those whom the flush under way serves, and what they asked for
        self.named: dict[str, set[Watcher]] = {}
        self.shards: dict[tuple[int, bool], list[Shard]] = {}
        self.lists: dict[int, _List] = {}
        self.dirty: set[str] = set()
        self.reading: set[str] = set()  # dirty players of the flush under way
        self.oldest_ms: int | None = None  # when the oldest change was applied that no flush has taken up
        self.reading_oldest_ms: int | None = None  # the same of the flush under way
        self.changed = False

    @property
    def needs_flush(self) -> bool:
        return bool(self.waiting) or (bool(self.watchers) and self.changed)


class Hub:
    """All boards of one process."""

    def __init__(self, interval_ms: int) -> None:
        """`interval_ms` is how long changes gather after a flush; the first one after a pause goes out at once."""
        self._interval_ms = interval_ms
        self._boards: dict[str, _Board] = {}
        self._next_flush_ms = 0.0
        self.watchers = 0
        self.score_updates_skipped = 0
        self.lagging: set[Watcher] = set()

    # ------------------------------------------------------------------ connections

    def join(self, watcher: Watcher) -> None:
        """A new connection: the next flush sends it a snapshot and subscribes it."""
        board = self._board(watcher.board)
        board.watchers.add(watcher)
        board.waiting.add(watcher)
        watcher.asked |= watcher.players
        self._name(board, watcher, watcher.players)
        self.watchers += 1

    def leave(self, watcher: Watcher) -> None:
        """The connection is gone."""
        board = self._board(watcher.board)
        board.watchers.discard(watcher)
        board.waiting.discard(watcher)
        board.serving.pop(watcher, None)
        self._unname(board, watcher, set(watcher.players))
        self._leave_shard(watcher)
        self.lagging.discard(watcher)
        self.watchers -= 1

    def subscribe(self, watcher: Watcher, players: set[str]) -> None:
        """Follow `players` by name too; the next flush answers with their scores."""
        board = self._board(watcher.board)
        watcher.players |= players
        watcher.asked |= players
        self._name(board, watcher, players)
        if watcher.lagging_since_ms is None:
            board.waiting.add(watcher)

    def unsubscribe(self, watcher: Watcher, players: set[str]) -> None:
        """Follow `players` by name no longer."""
        self._unname(self._board(watcher.board), watcher, players & watcher.players)
        watcher.players -= players
        watcher.asked -= players

    def lag(self, watcher: Watcher, now_ms: int) -> Shard | None:
        """The client does not keep up: it gets nothing more for now. Returns the shard it was in."""
        board = self._board(watcher.board)
        board.waiting.discard(watcher)
        board.serving.pop(watcher, None)
        if watcher.lagging_since_ms is None:
            watcher.lagging_since_ms = now_ms
            self.lagging.add(watcher)
        return self._leave_shard(watcher)

    def drained(self, watcher: Watcher) -> None:
        """A lagging client has read everything: the next flush sends it a full snapshot."""
        if watcher.lagging_since_ms is None:
            return
        watcher.lagging_since_ms = None
        self.lagging.discard(watcher)
        watcher.resync = True
        watcher.asked |= watcher.players
        self._board(watcher.board).waiting.add(watcher)

    def overdue(self, now_ms: int) -> list[Watcher]:
        """Those that have lagged for too long."""
        return [each for each in self.lagging if now_ms - (each.lagging_since_ms or now_ms) > LAGGING_LIMIT_MS]

    # ------------------------------------------------------------------ changes

    def mark(self, changes: Iterable[tuple[str, str]], oldest_ms: int | None = None) -> None:
        """Events arrived for these (board, player), the oldest of them applied at that Unix time where it is known."""
        for name, player in changes:
            board = self._boards.get(name)
            if board is not None and board.watchers:
                board.dirty.add(player)
                board.changed = True
                board.oldest_ms = _older(board.oldest_ms, oldest_ms)

    def mark_lists(self) -> None:
        """Anything may have changed: read every list again."""
        for board in self._boards.values():
            board.changed = True

    # ------------------------------------------------------------------ flushing

    def flush_delay_ms(self, now_ms: float) -> float | None:
        """How long to wait before the next flush; None when there is nothing to flush."""
        if not any(board.needs_flush for board in self._boards.values()):
            return None
        return max(0.0, self._next_flush_ms - now_ms)

    def begin_flush(self) -> list[Read]:
        """What to read. What changes from now on belongs to the next flush."""
        reads = []
        for board in self._boards.values():
            if not board.needs_flush:
                continue
            board.changed = False
            board.reading, board.dirty = board.dirty, set()
            board.reading_oldest_ms, board.oldest_ms = board.oldest_ms, None
            for watcher in board.waiting:
                board.serving[watcher], watcher.asked = watcher.asked, set()
            board.waiting.clear()
            reads.append(Read(board.name, self._longest(board), list(self._wanted(board))))
        return reads

    def abandon_flush(self) -> None:
        """The read failed: all of it is still to be done."""
        for name in self._boards:
            self.abandon(name)

    def abandon(self, name: str) -> None:
        """The read of one board failed."""
        board = self._boards[name]
        board.dirty |= board.reading
        board.reading = set()
        board.oldest_ms = _older(board.oldest_ms, board.reading_oldest_ms)
        for watcher, asked in board.serving.items():
            watcher.asked |= asked
            board.waiting.add(watcher)
        board.serving.clear()
        board.changed = True

    def publish(
        self, name: str, top: list[Entry], scores: dict[str, int], unix_ms: int | None = None
    ) -> Iterator[Publish | Send]:
        """What to send, given what was read of a board; shards first, so that nobody gets this flush twice.

        Given the time, lists that changed tell how long ago the oldest of their changes was applied.
        """
        board = self._board(name)
        reading, board.reading = board.reading, set()
        updates = {
            player: score_message(name, player, score)
            for player in reading
            if (score := scores.get(player)) is not None
        }
        lists = self._advance_lists(board, top)
        chosen = self._choose(board, updates.keys(), top)
        self.score_updates_skipped += len(updates) - len(chosen)
        oldest_ms = board.reading_oldest_ms
        delay_ms = None if unix_ms is None or oldest_ms is None else max(0, unix_ms - oldest_ms)
        yield from self._to_shards(board, lists, updates, chosen, delay_ms)
        yield from self._to_named(board, updates, chosen)
        yield from self._to_served(board, scores)

    def end_flush(self, started_ms: float, busy_ms: float) -> None:
        """The flush begun at `started_ms` kept the loop busy for `busy_ms`: decides when the next may begin."""
        self._next_flush_ms = started_ms + max(self._interval_ms, busy_ms / FLUSH_SHARE)

    @property
    def shards(self) -> Iterator[Shard]:
        """Every shard there is."""
        for board in self._boards.values():
            for group in board.shards.values():
                yield from group

    # ------------------------------------------------------------------ inside

    def _board(self, name: str) -> _Board:
        board = self._boards.get(name)
        if board is None:
            board = self._boards[name] = _Board(name)
        return board

    @staticmethod
    def _wanted(board: _Board) -> set[str]:
        """Players whose scores somebody gets to see in this flush."""
        followed = board.reading
        if not any(all_scores for _, all_scores in board.shards):
            followed = followed & board.named.keys()
        return followed.union(*board.serving.values())

    @staticmethod
    def _longest(board: _Board) -> int:
        limits = {limit for limit, _ in board.shards} | {watcher.limit for watcher in board.serving}
        # With everybody lagging there is no list to read; 0 would be the whole board.
        return max(limits, default=1)

    @staticmethod
    def _advance_lists(board: _Board, top: list[Entry]) -> dict[int, bool]:
        """Take over what was read; which lists changed by it."""
        limits = {limit for limit, _ in board.shards} | {watcher.limit for watcher in board.serving}
        changed = {}
        for limit in limits:
            each = board.lists.setdefault(limit, _List())
            entries = top[:limit]
            changed[limit] = entries != each.entries
            if changed[limit]:
                each.entries, each.seq = entries, each.seq + 1
        return changed

    @staticmethod
    def _list_message(board: _Board, limit: int, delay_ms: int | None = None, *, resync: bool = False) -> bytes:
        each = board.lists[limit]
        return list_message(board.name, each.seq, each.entries or (), delay_ms, resync=resync)

    @staticmethod
    def _choose(board: _Board, changed: Collection[str], top: list[Entry]) -> set[str]:
        """Whose updates go to those who want all scores: everybody's, or the most wanted ones in a flood."""
        watchers = sum(len(shard.watchers) for (_, every), group in board.shards.items() if every for shard in group)
        room = min(MAX_SCORE_UPDATES, max(1, MAX_FRAMES // max(1, watchers)))
        if len(changed) <= room:
            return set(changed)
        wanted = {player for player, _ in top} | board.named.keys()
        return set(sorted(changed, key=lambda player: player not in wanted)[:room])

    def _to_shards(
        self,
        board: _Board,
        changed: dict[int, bool],
        updates: dict[str, bytes],
        chosen: set[str],
        delay_ms: int | None,
    ) -> Iterator[Publish]:
        scores = [updates[player] for player in chosen]
        if len(chosen) < len(updates):
            scores.append(skipped_message(len(updates) - len(chosen)))
        lists = {limit: self._list_message(board, limit, delay_ms) for limit, _ in board.shards if changed[limit]}
        for (limit, all_scores), shards in list(board.shards.items()):
            messages = [lists[limit]] if limit in lists else []
            if all_scores:
                messages += scores
            if messages:
                yield from (Publish(shard, messages) for shard in list(shards))

    @staticmethod
    def _to_named(board: _Board, updates: dict[str, bytes], chosen: set[str]) -> Iterator[Send]:
        messages: dict[Watcher, list[bytes]] = {}
        for player in updates.keys() & board.named.keys():
            for watcher in board.named[player]:
                # A shard with all scores has had it; one that is being served gets it with what it asked for.
                had = watcher.all_scores and player in chosen
                if watcher.shard is not None and not had and player not in board.serving.get(watcher, ()):
                    messages.setdefault(watcher, []).append(updates[player])
        yield from (Send(watcher, texts, joined=False) for watcher, texts in messages.items())

    def _to_served(self, board: _Board, scores: dict[str, int]) -> Iterator[Send]:
        snapshots: dict[int, bytes] = {}
        while board.serving:  # shrinks by itself when somebody leaves, or begins to lag, meanwhile
            watcher, asked = board.serving.popitem()
            messages, joining = [], watcher.shard is None
            if joining and watcher.resync:
                messages.append(self._list_message(board, watcher.limit, resync=True))
            elif joining:
                if watcher.limit not in snapshots:
                    snapshots[watcher.limit] = self._list_message(board, watcher.limit)
                messages.append(snapshots[watcher.limit])
            watcher.resync = False
            messages += [score_message(board.name, player, scores[player]) for player in asked if player in scores]
            if joining:
                self._join_shard(board, watcher)
            yield Send(watcher, messages, joining)

    def _join_shard(self, board: _Board, watcher: Watcher) -> None:
        group = board.shards.setdefault((watcher.limit, watcher.all_scores), [])
        shard = min((shard for shard in group if len(shard.watchers) < SHARD_SIZE), key=_size, default=None)
        if shard is None:
            mode = "all" if watcher.all_scores else "none"
            taken = {shard.topic for shard in group}
            number = next(n for n in range(len(group) + 1) if _topic(board.name, watcher.limit, mode, n) not in taken)
            shard = Shard(_topic(board.name, watcher.limit, mode, number), watcher.limit, watcher.all_scores)
            group.append(shard)
        shard.watchers.add(watcher)
        watcher.shard = shard

    def _leave_shard(self, watcher: Watcher) -> Shard | None:
        shard, watcher.shard = watcher.shard, None
        if shard is not None:
            shard.watchers.discard(watcher)
            if not shard.watchers:
                self._drop_shard(self._board(watcher.board), shard)
        return shard

    @staticmethod
    def _drop_shard(board: _Board, shard: Shard) -> None:
        group = board.shards[shard.limit, shard.all_scores]
        group.remove(shard)
        if not group:
            del board.shards[shard.limit, shard.all_scores]

    @staticmethod
    def _name(board: _Board, watcher: Watcher, players: set[str]) -> None:
        for player in players:
            board.named.setdefault(player, set()).add(watcher)

    @staticmethod
    def _unname(board: _Board, watcher: Watcher, players: set[str]) -> None:
        for player in players:
            watchers = board.named.get(player)
            if watchers is not None:
                watchers.discard(watcher)
                if not watchers:
                    del board.named[player]


def _older(one_ms: int | None, other_ms: int | None) -> int | None:
    known = [each for each in (one_ms, other_ms) if each is not None]
    return min(known, default=None)


def _size(shard: Shard) -> int:
    return len(shard.watchers)


def _topic(board: str, limit: int, mode: str, number: int) -> bytes:
    return f"{board}:{limit}:{mode}:{number}".encode()
