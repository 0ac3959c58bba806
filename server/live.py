"""The live board: Kafka's events in, WebSocket messages out.

The event feed says which players changed; the hub decides what to read and what to send; this module carries it
out, one shard per turn of the loop, so that a flush to thousands never holds up a POST.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from server.admission import Admission
from server.auth import Authenticator, ClientAddress
from server.config import Settings
from server.errors import CloseCode, Problem
from server.event_feed import Changes, EventFeed
from server.hub import Hub, Publish, Read, Send, Shard, Watcher
from server.instruments import LATENCY_BOUNDS_S, Histogram
from server.keys import BoardsKeys
from server.messages import error_message, pong_message, status_message
from server.pages import entries_of
from server.scores import BoardCommand, Scores
from server.shards import Shards
from server.subscription import HEARTBEATS, Ping, Unsubscribe, check_players, decode_message, parse_query
from server.uws import Request, SendStatus, Socket

ERROR_BURST: Final = 20
ERROR_INTERVAL_S: Final = 10.0
"""Client messages that make no sense: twenty at once, and one is forgotten every 10 s; more than that is closed."""

COMING_BACK_PER_S: Final = 2000
"""Connections that may come back in a second after a restart: a quarter of what a busy machine can take."""

MAX_FLUSH_BYTES: Final = 1 << 20
"""The most one flush may add to a connection that is just below the high-water mark."""

MESSAGE_INTERVAL_S: Final = 0.1
MESSAGE_BURST: Final = 100
MESSAGE_BYTES: Final = 16_384
"""Client messages: ten a second on the long run, a hundred at once; more than that is closed. A long one counts once
for each MESSAGE_BYTES that it begins."""

IDLE_TIMEOUT_S: Final = 36
"""A client that sends nothing for so long is gone. It is pinged after 16 to 20 s, before what stands between takes a
quiet connection for a dead one: nginx, HAProxy and the clouds' load balancers do after 60 s, some firewalls after 30.
"""

SEND_S: Final = 0.000_005
"""What sending to one subscriber of a topic takes: uWebSockets does it when the loop turns, beyond our timing."""

TICK_S: Final = 1.0
READ_RETRY_MS: Final = 250
STALE_OUTBOX_S: Final = 2.0
"""Age of the outbox's oldest entry at which events count as not arriving."""

_log = logging.getLogger(__name__)


class Live:
    """The WebSocket route, and the flushes that feed it."""

    def __init__(
        self, settings: Settings, keys: BoardsKeys, scores: Scores | Shards, authenticator: Authenticator
    ) -> None:
        self.trouble = "Kafka was not reached yet"
        """Why changes do not arrive as they happen, in words that everybody may read; empty when they do."""
        self.resyncs = 0
        self.dismissed = 0
        self.changes = 0
        self.flush_s = Histogram(LATENCY_BOUNDS_S)
        self.feed_delay_s = Histogram(LATENCY_BOUNDS_S)
        self._settings = settings
        self._keys = keys
        self._scores = scores
        self._authenticator = authenticator
        self._client = ClientAddress(settings.trusted_proxies)
        self._admission = Admission(settings.live_max_connections, settings.live_max_per_ip)
        self._hub = Hub(settings.live_interval_ms)
        self._loop = asyncio.get_running_loop()
        self._feed = EventFeed(settings, scores.clocks, scores.clock_of, self.changed, self.read_all_again)
        self._publish_to_topic: Any = None
        self._flushing = False
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_live(self) -> bool:
        """Whether changes arrive as they happen."""
        return not self.trouble

    @property
    def connections(self) -> int:
        """How many are connected."""
        return self._admission.connections

    @property
    def lagging(self) -> int:
        """How many of them lag."""
        return len(self._hub.lagging)

    @property
    def score_updates_skipped(self) -> int:
        """How many score updates were left out of flushes that had too many."""
        return self._hub.score_updates_skipped

    def start(self, publish: Any) -> None:
        """Begin to read events; `publish(topic, text)` sends to all subscribers of a topic."""
        self._publish_to_topic = publish
        self._feed.start()
        self._loop.call_later(TICK_S, self._tick)

    def stop(self) -> None:
        """Read no more events."""
        self._feed.stop()

    def goodbye(self) -> bytes:
        """The reason that connections are closed with: within how many seconds to come back, each at random."""
        return b"restarting; reconnect within %d s" % -(-max(1, self.connections) // COMING_BACK_PER_S)

    # ------------------------------------------------------------------ sockets (server.uws.SocketEvents)

    def accept(self, request: Request) -> Watcher:
        """What the query asks for; 400 or 404 if it makes no sense, 403 or 503 if it may not watch."""
        self._check_origin(request)
        watcher = parse_query(request.query, self._settings.boards)
        forwarded_for = request.joined_header(b"x-forwarded-for") if self._client.needs_header else b""
        self._admission.check_total()
        if not self._has_token(request):
            watcher.address = self._client.of(request.peer, forwarded_for.decode("latin-1"))
            self._admission.check_address(watcher.address)
        return watcher

    def _check_origin(self, request: Request) -> None:
        """Pages of other sites may watch as CORS_ORIGINS says, ours always; programs name no origin."""
        origin, allowed = request.header(b"origin").decode("latin-1"), self._settings.cors_origins
        if not origin or "*" in allowed or origin in allowed:
            return
        if origin.partition("://")[2] != request.header(b"host").decode("latin-1"):
            raise Problem(403, f"Origin: expected one of CORS_ORIGINS, got {origin[:80]!r}")

    def _has_token(self, request: Request) -> bool:
        authorization = request.header(b"authorization")
        try:
            return bool(authorization and self._authenticator.caller(authorization))
        except Problem:
            return False

    def opened(self, connection: Socket) -> None:
        """The next flush, which is due at once when nothing else happens, sends it its snapshot."""
        watcher: Watcher = connection.state
        watcher.connection = connection
        self._admission.enter(watcher.address)
        self._hub.join(watcher)
        self._feed.watch(True)
        self._tell_status(watcher)
        self._schedule()

    def received(self, connection: Socket, text: bytes) -> None:
        """subscribe, unsubscribe or a heartbeat; anything else is answered with an error."""
        watcher: Watcher = connection.state
        cost_s = MESSAGE_INTERVAL_S * (1 + len(text) // MESSAGE_BYTES)
        if not watcher.messages.spend(cost_s, MESSAGE_INTERVAL_S * MESSAGE_BURST, time.monotonic()):
            connection.end(CloseCode.POLICY_VIOLATION, b"too many messages")
            return
        if text in HEARTBEATS:
            self._reply(connection, HEARTBEATS[text])
            return
        try:
            message = decode_message(text)
            if isinstance(message, Ping):
                self._reply(connection, pong_message())
                return
            players = set(message.players)
            if isinstance(message, Unsubscribe):
                self._hub.unsubscribe(watcher, players)
                return
            check_players(players | watcher.players)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            self._complain(connection, str(error))
            return
        self._hub.subscribe(watcher, players)
        self._schedule()

    def drained(self, connection: Socket) -> None:
        """A lagging connection gets its resync once everything has left."""
        if connection.buffered_bytes == 0 and connection.state.lagging_since_ms is not None:
            self.resyncs += 1
            self._hub.drained(connection.state)
            self._schedule()

    def closed(self, connection: Socket) -> None:
        """Nothing is owed to it any more."""
        self._admission.leave(connection.state.address)
        self._hub.leave(connection.state)
        self._feed.watch(self._hub.watchers > 0)

    def _complain(self, connection: Socket, detail: str) -> None:
        watcher: Watcher = connection.state
        if watcher.errors.spend(ERROR_INTERVAL_S, ERROR_INTERVAL_S * ERROR_BURST, time.monotonic()):
            self._reply(connection, error_message(detail))
        else:
            connection.end(CloseCode.POLICY_VIOLATION, b"too many messages that make no sense")

    def _reply(self, connection: Socket, text: bytes) -> None:
        """Answer a message, unless its sender does not read what it is sent."""
        if connection.buffered_bytes <= self._settings.live_high_water_bytes:
            connection.send(text)

    # ------------------------------------------------------------------ changes

    def changed(self, changes: dict[str, Changes]) -> None:
        """Events for these boards arrived."""
        for board, each in changes.items():
            self.changes += len(each.players)
            if each.oldest_ms is not None:
                self.feed_delay_s.observe(self._scores.clock_of(board).age_s(each.oldest_ms))
            self._hub.mark(((board, player) for player in each.players), each.oldest_ms)
        self._schedule()

    def read_all_again(self) -> None:
        """Changes may have been missed."""
        self._hub.mark_lists()
        self._schedule()

    def _tick(self) -> None:
        """Once a second: close who lags for too long, and never show a stale board as if it were live."""
        self._loop.call_later(TICK_S, self._tick)
        for watcher in self._hub.overdue(int(_now_ms())):
            self.dismissed += 1
            watcher.connection.dismiss(CloseCode.TRY_AGAIN_LATER, b"reads too slowly")
        self._sweeping = self._loop.create_task(self._sweep())
        before, self.trouble = self.trouble, self._what_is_wrong()
        if self.trouble != before:
            for shard in self._hub.shards:
                self._publish_to_topic(shard.topic, status_message(self.trouble))
                for watcher in shard.watchers:
                    watcher.told_trouble = self.trouble
        if self.trouble or before:
            self.read_all_again()

    def _what_is_wrong(self) -> str:
        if self._feed.trouble:
            return self._feed.trouble
        if self._scores.epoch is None:
            return "Redis is away, or being verified or rebuilt"
        since_s = self._scores.outbox_since_s
        if since_s is not None and time.monotonic() - since_s > STALE_OUTBOX_S:
            return "changes wait in Redis for Kafka: is the relay or Kafka down?"
        return ""

    # ------------------------------------------------------------------ flushing

    def _schedule(self) -> None:
        if self._flushing or self._timer is not None:
            return
        delay_ms = self._hub.flush_delay_ms(_now_ms())
        if delay_ms is not None:
            self._timer = self._loop.call_later(delay_ms / 1000, self._flush)

    def _flush(self) -> None:
        self._timer = None
        self._flushing = True
        started_ms = _now_ms()
        reads = self._hub.begin_flush()
        if not reads:
            self._flushing = False
            return
        commands = [command for read in reads for command in self._commands(read)]
        self._scores.read(commands, lambda replies: self._on_read(started_ms, reads, replies))

    def _commands(self, read: Read) -> list[BoardCommand]:
        name, board = read.board, self._keys.board(read.board)
        commands: list[BoardCommand] = [(name, ("ZREVRANGE", board.leaderboard, 0, read.limit - 1, "WITHSCORES"))]
        if read.players:
            commands.append((name, ("MGET", *(board.score(player) for player in read.players))))
        return commands

    def _on_read(self, started_ms: float, reads: list[Read], replies: list[Any] | None) -> None:
        if replies is None:
            self._retry()
        else:
            self._publishing = self._loop.create_task(self._publish(started_ms, reads, iter(replies)))

    def _retry(self) -> None:
        self._hub.abandon_flush()
        self._flushing = False
        self._timer = self._loop.call_later(READ_RETRY_MS / 1000, self._flush)

    async def _publish(self, started_ms: float, reads: list[Read], replies: Iterator[Any]) -> None:
        try:
            busy_ms = await self._publish_boards(reads, replies)
        except Exception:
            _log.exception("a flush failed: reading everything again")
            self._retry()
            return
        self.flush_s.observe(busy_ms / 1000)
        self._hub.end_flush(started_ms, busy_ms)
        self._flushing = False
        self._schedule()

    async def _publish_boards(self, reads: list[Read], replies: Iterator[Any]) -> float:
        """Send what the hub says, giving the loop away between shards; returns the ms that sending takes of it."""
        busy_s = 0.0
        for read in reads:
            listed = next(replies)
            found = next(replies) if read.players else []
            if listed is None:  # its Redis is away, others' are not
                self._hub.abandon(read.board)
                continue
            top, scores = entries_of(listed), dict(_present(read.players, found))
            now_ms = self._scores.clock_of(read.board).now_ms()
            turn_s = time.perf_counter()
            for number, step in enumerate(self._hub.publish(read.board, top, scores, now_ms)):
                self._carry_out(step)
                if isinstance(step, Publish):
                    busy_s += len(step.shard.watchers) * SEND_S
                if isinstance(step, Publish) or number % 50 == 49:
                    busy_s += time.perf_counter() - turn_s
                    await asyncio.sleep(0)
                    turn_s = time.perf_counter()
            busy_s += time.perf_counter() - turn_s
        return busy_s * 1000

    def _carry_out(self, step: Publish | Send) -> None:
        if isinstance(step, Publish):
            shard = step.shard
            shard.unchecked_bytes += sum(map(len, step.messages))
            if shard.unchecked_bytes > self._settings.live_high_water_bytes:
                self._drop_lagging(shard)
            for message in step.messages:
                self._publish_to_topic(shard.topic, message)
            return
        watcher, connection = step.watcher, step.watcher.connection
        if watcher.lagging_since_ms is not None:
            return
        if connection.buffered_bytes > self._settings.live_high_water_bytes:
            self._lag(watcher)
            return
        for message in step.messages:
            if connection.send(message) == SendStatus.DROPPED:
                self._lag(watcher)
                return
        if step.joined and watcher.shard is not None:
            connection.subscribe(watcher.shard.topic)
            self._tell_status(watcher)  # it may have changed while this one lagged

    def _tell_status(self, watcher: Watcher) -> None:
        if watcher.told_trouble != self.trouble:
            watcher.told_trouble = self.trouble
            watcher.connection.send(status_message(self.trouble))

    def _drop_lagging(self, shard: Shard) -> None:
        """Stop publishing to those who do not keep up: uWebSockets drops what is too much without a word.

        Looking costs a seventh of what publishing does, so it is done as often as a buffer may have filled up since,
        and once a second.
        """
        shard.unchecked_bytes = 0
        high_water_bytes = self._settings.live_high_water_bytes
        slow = [each for each in shard.watchers if each.connection.buffered_bytes > high_water_bytes]
        for watcher in slow:
            self._lag(watcher)

    async def _sweep(self) -> None:
        """Look at everybody, one shard per turn of the loop."""
        for shard in list(self._hub.shards):
            self._drop_lagging(shard)
            await asyncio.sleep(0)

    def _lag(self, watcher: Watcher) -> None:
        shard = self._hub.lag(watcher, int(_now_ms()))
        if shard is not None:
            watcher.connection.unsubscribe(shard.topic)


def _present(players: list[str], scores: list[bytes | None]) -> list[tuple[str, int]]:
    return [(player, int(score)) for player, score in zip(players, scores, strict=True) if score is not None]


def _now_ms() -> float:
    return time.monotonic() * 1000
