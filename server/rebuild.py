"""Verify, replay and rebuild: may this Redis be written, and if it forgot something, give it back first.

Runs once per new connection, before any update goes over it, and again when Redis turns out to be cold. A marker
(epoch, and the run_id of the Redis process that was verified) says that the boards in this Redis are whole. What
happened is read in the direction in which events move, outbox, database, Kafka: so each event is met at least
once, and versions make more than once harmless. Before Kafka is read a fence goes into it, so that what a relay may
still deliver of a Redis that is gone counts for nobody (server/fences.py).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import aclosing, asynccontextmanager
from typing import Any, Final

import hiredis

from server.config import Settings
from server.database import Database, ScoreRow, Snapshot
from server.errors import NotReady
from server.events import MEMORY_FIELD, OUTBOX_FIELD, BadEvent, ScoreEvent, events_of_entry, memories_of_entry
from server.fences import MOST_DIGITS, Fences
from server.instruments import RedisFigures
from server.kafka_tail import KafkaTail, Record
from server.key_types import STREAM, is_wrong_type, wrong_types
from server.keys import Keys
from server.rebuild_lock import Command, RebuildLock, RebuildLocks
from server.redis_connection import RedisConnection
from server.replay import (
    Fold,
    Log,
    StoredOffset,
    Version,
    end_of_entry,
    entry_of,
    kept_answer,
    may_begin_too_late,
    tail_starts,
)
from server.slots import check_mode

LOCK_POLL_S: Final = 0.1
CHUNK_PLAYERS: Final = 2000
"""Written at once: a few ms of Redis, and half of what a script can unpack."""

SCAN_KEYS: Final = 2000
OUTBOX_ENTRIES: Final = 100
"""Read at once: up to 50,000 events, about 1 MB."""

_log = logging.getLogger(__name__)

Remembered = Iterable[tuple[ScoreEvent, str | None]]
"""Events, each with the memory of its request's Idempotency-Key."""


class Verifier:
    """Makes sure that one deployment's Redis is whole; `verify` is what Scores wants of it."""

    def __init__(
        self,
        settings: Settings,
        keys: Keys,
        database: Database,
        open_tail: Callable[[], KafkaTail] | None = None,
        figures: RedisFigures | None = None,
    ) -> None:
        """`open_tail` begins a reading of Kafka; by default as the settings say."""
        self._settings = settings
        self._keys = keys
        self._database = database
        self._open_tail = open_tail or (lambda: KafkaTail(settings))
        self._figures = figures or RedisFigures()
        self._locks = RebuildLocks(keys.rebuild_lock)
        self._epoch = 0
        """The latest one that we have seen, or taken: a fence of it may be in Kafka."""

    async def verify(self, connection: RedisConnection, on_wait: Callable[[str], None]) -> str:
        """The epoch that batches over this connection carry, once Redis can be trusted.

        `on_wait` is told why, before what may take a while. Raises NotReady when Redis cannot be trusted for now,
        ConnectionError or TimeoutError when it is gone.
        """
        run_id = await _check_process(connection, in_cluster=bool(self._settings.redis_cluster))
        while not await self._is_verified(connection, run_id):
            lock = await self._locks.take(connection)
            if lock is None:
                on_wait("Redis is being verified or rebuilt by another server")
                await asyncio.sleep(LOCK_POLL_S)
                continue
            await lock.hold_during(self._take_turn(connection, lock, run_id, on_wait))
        return str(self._epoch)

    async def _take_turn(
        self, connection: RedisConnection, lock: RebuildLock, run_id: bytes, on_wait: Callable[[str], None]
    ) -> None:
        # Somebody else may have been done with it between our look and the lock.
        if await self._is_verified(connection, run_id):
            return
        sources = f"Kafka at {self._settings.kafka_brokers} and the database"
        on_wait(f"Redis is being compared with {sources}, and mended from them")
        self._figures.mending += 1
        try:
            await self._mend(connection, lock, run_id)
        finally:
            self._figures.mending -= 1

    async def _is_verified(self, connection: RedisConnection, run_id: bytes) -> bool:
        epoch, verified = await self._marker(connection)
        # A marker older than one we have seen is that of a Redis which missed what came after. One older than our own
        # fence is that of a server which mended another Redis meanwhile: what it accepts would count for nobody.
        if epoch == 0 or verified != run_id or epoch < self._epoch:
            return False
        self._epoch = epoch
        # It says nothing of what was put in the outbox' place since.
        return not await wrong_types(connection, {self._keys.outbox: STREAM})

    async def _marker(self, connection: RedisConnection) -> tuple[int, bytes]:
        """Epoch and run_id; an epoch of 0 stands for no marker."""
        try:
            epoch, run_id = await connection.execute("HMGET", self._keys.ready, "epoch", "run_id")
        except hiredis.ReplyError as error:
            if not is_wrong_type(error):
                raise
            return 0, b""
        return _epoch_of(epoch), run_id or b""

    async def _take_epoch(self, connection: RedisConnection, lock: RebuildLock) -> tuple[int, int]:
        """A new epoch, later than each that was ever taken, and Redis' Unix time in ms.

        It is recorded before it is used: a server that is paused before its fence is in Kafka has a lower one than all
        that come after it. It is the time by one clock, so that it rises too where Redis has forgotten the record.
        """
        seconds, us = await connection.execute("TIME")
        now_ms = int(seconds) * 1000 + int(us) // 1000
        verified, _ = await self._marker(connection)
        try:
            taken = _epoch_of(await connection.execute("GET", self._keys.epoch_taken))
        except hiredis.ReplyError as error:
            if not is_wrong_type(error):
                raise
            taken = 0
        epoch = max(now_ms, verified + 1, taken + 1, self._epoch + 1)
        # Only the holder of the lock gets here, so it is lost if another one has taken an epoch since we looked.
        await lock.write([("SET", self._keys.epoch_taken, str(epoch))])
        return epoch, now_ms

    async def _mend(self, connection: RedisConnection, lock: RebuildLock, run_id: bytes) -> None:
        """Replay or rebuild, whichever is needed, and set the marker."""
        ready, started_s = self._keys.ready, time.monotonic()
        epoch, _ = await self._marker(connection)
        next_epoch, now_ms = await self._take_epoch(connection, lock)
        self._epoch = next_epoch
        sources = self._settings, self._keys, self._database, self._open_tail
        mending = _Mending(*sources, connection, lock, next_epoch, now_ms)
        last_id = await mending.last_id()
        if epoch and last_id:
            # From here on batches of the old epoch are refused: they would count from what may be an old state.
            await lock.write([("HSET", ready, "epoch", str(next_epoch), "run_id", "")])
            try:
                players = await mending.replay(last_id)
            except hiredis.ReplyError as error:
                if is_wrong_type(error):
                    await lock.write([("DEL", ready)])  # it is more than late: the next try rebuilds
                raise
        else:
            await lock.write([("DEL", ready)])
            players = await mending.rebuild()
        if mending.highest_fence > next_epoch:
            # Kafka knows of a later epoch, so events of this one would count for nobody.
            self._epoch = max(self._epoch, mending.highest_fence)
            raise NotReady("another epoch of Redis was verified before, by a clock that is ahead: beginning again")
        await mending.continue_after(last_id)
        await lock.write([("HSET", ready, "epoch", str(next_epoch), "run_id", run_id)])
        if epoch and last_id:
            what = "replayed what Redis had lost"
            self._figures.replays += 1
        else:
            what = "rebuilt Redis"
            self._figures.rebuilds += 1
        _log.info("%s: %d players in %.1f s", what, players, time.monotonic() - started_s)


def _epoch_of(raw: bytes | None) -> int:
    return int(raw) if raw and raw.isdigit() and len(raw) <= MOST_DIGITS else 0


async def _check_process(connection: RedisConnection, *, in_cluster: bool) -> bytes:
    """The run_id of the Redis process behind this connection.

    Raises NotReady if that process might evict what it should keep, cannot be written, or is not in a cluster as said.
    """
    info: bytes = await connection.execute("INFO")
    fields = dict(line.split(b":", 1) for line in info.splitlines() if b":" in line)
    check_mode(wanted=in_cluster, found=fields.get(b"cluster_enabled") == b"1")
    policy = fields[b"maxmemory_policy"].decode()
    if policy != "noeviction":
        raise NotReady(f"Redis setting maxmemory-policy: expected noeviction, got {policy}")
    if fields.get(b"loading") == b"1":
        raise NotReady("Redis is still loading its data")
    if fields.get(b"role") == b"slave":
        raise NotReady("this Redis is a replica: expected its primary")
    return fields[b"run_id"]


class _Mending:
    """One replay or rebuild, by whoever holds the lock; whatever it writes goes through the lock."""

    def __init__(
        self,
        settings: Settings,
        keys: Keys,
        database: Database,
        open_tail: Callable[[], KafkaTail],
        connection: RedisConnection,
        lock: RebuildLock,
        epoch: int,
        now_ms: int,
    ) -> None:
        """`now_ms` is Redis' time, by which events are dated."""
        self.highest_fence = 0
        """The latest epoch of any fence that was met."""
        self._settings = settings
        self._keys = keys
        self._database = database
        self._open_tail = open_tail
        self._connection = connection
        self._lock = lock
        self._epoch = epoch
        self._now_ms = now_ms
        self._fold = Fold()

    async def replay(self, last_id: str) -> int:
        """Set what the events past the outbox's last id say; how many players that were."""
        last = end_of_entry(last_id)
        async with self._tail() as (tail, log):
            if log is None:
                async with self._database.snapshot() as snapshot:
                    self._tail_starts(await self._stored_offsets(snapshot), log)
            else:
                starts = await asyncio.to_thread(tail.first_since, last[0])
                if may_begin_too_late(log, starts):
                    # As after a Redis restored from an old copy: the log has only the end of what it missed.
                    await self._add_later_scores(last)
                ends = await self._fence(tail)
                async for records in self._records(tail, starts, ends, Fences()):
                    missing = [record for record in records if record.event.version > last]
                    for record in missing:
                        self._fold.add(record.event)
                    await self._remember((record.event, record.memory) for record in missing)
        return await self._write_rest()

    async def _add_later_scores(self, last: Version) -> None:
        async with self._database.snapshot() as snapshot, aclosing(await self._scores(snapshot)) as chunks:
            async for rows in chunks:
                for board, player, score, ms, seq in rows:
                    if (ms, seq) > last:
                        self._fold.learn(board, player, score, (ms, seq))

    async def rebuild(self) -> int:
        """Replace everything by what outbox, database and Kafka say; how many players that are."""
        players = 0
        await self._read_outbox()
        async with self._database.snapshot() as snapshot:
            async with self._tail() as (tail, log):
                stored = await self._stored_offsets(snapshot)
                starts = self._tail_starts(stored, log)
                if log is not None:
                    await self._read_tail(tail, log, starts, stored)
            # Not before all sources have spoken: a refusal must not cost what Redis still has.
            await self._clear()
            settle = self._fold.settle
            async with aclosing(await self._scores(snapshot)) as chunks:
                async for rows in chunks:
                    await self._write(
                        [(board, name, settle(board, name, score, (ms, seq))) for board, name, score, ms, seq in rows]
                    )
                    players += len(rows)
        return players + await self._write_rest()

    # ------------------------------------------------------------------ reading

    async def last_id(self) -> str | None:
        """The outbox's last id; None where there is no outbox."""
        try:
            state = await self._connection.execute("XINFO", "STREAM", self._keys.outbox)
        except hiredis.ReplyError as error:
            if is_wrong_type(error) or "no such key" in str(error):
                return None
            raise
        last: bytes = state[state.index(b"last-generated-id") + 1]
        return last.decode()

    async def _read_outbox(self) -> None:
        """Take what is still owed to Kafka; it stays where it is."""
        begin = "-"
        while entries := await self._outbox_page(begin):
            for entry_id, fields in entries:
                begin = f"({entry_id.decode()}"
                named = dict(zip(fields[::2], fields[1::2], strict=True))
                try:
                    events = events_of_entry(entry_id.decode(), named.get(OUTBOX_FIELD, b""))
                    memories = memories_of_entry(named.get(MEMORY_FIELD), len(events))
                except BadEvent as error:
                    _log.warning("the outbox entry %s is no batch: %s", entry_id.decode(), error)
                    continue
                for event in events:
                    self._fold.add(event)
                await self._remember((events[index], memory) for index, memory in memories.items())
                await asyncio.sleep(0)  # others have their turn

    async def _outbox_page(self, begin: str) -> list[Any]:
        try:
            page = await self._connection.execute("XRANGE", self._keys.outbox, begin, "+", "COUNT", OUTBOX_ENTRIES)
        except hiredis.ReplyError as error:
            if not is_wrong_type(error):
                raise
            return []
        return list(page)

    @asynccontextmanager
    async def _tail(self) -> AsyncIterator[tuple[KafkaTail, Log | None]]:
        tail = await asyncio.to_thread(self._open_tail)
        try:
            yield tail, await asyncio.to_thread(tail.describe)
        finally:
            await asyncio.to_thread(tail.close)

    async def _stored_offsets(self, snapshot: Snapshot) -> dict[int, StoredOffset]:
        offsets = await snapshot.offsets(self._settings.kafka_topic)
        return {partition: StoredOffset(*offset) for partition, offset in offsets.items()}

    async def _scores(self, snapshot: Snapshot) -> AsyncGenerator[list[ScoreRow], None]:
        boards = [each for each in await snapshot.boards() if self._keys.holds(each)] if self._keys.tag else None
        return snapshot.scores(boards)

    def _tail_starts(self, stored: dict[int, StoredOffset], log: Log | None) -> dict[int, int]:
        return tail_starts(self._settings.kafka_topic, log, stored, restart=self._settings.new_topic == "restart")

    async def _read_tail(
        self, tail: KafkaTail, log: Log, starts: dict[int, int], stored: dict[int, StoredOffset]
    ) -> None:
        """Take the events from `starts` on, and what is to be remembered of those before."""
        since_ms = self._now_ms - 1000 * self._settings.idempotency_restore_s
        ends = await self._fence(tail)
        recent = await asyncio.to_thread(tail.first_since, since_ms)
        earlier = {number: min(start, recent[number]) for number, start in starts.items()}
        async for records in self._records(tail, earlier, starts, Fences()):
            await self._remember((record.event, record.memory) for record in records if record.event.at >= since_ms)
        fences = Fences({number: it.epochs for number, it in stored.items() if it.topic_id == log.topic_id})
        async for records in self._records(tail, starts, ends, fences):
            for record in records:
                self._fold.add(record.event)
            await self._remember((record.event, record.memory) for record in records if record.event.at >= since_ms)

    async def _fence(self, tail: KafkaTail) -> dict[int, int]:
        """By partition where the log ends, behind a fence of ours."""
        # A fence cannot be taken back, so whoever was paused up to here looks once more whether it is still its turn.
        await self._lock.look()
        return await asyncio.to_thread(tail.fence, self._epoch, self._now_ms, self._keys.tag)

    async def _records(
        self, tail: KafkaTail, starts: dict[int, int], ends: dict[int, int], fences: Fences
    ) -> AsyncIterator[list[Record]]:
        await asyncio.to_thread(tail.start, starts, ends, fences)
        while records := await asyncio.to_thread(tail.read):
            yield [record for record in records if self._keys.holds(record.event.board)]
        self.highest_fence = max(self.highest_fence, fences.highest(self._keys.tag))
        if fences.void:
            _log.warning("%d events in Kafka do not count: Redis had lost them before", fences.void)

    # ------------------------------------------------------------------ writing

    async def _clear(self) -> None:
        """Take away every board and score, also those that no source knows, and those that are none."""
        everything = re.sub(r"([*?\[\]\\])", r"\\\1", self._keys.prefix) + "*"
        cursor = b"0"
        while True:
            cursor, keys = await self._connection.execute("SCAN", cursor, "MATCH", everything, "COUNT", SCAN_KEYS)
            if found := [key for key in keys if self._keys.of_boards.fullmatch(key)]:
                await self._lock.write([("UNLINK", *found)])
            if cursor == b"0":
                return

    async def _write(self, rows: list[tuple[str, str, int]]) -> None:
        """Set score and place of at most CHUNK_PLAYERS."""
        totals: list[str] = ["MSET"]
        ranks: dict[str, list[str]] = {}
        for board, player, score in rows:
            keys, text = self._keys.board(board), str(score)
            totals += keys.score(player), text
            ranks.setdefault(keys.leaderboard, []).extend((text, player))
        await self._lock.write([totals, *(("ZADD", leaderboard, *members) for leaderboard, members in ranks.items())])

    async def _write_rest(self) -> int:
        rest = self._fold.rest()
        players = len(self._fold)
        while chunk := list(itertools.islice(rest, CHUNK_PLAYERS)):
            await self._write(chunk)
        return players

    async def _remember(self, remembered: Remembered) -> None:
        """Keep the answers to requests with an Idempotency-Key, for what is left of their time."""
        ttl_ms = 1000 * self._settings.idempotency_ttl_s
        commands: list[Command] = []
        for event, memory in remembered:
            if memory is not None and event.at + ttl_ms > self._now_ms:
                name, answer = kept_answer(memory, event.new_score)
                commands.append(("SET", self._keys.answer + name, answer, "PXAT", str(event.at + ttl_ms)))
        if commands:
            await self._lock.write(commands)

    async def continue_after(self, last_id: str | None) -> None:
        """Let the outbox's ids go on above every version that was seen."""
        outbox = self._keys.outbox
        if last_id is None:
            # The way to an empty stream: an entry, however short its life, could be read by the relay.
            create: list[Command] = [("XGROUP", "CREATE", outbox, "none", "$", "MKSTREAM")]
            await self._lock.write([("DEL", outbox), *create, ("XGROUP", "DESTROY", outbox, "none")])
        if self._fold.last > end_of_entry(last_id or "0-0"):
            await self._lock.write([("XSETID", outbox, entry_of(self._fold.last))])
