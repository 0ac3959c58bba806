"""Two servers mend one Redis, each paused wherever it may be, by clocks that are apart: nothing accepted is lost.

Redis is real. Kafka and the database stand in memory, so that every pair of pauses can be tried.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any, cast

import hypothesis
import msgspec
import pytest
import redis as redis_client
from hypothesis import strategies as st

from server import rebuild
from server.config import Settings
from server.embedded import RedisServer
from server.errors import NotReady
from server.events import OUTBOX_FIELD, ScoreEvent, events_of_entry
from server.fences import EPOCH_HEADER, FENCE_HEADER, Fences
from server.kafka_tail import Record
from server.keys import Keys
from server.rebuild import Verifier
from server.redis_connection import RedisConnection, open_connection
from server.replay import Fold, Log

pytestmark = pytest.mark.redis

KEYS = Keys()
BOARD = KEYS.board("main")
AHEAD_MS = 10_000

_ahead_ms: ContextVar[int] = ContextVar("ahead_ms", default=0)
"""How far the clock of the server that runs is ahead."""


class Pause:
    """Stops one server at a step: at the n-th thing that it is about to do outside of itself."""

    def __init__(self, at_step: int | None = None) -> None:
        self.at_step = at_step
        self.steps = 0
        self.reached = asyncio.Event()
        self.over = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    async def step(self) -> None:
        self.steps += 1
        if self.steps == self.at_step:
            self.reached.set()
        if self.reached.is_set():
            await self.over.wait()

    def step_of_thread(self) -> None:
        asyncio.run_coroutine_threadsafe(self.step(), self._loop).result(20)


class PausingConnection:
    """A connection to Redis that is asked step by step."""

    def __init__(self, connection: RedisConnection, pause: Pause) -> None:
        self._connection = connection
        self._pause = pause

    async def execute(self, *command: bytes | str | int) -> Any:
        await self._pause.step()
        return await self._connection.execute(*command)


class MemoryLog:
    """A topic of one partition."""

    def __init__(self) -> None:
        self.records: list[tuple[list[tuple[str, bytes]], ScoreEvent | None]] = []
        self.times_ms: list[int] = []

    def append(self, header: tuple[str, int], event: ScoreEvent | None, at_ms: int) -> None:
        name, epoch = header
        self.records.append(([(name, str(epoch).encode())], event))
        self.times_ms.append(at_ms)

    @property
    def fences(self) -> int:
        return sum(event is None for _, event in self.records)

    def counting(self, records: slice = slice(None), fences: Fences | None = None) -> Iterator[tuple[int, ScoreEvent]]:
        fences = fences if fences is not None else Fences()
        for offset, (headers, event) in list(enumerate(self.records))[records]:
            if fences.admits(0, headers) and event is not None:
                yield offset, event


class MemoryTail:
    """KafkaTail, of a MemoryLog."""

    def __init__(self, log: MemoryLog, pause: Pause) -> None:
        self._log = log
        self._pause = pause
        self._unread: list[Record] = []

    def describe(self) -> Log:
        self._pause.step_of_thread()
        return Log("id", {0: (0, len(self._log.records))})

    def first_since(self, at_ms: int) -> dict[int, int]:
        self._pause.step_of_thread()
        found = (number for number, time_ms in enumerate(self._log.times_ms) if time_ms >= at_ms)
        return {0: next(found, len(self._log.records))}

    def fence(self, epoch: int, at_ms: int, tag: str = "") -> dict[int, int]:
        self._pause.step_of_thread()
        self._log.append((FENCE_HEADER, epoch), None, at_ms)
        self._pause.step_of_thread()
        return {0: len(self._log.records)}

    def start(self, starts: Mapping[int, int], ends: Mapping[int, int], fences: Fences) -> None:
        found = self._log.counting(slice(starts[0], ends[0]), fences)
        self._unread = [Record(0, offset, event, None) for offset, event in found]

    def read(self) -> list[Record]:
        self._pause.step_of_thread()
        records, self._unread = self._unread, []
        return records

    def close(self) -> None:
        pass


class EmptyDatabase:
    """A database whose persister has stored nothing yet."""

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[EmptyDatabase]:
        yield self

    async def offsets(self, topic: str) -> dict[int, Any]:
        return {}

    async def scores(self, boards: list[str] | None = None) -> AsyncGenerator[list[Any], None]:
        if boards:
            yield []


class World:
    """One Redis, one log, and what clients were told."""

    def __init__(self, redis: redis_client.Redis, settings: Settings) -> None:
        self.redis = redis
        self.settings = settings
        self.log = MemoryLog()
        self.accepted: dict[str, int] = {}
        self.players = itertools.count()

    def marker(self) -> tuple[int, str]:
        epoch, run_id = cast(Any, self.redis.hmget(KEYS.ready, "epoch", "run_id"))
        return int(epoch or 0), (run_id or b"").decode()

    def accept(self, epoch: int) -> bool:
        """What apply_updates.lua does with an update of a server at this epoch, and a new player's."""
        if self.marker()[0] != epoch:
            return False
        player, score = f"p{next(self.players)}", 1
        payload = msgspec.msgpack.encode(["main", player, 1, score])
        self.redis.xadd(KEYS.outbox, cast(Any, {OUTBOX_FIELD: payload}))
        self.redis.set(BOARD.score(player), score)
        self.redis.zadd(BOARD.leaderboard, {player: score})
        self.accepted[player] = score
        return True

    def relay(self) -> None:
        """What the relay does, in one go."""
        epoch, _ = self.marker()
        if not epoch or self.redis.type(KEYS.outbox) != b"stream":
            return
        entries: Any = self.redis.xrange(KEYS.outbox)
        for entry_id, fields in entries:
            for event in events_of_entry(entry_id.decode(), fields[OUTBOX_FIELD]):
                self.log.append((EPOCH_HEADER, epoch), event, event.at)
        self.redis.xtrim(KEYS.outbox, maxlen=0, approximate=False)

    def stored(self) -> dict[str, int]:
        """What a persister makes of the log."""
        fold = Fold()
        for _, event in self.log.counting():
            fold.add(event)
        return {player: score for _, player, score in fold.rest()}

    def shown(self) -> dict[str, int]:
        members = cast(Any, self.redis.zrange(BOARD.leaderboard, 0, -1, withscores=True))
        return {player.decode(): int(score) for player, score in members}


class Server:
    """One server's Verifier, over one connection after another."""

    def __init__(self, world: World, pause_at: int | None = None, ahead_ms: int = 0) -> None:
        self.pause = Pause(pause_at)
        self.epoch = 0
        self._world = world
        self._ahead_ms = ahead_ms
        tail: Callable[[], Any] = lambda: MemoryTail(world.log, self.pause)  # noqa: E731
        self._verifier = Verifier(world.settings, KEYS, cast(Any, EmptyDatabase()), tail)

    async def become_ready(self) -> None:
        """As Scores does it."""
        _ahead_ms.set(self._ahead_ms)
        while True:
            connection = await open_connection(self._world.settings, lambda lost: None)
            try:
                pausing = cast(Any, PausingConnection(connection, self.pause))
                self.epoch = int(await self._verifier.verify(pausing, lambda reason: None))
                return
            except NotReady:
                continue
            finally:
                connection.close()

    async def until_paused(self) -> asyncio.Task[None]:
        """Its way to being ready, as far as it goes by itself."""
        task = asyncio.create_task(self.become_ready())
        reached = asyncio.create_task(self.pause.reached.wait())
        await asyncio.wait((task, reached), return_when=asyncio.FIRST_COMPLETED)
        reached.cancel()
        return task


def new_world(redis: redis_client.Redis, settings: Settings, *, emptied: bool, epoch: int = 5) -> World:
    """A Redis whose process is another one since the marker was set, or one that was emptied as well."""
    redis.flushall()
    world = World(redis, settings)
    redis.hset(KEYS.ready, mapping={"epoch": epoch, "run_id": "that of the process before"})
    for _ in range(2):
        world.accept(epoch)
        world.relay()
    if emptied:
        redis.flushall()
    return world


async def meet(
    world: World, first_at: int, second_at: int | None, ahead_ms: tuple[int, int], *, replaced: bool = False
) -> int:
    """Pause one server, let the other go on, perhaps up to a pause too, then the first; how many steps that did.

    Redis may be `replaced` by an empty one, which knows of no epoch, while the first is paused.
    """
    first, second = Server(world, first_at, ahead_ms[0]), Server(world, second_at, ahead_ms[1])

    def serve(server: Server) -> None:
        world.accept(server.epoch)
        world.relay()

    one = await first.until_paused()
    world.redis.delete(KEYS.rebuild_lock)  # as its expiry does
    if replaced:
        world.redis.flushall()
    other = await second.until_paused()
    serve(second)
    if second.pause.reached.is_set():
        world.redis.delete(KEYS.rebuild_lock)
    first.pause.over.set()
    await one
    serve(first)
    serve(second)  # it has not noticed yet
    second.pause.over.set()
    await other
    for server in (first, second):
        if server.epoch != world.marker()[0]:  # as it notices within a second, or by its next batch
            await server.become_ready()
        assert server.epoch == world.marker()[0]
        assert world.accept(server.epoch)
    world.relay()
    return first.pause.steps


async def check_that_nothing_is_lost(world: World) -> None:
    assert world.shown() == world.accepted
    assert world.stored() == world.accepted
    world.redis.flushall()
    await Server(world).become_ready()
    assert world.shown() == world.accepted, "after the next loss of Redis"


@pytest.fixture
def settings(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> Settings:
    true_clock = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: true_clock() + 1_000_000 * _ahead_ms.get())
    monkeypatch.setattr(rebuild, "LOCK_POLL_S", 0.002)
    return Settings(redis_port=redis_server.port)


@pytest.mark.parametrize("ahead_ms", [(AHEAD_MS, 0), (0, AHEAD_MS)], ids=["first ahead", "second ahead"])
@pytest.mark.parametrize("emptied", [True, False], ids=["rebuild", "replay"])
def test_server_paused_at_any_step_loses_nothing_that_another_accepts(
    redis: redis_client.Redis, settings: Settings, emptied: bool, ahead_ms: tuple[int, int]
) -> None:
    async def main() -> None:
        for step in itertools.count(1):
            world = new_world(redis, settings, emptied=emptied)
            steps = await meet(world, step, None, ahead_ms)
            await check_that_nothing_is_lost(world)
            if step > steps:
                assert steps > 15, "expected all the steps of mending"
                return

    asyncio.run(main())


def test_server_that_finds_its_fence_above_the_marker_mends_again(
    redis: redis_client.Redis, settings: Settings
) -> None:
    """As where the clock of the Redis before was ahead: no epoch of the new one is above the fence by itself."""
    ahead = 2 * time.time_ns() // 1_000_000

    async def main() -> None:
        mended_again = 0
        for step in itertools.count(1):
            world = new_world(redis, settings, emptied=False, epoch=ahead)
            steps = await meet(world, step, None, (0, 0), replaced=True)
            await check_that_nothing_is_lost(world)
            mended_again += world.log.fences == 4  # with those of the other server and of the last check
            if step > steps:
                break
        assert mended_again

    asyncio.run(main())


@hypothesis.given(
    st.booleans(), st.sampled_from([(AHEAD_MS, 0), (0, AHEAD_MS)]), st.integers(1, 30), st.integers(1, 30)
)
@hypothesis.settings(
    max_examples=60, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_two_servers_paused_at_any_two_steps_lose_nothing(
    redis: redis_client.Redis, settings: Settings, emptied: bool, ahead_ms: tuple[int, int], first: int, second: int
) -> None:
    async def main() -> None:
        world = new_world(redis, settings, emptied=emptied)
        await meet(world, first, second, ahead_ms)
        await check_that_nothing_is_lost(world)

    asyncio.run(main())
