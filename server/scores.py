"""The server's Redis: updates go in as batches, pages and scores come out.

Updates that arrive while a batch is in flight form the next one; an idle server sends a batch of one at once.
Reads of the same page in the same loop turn share one command, sent behind the updates that came before them, so
whoever got a 200 sees it. Knows nothing of HTTP: answers go to the functions given at the start.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, Protocol

import hiredis

from server.batches import APPLIED, COLD, Batch, IdempotencyKey, Lane, Outcome, Script, Updates, read_reply
from server.config import Settings
from server.errors import NotReady, Problem, ScoreboardError, not_applied, outcome_unknown
from server.events import MAX_BATCH
from server.instruments import RedisFigures
from server.key_types import HASH, SORTED_SET, STREAM, wrong_types
from server.keys import Keys
from server.outbox_age import OutboxAge
from server.pages import Page, Pages, entries_of, page_json
from server.redis_clock import RedisClock
from server.redis_connection import RedisConnection, open_connection, pack
from server.slots import Address, is_elsewhere

RETRY_S: Final = 0.2
WATCH_INTERVAL_S: Final = 1.0
SWEEP_INTERVAL_S: Final = 0.05
VERIFY_TIMEOUT_S: Final = 3.0
DISTRUST_INTERVAL_S: Final = 5.0
"""Least time between two rebuilds because of damage: one that does not mend it must not be repeated in a loop."""

QUIET_MS: Final = 5000
"""How old the last id of a hash tag's outbox may be. In a cluster, a replay reads the events of all boards since then,
and others may be busy while this one's have been quiet for days."""

_SCRIPT: Final = Path(__file__).with_name("apply_updates.lua").read_bytes()
_ADVANCE: Final = Path(__file__).with_name("advance_outbox.lua").read_bytes()

_log = logging.getLogger(__name__)


class Waiter(Protocol):
    """Whoever waits for the answer to an update."""

    received_s: float
    parts: str


class Reader(Protocol):
    """Whoever waits for a page, perhaps several together."""

    received_s: float

    def depart(self) -> None:
        """Take in nobody else: the page is being read."""


OnOutcomes = Callable[[list[Any], list[int]], None]
"""Takes those who wait, and (outcome, value) of each, flat."""

OnProblem = Callable[[Any, Problem], None]
OnPage = Callable[[Any, bytes | None], None]

Verify = Callable[[RedisConnection, Callable[[str], None]], Awaitable[str]]
"""Makes sure that the Redis behind a new connection can be trusted, and says the epoch; calls back with the reason
before what may take a while."""

Locate = Callable[[], Awaitable[Address]]
"""Where the Redis is to connect to, asked before every connection; raises NotReady while nobody knows."""

BoardCommand = tuple[str, tuple[str | int, ...]]
"""The board that a command reads, and the command."""

_EXPECTED: Final = (OSError, TimeoutError, hiredis.HiredisError, ScoreboardError)
"""What a Redis that comes and goes may raise."""


class Scores:
    """The way to Redis, in three states: away, being verified, ready (`epoch` is set)."""

    def __init__(
        self,
        settings: Settings,
        keys: Keys,
        verify: Verify,
        *,
        on_outcomes: OnOutcomes,
        on_problem: OnProblem,
        on_page: OnPage,
        locate: Locate | None = None,
        figures: RedisFigures | None = None,
    ) -> None:
        """`on_page` gets None as the page when Redis cannot be read; without `locate`, Redis is where settings say."""
        self.epoch: str | None = None
        self.reason = "not connected to Redis yet"
        self.outbox_bytes = 0
        self.clock = RedisClock()
        self.figures = figures or RedisFigures()
        self._slow_s = settings.slow_request_s
        self._settings = settings
        self._keys = keys
        self._verify = verify
        self._on_outcomes = on_outcomes
        self._on_problem = on_problem
        self._on_page = on_page
        self._deadline_s = settings.request_deadline_ms / 1000
        self._script = Script(settings, keys)
        self._ask_epoch = pack(("HGET", keys.ready, "epoch"))
        self._outbox_age = OutboxAge(self.clock)
        self._locate = locate
        self._place = settings.redis_host
        """For messages."""
        self._connection: RedisConnection | None = None
        self._lost = asyncio.Event()
        self._away_since_s = time.monotonic()
        self._ready_since_s = time.monotonic()
        self._distrusted_s = -DISTRUST_INTERVAL_S
        self._mending: asyncio.Task[None] | None = None
        self._sha = b""
        # New at every start: another process's numbers must not be taken for ours.
        self._server_id = secrets.token_hex(8)
        self._lanes: dict[str, Lane] = {}
        self._pages = Pages(keys)
        self._flush_scheduled = False
        self._loop = asyncio.get_running_loop()

    @property
    def outbox_full(self) -> bool:
        """Whether more is owed to Kafka than may be: updates are refused rather than lost."""
        return self.outbox_bytes > self._settings.outbox_max_bytes

    @property
    def outbox_used(self) -> float:
        """How much of OUTBOX_MAX_BYTES it takes; above 1 it is full."""
        return self.outbox_bytes / self._settings.outbox_max_bytes

    @property
    def outbox_since_s(self) -> float | None:
        """Since when, by the monotonic clock, the outbox's oldest entry waits; None when there is none."""
        return self._outbox_age.since_s

    @property
    def clocks(self) -> list[RedisClock]:
        """The only one."""
        return [self.clock]

    def clock_of(self, board: str) -> RedisClock:
        """The clock that the events of this board, as of any other, carry the time of."""
        return self.clock

    # ------------------------------------------------------------------ what the rest of the server calls

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
        """Apply one change; `on_outcomes` or `on_problem` will be called once with `waiter`.

        `limit` says which rule counts for `subject`: 1 that of players, 2 that of game servers.
        """
        if self.epoch is None and time.monotonic() - self._away_since_s > self._deadline_s:
            self._on_problem(waiter, not_applied(self.reason))
            return
        if self.outbox_full:
            full = f"the outbox holds {self.outbox_bytes} bytes, at most {self._settings.outbox_max_bytes} are allowed"
            self._on_problem(waiter, not_applied(f"{full}: is the relay or Kafka down?", 5))
            return
        lane = self._lanes.get(board)
        if lane is None:
            session = self._keys.session(f"{self._server_id}.{board}")
            lane = self._lanes[board] = Lane(self._keys.board(board), session)
        updates = lane.waiting
        updates.waiters.append(waiter)
        updates.players.append(player)
        updates.score_keys.append(lane.keys.score(player))
        updates.deltas.append(delta)
        updates.subjects.append(subject)
        updates.which.append(self._script.which(limit))
        updates.keys.append(key)
        if lane.in_flight is None:
            self._schedule_flush()

    def read_page(self, board: str, limit: int, reader: Reader) -> None:
        """Read a board's first `limit` players; `on_page` will be called once with `reader`."""
        if self.epoch is None:
            reader.depart()
            self._on_page(reader, None)
            return
        page = self._pages.of(board, limit)
        page.waiters.append(reader)
        if not page.in_flight:
            self._schedule_flush()

    def read(self, commands: list[BoardCommand], on_replies: Callable[[list[Any] | None], None]) -> None:
        """Run read commands in one go; `on_replies` gets all replies, or None when Redis cannot be read."""
        if self.epoch is None or self._connection is None:
            on_replies(None)
            return

        def check(replies: list[Any] | None) -> None:
            failed = replies is None or any(isinstance(reply, Exception) for reply in replies)
            on_replies(None if failed else replies)

        self._send_reads([pack(command) for _, command in commands], check)

    # ------------------------------------------------------------------ batches

    def _schedule_flush(self) -> None:
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Send what waits, now rather than in the next turn of the loop."""
        self._flush_scheduled = False
        if self.epoch is None:
            return
        for lane in self._lanes.values():
            if lane.waiting.waiters and lane.in_flight is None:
                self._send_batch(lane)
        pages = [page for page in self._pages if page.waiters and not page.in_flight]
        if pages:
            self._read_pages(pages)

    def _send_batch(self, lane: Lane) -> None:
        updates, lane.waiting = lane.waiting, Updates()
        if len(updates.waiters) > MAX_BATCH:
            lane.waiting, updates = updates, updates.split(MAX_BATCH)
        lane.number += 1
        assert self.epoch is not None
        argument = self._script.argument(lane, self.epoch, updates)
        command = pack((b"EVALSHA", self._sha, 1, self._keys.outbox, argument))
        lane.in_flight = Batch(command, self.epoch, updates)
        self.figures.batch_updates.observe(len(updates.waiters))
        self._send(lane, lane.in_flight)

    def _send(self, lane: Lane, batch: Batch) -> None:
        assert self._connection is not None
        self._connection.send(batch.command, lambda reply: self._on_batch_reply(lane, batch, reply))

    def _on_batch_reply(self, lane: Lane, batch: Batch, reply: Any) -> None:
        if lane.in_flight is not batch:
            return  # given up at its deadline, and answered then
        if isinstance(reply, ConnectionError):
            return  # kept: it is sent again, under the same number, over the next connection
        lane.in_flight = None
        now_s = time.monotonic()
        self.figures.round_trip_s.observe(now_s - batch.sent_s)
        if now_s - batch.waiters[0].received_s > self._slow_s:
            _note_parts(batch, now_s)
        if isinstance(reply, hiredis.ReplyError):
            if is_elsewhere(str(reply)) and not batch.sent_again:
                # Nothing was done, so they may wait until it is known where their board is: a slot moves, or a master
                # was replaced.
                lane.waiting.put_first(batch.updates)
                self._suspect(f"Redis does not have the board now: {reply}")
                return
            self._refuse(batch, f"Redis refused the batch: {reply}")
            if "WRONGTYPE" in str(reply):
                self._mend_types(lane)
            else:
                self._suspect(f"Redis refused a batch: {reply}")
            return
        state, results = read_reply(reply)
        if state == APPLIED:
            self._report(batch.waiters, results)
        else:
            self._refuse(batch, "Redis was emptied or replaced, and is being verified")
            if state == COLD and batch.epoch == self.epoch:  # of an older epoch, and sent again: no news
                self._suspect("Redis has no scoreboard of this epoch")
        if lane.waiting.waiters:
            self._schedule_flush()

    def _report(self, waiters: list[Any], results: list[int]) -> None:
        self._on_outcomes(waiters, results)
        if Outcome.DAMAGED in results[::2]:
            self._distrust("a player's score and place on the board do not both exist")

    def _refuse(self, batch: Batch, why: str) -> None:
        """Answer a batch that Redis did not apply now; whether it did before is another matter."""
        problem = outcome_unknown(why) if batch.sent_again else not_applied(why)
        for waiter in batch.waiters:
            self._on_problem(waiter, problem)

    # ------------------------------------------------------------------ reads

    def _send_reads(self, commands: list[bytes], on_replies: Callable[[list[Any] | None], None]) -> None:
        """Send packed commands; `on_replies` gets their replies, or None if the boards were not whole then.

        A rebuild takes the marker away first and sets it last, and epochs only rise. So the question behind the reads
        answers for all of them: an epoch that is ours still was ours before.
        """
        connection, epoch = self._connection, self.epoch
        assert connection is not None
        replies: list[Any] = []

        def check(found: Any) -> None:
            on_replies(replies if self._is_current(found, epoch) else None)

        connection.send_all(b"".join((*commands, self._ask_epoch)), (*[replies.append] * len(commands), check))

    def _is_current(self, found: Any, epoch: str | None) -> bool:
        if epoch is not None and found == epoch.encode():
            return True
        if epoch == self.epoch and not isinstance(found, Exception):  # an older one is no news
            self._suspect("Redis has no scoreboard of this epoch")
        return False

    def _read_pages(self, pages: list[Page]) -> None:
        reads: list[tuple[Page, list[Any]]] = []
        for page in pages:
            readers, page.waiters = page.waiters, []
            page.in_flight, page.sent_s = readers, time.monotonic()
            for reader in readers:
                reader.depart()
            reads.append((page, readers))
        self._send_reads([page.command for page in pages], lambda replies: self._on_page_replies(reads, replies))

    def _on_page_replies(self, reads: list[tuple[Page, list[Any]]], replies: list[Any] | None) -> None:
        for (page, readers), reply in zip(reads, replies or [None] * len(reads), strict=True):
            self._on_page_reply(page, readers, reply)

    def _on_page_reply(self, page: Page, readers: list[Any], reply: Any) -> None:
        if page.in_flight is readers:  # else all of them were late, and others asked anew
            page.in_flight = []
        json: bytes | None = None
        if isinstance(reply, list):
            if reply != page.reply:
                page.reply, page.json = reply, page_json(entries_of(reply))
            json = page.json
        for reader in readers:
            self._on_page(reader, json)
        if page.waiters:
            # A turn of the loop later, who asks again at once is among them: fewer reads, each for more.
            self._loop.call_soon(self._schedule_flush)

    # ------------------------------------------------------------------ connection

    async def run(self) -> None:
        """Keep a verified connection, for ever."""
        sweeper = asyncio.create_task(self._sweep())
        try:
            while True:
                try:
                    await self._connect()
                    await self._watch()
                except Exception as error:
                    if not isinstance(error, _EXPECTED):
                        _log.exception("looking after Redis failed: beginning again")
                    self._suspect(f"Redis at {self._place}: {_sentence(error)}")
                await asyncio.sleep(RETRY_S)
        finally:
            sweeper.cancel()

    async def _connect(self) -> None:
        self._lost.clear()
        settings = self._settings
        self._place = settings.redis_host  # while it is not known which of the nodes
        host, port = await self._locate() if self._locate else (settings.redis_host, settings.redis_port)
        self._place = f"{host}:{port}"
        connection = self._connection = await open_connection(settings, self._on_lost, (host, port))
        async with asyncio.timeout(VERIFY_TIMEOUT_S) as timeout:

            def on_wait(reason: str) -> None:
                # A rebuild takes as long as it takes; each of its steps has a deadline.
                timeout.reschedule(None)
                self._away(reason)

            self._sha = await connection.execute("SCRIPT", "LOAD", _SCRIPT)
            epoch = await self._verify(connection, on_wait)
        if connection is not self._connection:  # it ended right after its last reply
            raise ConnectionError("connection to Redis lost")
        self._go(epoch)

    def _go(self, epoch: str) -> None:
        self.epoch, self.reason, self._ready_since_s = epoch, "", time.monotonic()
        self._outbox_age.forget()
        _log.info("Redis is verified, epoch %s%s", epoch, f", hash tag {self._keys.tag}" if self._keys.tag else "")
        for lane in self._lanes.values():
            if lane.in_flight is not None:
                lane.in_flight.sent_again = True
                self._send(lane, lane.in_flight)
        self._schedule_flush()

    async def _watch(self) -> None:
        """Look after a ready connection until it is lost."""
        while self.epoch is not None and self._connection is not None:
            await self._look(self._connection)
            with contextlib.suppress(TimeoutError):
                # Not wait_for: before Python 3.12 it may swallow a cancellation.
                async with asyncio.timeout(WATCH_INTERVAL_S):
                    await self._lost.wait()

    async def _look(self, connection: RedisConnection) -> None:
        async with asyncio.timeout(self._deadline_s):
            asked_s = time.monotonic()
            self.clock.learn(await connection.execute("TIME"), asked_s, time.monotonic())
            epoch = await connection.execute("HGET", self._keys.ready, "epoch")
            self.outbox_bytes = await connection.execute("MEMORY", "USAGE", self._keys.outbox) or 0
            await self._look_at_outbox(connection)
            if self._keys.tag and epoch is not None:
                keys = self._keys.outbox, self._keys.ready
                await connection.execute("EVAL", _ADVANCE, 2, *keys, self.epoch or "", QUIET_MS)
        if self.epoch is not None and epoch != self.epoch.encode():
            self._suspect("Redis has no scoreboard of this epoch")

    async def _look_at_outbox(self, connection: RedisConnection) -> None:
        try:
            state = await connection.execute("XINFO", "STREAM", self._keys.outbox)
        except hiredis.ReplyError as error:
            if "no such key" not in str(error):
                raise
            state = [b"first-entry", None, b"last-generated-id", b"0-0"]
        oldest, last = (state[state.index(name) + 1] for name in (b"first-entry", b"last-generated-id"))
        self._outbox_age.look(oldest[0] if oldest else None, last, time.monotonic())

    def _suspect(self, why: str) -> None:
        """Drop the connection, so that the next one is verified anew."""
        self._away(why)
        # Let go of it first: its end is our doing, and must not pass for the reason.
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
            self._lost.set()

    def _distrust(self, why: str) -> None:
        now_s = time.monotonic()
        connection = self._connection
        if connection is None or now_s - self._distrusted_s < DISTRUST_INTERVAL_S:
            return
        self._distrusted_s = now_s
        _log.error("%s: rebuilding", why)

        async def take_marker() -> None:
            try:
                await connection.execute("DEL", self._keys.ready)
            except (ConnectionError, TimeoutError, hiredis.HiredisError) as error:
                _log.warning("cannot take the marker away: %s", _sentence(error))
            if connection is self._connection:  # else the one of now is being verified, or was
                self._suspect("a damaged board is being rebuilt")

        self._mending = self._loop.create_task(take_marker())

    def _mend_types(self, lane: Lane) -> None:
        """Find what made a batch of this lane fail, and mend no more than that."""
        connection = self._connection
        if connection is None or (self._mending is not None and not self._mending.done()):
            return

        async def mend() -> None:
            try:
                seconds, _ = await connection.execute("TIME")
                for found in await wrong_types(connection, self._script.remembered(lane, int(seconds))):
                    await connection.execute("UNLINK", found.key)
                    _log.error("%s: taken away, since it only remembers", found)
                boards = {self._keys.ready: HASH, self._keys.outbox: STREAM, lane.keys.leaderboard: SORTED_SET}
                damaged = await wrong_types(connection, boards)
            except (ConnectionError, TimeoutError, hiredis.HiredisError) as error:
                _log.warning("cannot look for keys of a wrong type: %s", _sentence(error))
            else:
                if damaged:
                    self._distrust("; ".join(map(str, damaged)))

        self._mending = self._loop.create_task(mend())

    def _on_lost(self, connection: RedisConnection) -> None:
        if connection is self._connection:
            self._connection = None
            self._away("connection to Redis lost")
            self._lost.set()

    def _away(self, reason: str) -> None:
        if self.epoch is not None:
            self.epoch = None
            self._away_since_s = time.monotonic()
        if reason != self.reason:
            _log.warning("%s", reason)
        self.reason = reason

    # ------------------------------------------------------------------ deadlines

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_INTERVAL_S)
            try:
                self._sweep_all(time.monotonic() - self._deadline_s)
            except Exception:
                _log.exception("a sweep failed")

    def _sweep_all(self, expired_s: float) -> None:
        for lane in self._lanes.values():
            self._sweep_lane(lane, expired_s)
        for page in self._pages:
            self._sweep_page(page, expired_s + self._deadline_s / 2)
        self._pages.forget()

    def _sweep_lane(self, lane: Lane, expired_s: float) -> None:
        batch = lane.in_flight
        if batch is not None and batch.waiters[0].received_s < expired_s:
            # The next batch carries the next number, which fences this one off.
            lane.in_flight = None
            problem = outcome_unknown("Redis did not answer in time: the change may have been applied")
            for waiter in batch.waiters:
                self._on_problem(waiter, problem)
            if self._is_overdue(batch.sent_s):
                self._suspect("Redis did not answer in time")
            elif lane.waiting.waiters:
                self._schedule_flush()  # the reply, when it comes late, does not
        waiters, late = lane.waiting.waiters, 0
        while late < len(waiters) and waiters[late].received_s < expired_s:
            late += 1
        for waiter in lane.waiting.split(late).waiters if late else ():
            self._on_problem(waiter, not_applied(self.reason or "Redis is slow"))

    def _is_overdue(self, sent_s: float) -> bool:
        """Whether the connection of now has had enough time for what was sent then, and sent again when it was ready.

        What waited for longer, for a connection before it or for its turn, says nothing about this one.
        """
        return self.epoch is not None and time.monotonic() - max(sent_s, self._ready_since_s) > self._deadline_s / 2

    def _sweep_page(self, page: Page, expired_s: float) -> None:
        """Send readers to the database while there is time left to ask it."""
        if page.in_flight and page.in_flight[0].received_s < expired_s and self._is_overdue(page.sent_s):
            self._suspect("Redis did not answer in time")
        for readers in (page.in_flight, page.waiters):
            late = 0
            while late < len(readers) and readers[late].received_s < expired_s:
                late += 1
            departing = readers[:late]
            del readers[:late]
            for reader in departing:
                reader.depart()
                self._on_page(reader, None)


def _note_parts(batch: Batch, now_s: float) -> None:
    redis_ms, others = 1000 * (now_s - batch.sent_s), len(batch.waiters) - 1
    for waiter in batch.waiters:
        waiting_ms = 1000 * (batch.sent_s - waiter.received_s)
        waiter.parts = f"{waiting_ms:.0f} ms until its batch was sent, {redis_ms:.0f} ms in Redis with {others} others"


def _sentence(error: BaseException) -> str:
    if isinstance(error, NotReady):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else "did not answer in time"
