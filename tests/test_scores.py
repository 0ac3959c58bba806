"""Scores against a real Redis behind a proxy that can cut, stall and swallow."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

import psycopg
import pytest
import redis as redis_client

from server import redis_connection
from server.batches import IdempotencyKey, Outcome
from server.config import Settings
from server.database import Database
from server.embedded import RedisServer
from server.errors import Problem
from server.events import OUTBOX_FIELD, events_of_entry
from server.instruments import RedisFigures
from server.keys import Keys
from server.rebuild import Verifier
from server.redis_connection import RedisConnection
from server.scores import Scores
from sync import store

pytestmark = pytest.mark.redis

KEYS = Keys()
DEADLINE_MS = 600


@dataclasses.dataclass(eq=False)
class Request:
    """Stands for an HTTP request: takes one answer, and fails the test at a second."""

    received_s: float = dataclasses.field(default_factory=time.monotonic)
    answer: asyncio.Future[Any] = dataclasses.field(default_factory=lambda: asyncio.get_running_loop().create_future())
    departed: bool = False

    def take(self, answer: Any) -> None:
        self.answer.set_result(answer)

    def depart(self) -> None:
        self.departed = True


class Proxy:
    """Stands between server and Redis."""

    def __init__(self, redis_port: int) -> None:
        self.redis_port = redis_port
        self.swallow_replies = False
        self.refuse = False
        self.silence_at = b""
        """The connection that says this goes silent, both ways and for good; the next ones do not."""
        self.accepted = 0
        self.connections: list[asyncio.StreamWriter] = []
        self._serving: set[asyncio.Task[None]] = set()
        self._silent: set[int] = set()
        self._held: list[tuple[asyncio.StreamWriter, bytes]] | None = None
        self.requests = b""

    async def start(self) -> int:
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return int(self.server.sockets[0].getsockname()[1])

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refuse:
            writer.close()
            return
        self.connections.append(writer)
        serving = asyncio.current_task()
        assert serving is not None
        self._serving.add(serving)
        serving.add_done_callback(self._serving.discard)
        redis_reader, redis_writer = await asyncio.open_connection("127.0.0.1", self.redis_port)
        self.connections.append(redis_writer)
        self.accepted = number = self.accepted + 1
        await asyncio.gather(self._requests(number, reader, redis_writer), self._replies(number, redis_reader, writer))

    async def _requests(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                self.requests += data
                if self.silence_at and self.silence_at in data:
                    self.silence_at = b""
                    self._silent.add(number)
                if number not in self._silent:
                    writer.write(data)
        writer.close()

    async def _replies(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                if self._held is not None:
                    self._held.append((writer, data))
                elif not self.swallow_replies and number not in self._silent:
                    writer.write(data)
        writer.close()

    def silence(self) -> None:
        """Let the connections of now be as those of a host that is gone."""
        self._silent |= set(range(self.accepted + 1))

    def hold(self) -> None:
        """Keep what Redis says back until `release`."""
        self._held = []

    def release(self) -> None:
        held, self._held = self._held or [], None
        for writer, data in held:
            writer.write(data)

    def cut(self) -> None:
        for writer in self.connections:
            writer.transport.abort()
        self.connections.clear()

    async def stop(self) -> None:
        self.server.close()
        for serving in self._serving:
            serving.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)
        self.cut()
        await asyncio.sleep(0)  # each transport closes in the next turn of the loop


class NoTopic:
    """Kafka, reachable, where no event was ever sent to."""

    def describe(self) -> None:
        return None

    def close(self) -> None:
        pass


class Bench:
    """One Scores behind a proxy."""

    def __init__(self, scores: Scores, proxy: Proxy, redis: redis_client.Redis) -> None:
        self.scores = scores
        self.proxy = proxy
        self.redis = redis

    def submit(self, player: str, delta: int, board: str = "main", *, key: IdempotencyKey | None = None) -> Request:
        request = Request()
        self.scores.submit(board, player, delta, player, 1, request, key)
        return request

    def page(self, limit: int = 10) -> Request:
        request = Request()
        self.scores.read_page("main", limit, request)
        return request

    def events(self) -> list[tuple[str, int, int]]:
        return [
            (event.player_id, event.score_delta, event.new_score)
            for entry_id, fields in self.redis.xrange(KEYS.outbox)
            for event in events_of_entry(entry_id.decode(), fields[OUTBOX_FIELD])
        ]

    async def until(self, condition: Callable[[], object], deadline_s: float = 5) -> None:
        async with asyncio.timeout(deadline_s):
            while not condition():  # noqa: ASYNC110 - the condition is another process's
                await asyncio.sleep(0.01)

    async def ready(self) -> None:
        await self.until(lambda: self.scores.epoch is not None)


def take_each(requests: list[Any], results: list[int]) -> None:
    for request, outcome, value in zip(requests, results[::2], results[1::2], strict=True):
        request.take((outcome, value))


@asynccontextmanager
async def bench(
    redis: redis_client.Redis,
    redis_server: RedisServer,
    url: str,
    open_tail: Callable[[], Any] = NoTopic,
    **settings: Any,
) -> AsyncIterator[Bench]:
    proxy = Proxy(redis_server.port)
    port = await proxy.start()
    database, figures = Database(url), RedisFigures()
    defaults: dict[str, Any] = {"request_deadline_ms": DEADLINE_MS, "rate_limit_per_second": 0}
    chosen = Settings(redis_port=port, **(defaults | settings))
    scores = Scores(
        chosen,
        KEYS,
        Verifier(chosen, KEYS, database, open_tail, figures).verify,
        on_outcomes=take_each,
        on_problem=lambda request, problem: request.take(problem),
        on_page=lambda request, page: request.take(page),
        figures=figures,
    )
    running = asyncio.create_task(scores.run())
    try:
        yield Bench(scores, proxy, redis)
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
        await proxy.stop()
        await database.close()


Scenario = Callable[[Callable[[Bench], Coroutine[Any, Any, None]]], None]


@pytest.fixture
def play(redis: redis_client.Redis, redis_server: RedisServer) -> Callable[..., None]:
    """Runs a coroutine with a Bench on a Redis that was verified before."""
    redis.hset(KEYS.ready, mapping={"epoch": "7", "run_id": redis.info()["run_id"]})

    def run(
        scenario: Callable[[Bench], Awaitable[None]], url: str = "postgresql://127.0.0.1:1/none", **settings: Any
    ) -> None:
        async def main() -> None:
            async with bench(redis, redis_server, url, **settings) as one:
                await scenario(one)

        asyncio.run(main())

    return run


def test_requests_of_one_turn_form_one_batch(play: Callable[..., None]) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.ready()
        requests = [bench.submit("ann", 1) for _ in range(20)]
        assert [await request.answer for request in requests] == [(Outcome.APPLIED, n) for n in range(1, 21)]
        assert bench.scores.figures.batch_updates.count == 1

    play(scenario)


def test_more_than_a_batch_holds_goes_in_several(play: Callable[..., None]) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.ready()
        requests = [bench.submit(f"p{number}", number) for number in range(1200)]
        assert [await request.answer for request in requests] == [(Outcome.APPLIED, n) for n in range(1200)]
        assert bench.scores.figures.batch_updates.count == 3

    play(scenario)


def test_boards_do_not_wait_for_each_other(play: Callable[..., None]) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.ready()
        main, weekly = bench.submit("ann", 1), bench.submit("ann", 10, "weekly")
        assert (await main.answer, await weekly.answer) == ((Outcome.APPLIED, 1), (Outcome.APPLIED, 10))

    play(scenario)


def test_read_sees_the_writes_answered_before_it(play: Callable[..., None]) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.ready()
        for score in range(1, 30):
            await bench.submit("ann", 1).answer
            assert await bench.page().answer == b'[{"playerId":"ann","score":%d}]' % score

    play(scenario)


def test_readers_of_one_turn_share_one_command(play: Callable[..., None]) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.ready()
        bench.proxy.requests = b""
        pages = [bench.page() for _ in range(50)]
        assert {await page.answer for page in pages} == {b"[]"}
        assert bench.proxy.requests.count(b"ZREVRANGE") == 1

    play(scenario)


def half_rebuild(redis: redis_client.Redis) -> None:
    """What Redis looks like while another server rebuilds it."""
    with redis.pipeline() as together:
        together.delete(KEYS.ready)
        together.zrem(KEYS.board("main").leaderboard, "ann")
        together.execute()


def test_page_of_a_board_that_another_server_rebuilds_is_not_shown(play: Callable[..., None]) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.ready()
        for player in ("ann", "bob"):
            await bench.submit(player, 5).answer
        assert await bench.page().answer == b'[{"playerId":"bob","score":5},{"playerId":"ann","score":5}]'
        half_rebuild(bench.redis)
        pages = [bench.page(), bench.page(5)]
        assert [await page.answer for page in pages] == [None, None]
        assert bench.scores.epoch is None, "it goes on with a Redis that has no scoreboard"

    play(scenario)


def test_page_read_before_a_rebuild_and_answered_after_it_began_is_not_shown(play: Callable[..., None]) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.ready()
        bench.redis.hset(KEYS.ready, mapping={"epoch": "8", "run_id": ""})  # a replay has begun
        assert await bench.page().answer is None

    play(scenario)


def test_read_of_a_board_that_another_server_rebuilds_has_no_replies(play: Callable[..., None]) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.ready()
        await bench.submit("ann", 5).answer
        found: list[Any] = []
        commands: list[Any] = [("main", ("GET", KEYS.board("main").score("ann")))] * 2
        bench.scores.read(commands, found.append)
        await bench.until(lambda: found)
        assert found.pop() == [b"5", b"5"]
        half_rebuild(bench.redis)
        bench.scores.read(commands, found.append)
        await bench.until(lambda: found)
        assert found == [None]

    play(scenario)


def test_entry_from_the_future_is_as_old_as_it_was_seen(play: Callable[..., None]) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.ready()
        assert bench.scores.outbox_since_s is None
        hour_ahead_ms = int(bench.redis.time()[0] + 3600) * 1000
        bench.redis.xadd(KEYS.outbox, {"batch": b"x"}, id=f"{hour_ahead_ms}-1")
        await bench.until(lambda: bench.scores.outbox_since_s is not None)
        since_s = bench.scores.outbox_since_s
        assert since_s is not None
        assert since_s <= time.monotonic()
        for size in (100_000, 200_000):  # two more looks
            bench.redis.xadd(KEYS.outbox, {"batch": b"x" * size})
            await bench.until(lambda size=size: bench.scores.outbox_bytes > size)
        assert bench.scores.outbox_since_s == since_s
        bench.redis.xtrim(KEYS.outbox, maxlen=0, approximate=False)
        await bench.until(lambda: bench.scores.outbox_since_s is None)

    play(scenario)


def test_clock_is_that_of_redis(play: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 5.0)

    async def scenario(bench: Bench) -> None:
        await bench.ready()
        await bench.until(lambda: abs(bench.scores.clock.now_ms() - bench.redis.time()[0] * 1000) < 2000)

    play(scenario)


def test_batch_whose_reply_was_lost_is_sent_again_and_counts_once(play: Callable[..., None]) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.ready()
        bench.proxy.swallow_replies = True
        request = bench.submit("ann", 5)
        await bench.until(lambda: bench.redis.get(KEYS.board("main").score("ann")))
        bench.proxy.cut()
        bench.proxy.swallow_replies = False
        assert await request.answer == (Outcome.APPLIED, 5)
        assert bench.events() == [("ann", 5, 5)]
        assert await bench.submit("ann", 1).answer == (Outcome.APPLIED, 6)

    play(scenario)


def test_batch_that_never_arrived_is_sent_again(play: Callable[..., None]) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.ready()
        bench.proxy.cut()
        request = bench.submit("ann", 5)
        assert await request.answer == (Outcome.APPLIED, 5)
        assert bench.events() == [("ann", 5, 5)]

    play(scenario)


def test_batch_sent_again_into_another_epoch_has_an_unknown_outcome(play: Callable[..., None]) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.ready()
        bench.proxy.swallow_replies = True
        request = bench.submit("ann", 5)
        await bench.until(lambda: bench.redis.get(KEYS.board("main").score("ann")))
        bench.redis.hset(KEYS.ready, "epoch", "8")
        bench.proxy.cut()
        bench.proxy.swallow_replies = False
        problem = await request.answer
        assert isinstance(problem, Problem)
        assert (problem.status, problem.kind) == (503, "outcome-unknown")

    play(scenario)


def test_redis_that_does_not_answer_makes_the_outcome_unknown_within_the_deadline(play: Callable[..., None]) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.ready()
        bench.proxy.swallow_replies = True
        problem = await bench.submit("ann", 5).answer
        assert (problem.status, problem.kind) == (503, "outcome-unknown")
        bench.proxy.swallow_replies = False
        await bench.ready()
        # The number went on, so the batch that was given up could not be applied any more.
        assert await bench.submit("ann", 1).answer == (Outcome.APPLIED, 6)
        assert bench.events() == [("ann", 5, 5), ("ann", 1, 6)]

    play(scenario)


def test_update_that_was_never_sent_is_free_to_be_retried(play: Callable[..., None]) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.ready()
        bench.proxy.refuse = True
        bench.proxy.cut()
        await bench.until(lambda: bench.scores.epoch is None)
        problem = await bench.submit("ann", 5).answer
        assert (problem.status, problem.kind) == (503, "not-applied")
        # Redis has been away for longer than anybody would wait: nobody waits any more.
        await bench.until(lambda: bench.submit("ann", 5).answer.done())

    play(scenario)


def test_update_that_meets_a_short_outage_does_not_notice(play: Callable[..., None]) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.ready()
        bench.proxy.refuse = True
        bench.proxy.cut()
        await bench.until(lambda: bench.scores.epoch is None)
        request = bench.submit("ann", 5)
        bench.proxy.refuse = False
        assert await request.answer == (Outcome.APPLIED, 5)

    play(scenario)


def test_reader_is_told_when_redis_cannot_be_read(play: Callable[..., None]) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.ready()
        bench.proxy.swallow_replies = True
        assert await bench.page().answer is None
        assert await bench.page().answer is None

    play(scenario)


def test_batch_that_waited_elsewhere_says_nothing_about_its_connection(play: Callable[..., None]) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.ready()
        bench.proxy.hold()
        request = bench.submit("ann", 5)
        await bench.until(lambda: b"EVALSHA" in bench.proxy.requests)
        request.received_s -= 20
        problem = await request.answer
        assert (problem.status, problem.kind) == (503, "outcome-unknown")
        assert bench.scores.epoch is not None
        bench.proxy.release()
        assert await bench.submit("ann", 1).answer == (Outcome.APPLIED, 6)
        assert bench.proxy.accepted == 1

    play(scenario, request_deadline_ms=20_000)


def test_update_behind_a_batch_that_was_given_up_does_not_wait_for_another(play: Callable[..., None]) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.ready()
        bench.proxy.hold()
        request = bench.submit("ann", 5)
        await bench.until(lambda: b"EVALSHA" in bench.proxy.requests)
        behind = bench.submit("bob", 1)
        request.received_s -= 20
        assert (await request.answer).kind == "outcome-unknown"
        bench.proxy.release()
        async with asyncio.timeout(5):
            assert await behind.answer == (Outcome.APPLIED, 1)
        assert bench.proxy.accepted == 1

    play(scenario, request_deadline_ms=20_000)


def test_connection_that_is_lost_as_it_is_verified_is_not_used(redis_server: RedisServer) -> None:
    async def main() -> None:
        lost = 0

        async def verify(connection: RedisConnection, on_wait: Callable[[str], None]) -> str:
            nonlocal lost
            if not lost:
                lost += 1
                connection.close()
                await asyncio.sleep(0.01)
            return "7"

        settings = Settings(redis_port=redis_server.port, rate_limit_per_second=0)
        taken: list[Any] = []
        scores = Scores(
            settings,
            KEYS,
            verify,
            on_outcomes=lambda requests, results: None,
            on_problem=lambda request, problem: taken.append(problem),
            on_page=lambda request, page: taken.append(page),
        )
        with suppress(ConnectionError):
            await scores._connect()
        assert lost
        assert scores.epoch is None
        scores.read_page("main", 10, Request())
        assert taken == [None], "the reader waits for a connection that is gone"

    asyncio.run(main())


def test_page_that_waited_elsewhere_says_nothing_about_its_connection(play: Callable[..., None]) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.ready()
        bench.proxy.hold()
        page = bench.page()
        await bench.until(lambda: b"ZREVRANGE" in bench.proxy.requests)
        page.received_s -= 10
        assert await page.answer is None
        assert bench.scores.epoch is not None
        bench.redis.set("player:ann:score", 5)
        bench.redis.zadd("leaderboard", {"ann": 5})
        later = bench.page()
        await bench.until(lambda: bench.proxy.requests.count(b"ZREVRANGE") == 2)
        bench.proxy.release()
        # Not with what the read before it said, which nobody waits for any more.
        assert await later.answer == b'[{"playerId":"ann","score":5}]'
        assert bench.proxy.accepted == 1

    play(scenario, request_deadline_ms=20_000)


@pytest.mark.parametrize("key", ["session", "ratelimit", "idempotency-count"])
def test_key_that_only_remembers_is_mended_alone(
    play: Callable[..., None], caplog: pytest.LogCaptureFixture, key: str
) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.ready()
        first, second = (IdempotencyKey(f"ann:{name}", "f" * 16, "ann") for name in ("k1", "k2"))
        assert await bench.submit("ann", 5, key=first).answer == (Outcome.APPLIED, 5)
        (found,) = bench.redis.keys(f"{key}:*")
        expected = bench.redis.type(found)
        bench.redis.delete(found)
        bench.redis.sadd(found, "wrong")
        problem = await bench.submit("ann", 1, key=second).answer
        assert (problem.status, problem.kind) == (503, "not-applied")
        await bench.until(lambda: not bench.redis.exists(found))
        assert await bench.submit("ann", 1, key=second).answer == (Outcome.APPLIED, 6)
        assert bench.redis.type(found) == expected
        assert (bench.proxy.accepted, bench.scores.figures.rebuilds) == (1, 0)
        await bench.until(lambda: "taken away" in caplog.text)
        assert f"the key {found.decode()} is of another type: expected a " in caplog.text

    play(scenario, rate_limit_per_second=1, rate_limit_burst=3600)


def test_full_outbox_refuses_updates_and_loses_none(play: Callable[..., None]) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.ready()
        await bench.submit("ann", 5).answer
        bench.redis.xadd(KEYS.outbox, {"batch": b"x" * 2_000_000})
        await bench.until(lambda: bench.scores.outbox_full)
        problem = await bench.submit("ann", 5).answer
        assert (problem.status, problem.kind) == (503, "not-applied")
        bench.redis.delete(KEYS.outbox)
        await bench.until(lambda: not bench.scores.outbox_full)
        assert await bench.submit("ann", 5).answer == (Outcome.APPLIED, 10)

    play(scenario, outbox_max_bytes=1_000_000)


def test_eviction_policy_is_refused_by_name_until_it_is_right(
    play: Callable[..., None], redis: redis_client.Redis
) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.until(lambda: "maxmemory-policy" in bench.scores.reason)
        assert "expected noeviction, got allkeys-lru" in bench.scores.reason
        redis.config_set("maxmemory-policy", "noeviction")
        await bench.ready()

    redis.config_set("maxmemory-policy", "allkeys-lru")
    try:
        play(scenario)
    finally:
        redis.config_set("maxmemory-policy", "noeviction")


@pytest.mark.postgres
class TestFillingFromTheDatabase:
    """An empty Redis never starts counting from zero."""

    @pytest.fixture
    def stored(self, database_url: str) -> str:
        store.migrate(database_url)
        with psycopg.connect(database_url) as connection, connection.cursor() as cursor:
            cursor.executemany(
                "INSERT INTO scores VALUES (%s, %s, %s, %s, %s, now())",
                [("main", f"p{number}", number, 2_000_000_000_000, 65536 * number) for number in range(12_000)]
                + [("weekly", "p1", -4, 1, 1)],
            )
        return database_url

    def test_empty_redis_is_filled_before_any_update(
        self, play: Callable[..., None], stored: str, redis: redis_client.Redis
    ) -> None:
        async def scenario(bench: Bench) -> None:
            first, second = bench.submit("p7", 1), bench.submit("p1", 1, "weekly")
            await bench.ready()
            answers = await first.answer, await second.answer
            if not isinstance(answers[0], Problem):
                assert answers == ((Outcome.APPLIED, 8), (Outcome.APPLIED, -3))
            assert bench.redis.zcard(KEYS.board("main").leaderboard) == 12_000
            assert await bench.submit("p11999", 1).answer == (Outcome.APPLIED, 12_000)
            # Versions go on above everything the database has seen, however far ahead its clock was.
            last_id = bench.redis.xinfo_stream(KEYS.outbox)["last-generated-id"].decode()
            assert tuple(map(int, last_id.split("-"))) >= (2_000_000_000_000, 11_999)

        redis.flushall()
        play(scenario, stored)

    @pytest.mark.parametrize("key", [KEYS.board("main").leaderboard, KEYS.board("main").score("p7")])
    def test_damage_is_mended_with_what_the_outbox_still_knows(
        self, play: Callable[..., None], stored: str, redis: redis_client.Redis, key: str
    ) -> None:
        async def scenario(bench: Bench) -> None:
            await bench.ready()
            assert await bench.submit("p7", 1).answer == (Outcome.APPLIED, 8)
            assert await bench.submit("p7", 1).answer == (Outcome.APPLIED, 9)
            bench.redis.delete(key)
            problem = await bench.submit("p7", 1).answer
            assert (problem, bench.events()[2:]) == ((Outcome.DAMAGED, 0), [])
            await bench.until(lambda: bench.scores.epoch is None)
            await bench.ready()
            assert await bench.submit("p7", 1).answer == (Outcome.APPLIED, 10)

        redis.flushall()
        play(scenario, stored)

    def test_traffic_during_a_slow_rebuild_does_not_make_it_longer(
        self, play: Callable[..., None], stored: str, redis: redis_client.Redis
    ) -> None:
        rebuilding, may_end = threading.Event(), threading.Event()

        class Slow(NoTopic):
            def describe(self) -> None:
                rebuilding.set()
                assert may_end.wait(20)

        async def scenario(bench: Bench) -> None:
            await bench.until(rebuilding.is_set)
            may_end.set()
            await bench.ready()
            rebuilding.clear()
            may_end.clear()
            bench.proxy.swallow_replies = True
            in_flight = [bench.submit("p7", 1), bench.submit("p1", 1, "weekly")]
            await bench.until(lambda: redis.get(KEYS.board("weekly").score("p1")) == b"-3")
            redis.flushall()
            bench.proxy.cut()
            bench.proxy.swallow_replies = False
            await bench.until(rebuilding.is_set)
            accepted, answers = bench.proxy.accepted, []
            for _ in range(3):  # deadlines, of all that are in flight or come meanwhile
                waiting = [bench.submit("p8", 1), bench.page()]
                answers += [await request.answer for request in waiting]
                await asyncio.sleep(DEADLINE_MS / 2000)
            assert {(await request.answer).kind for request in in_flight} == {"outcome-unknown"}
            assert {answer.kind for answer in answers[::2]} == {"not-applied"}
            may_end.set()
            await bench.ready()
            assert await bench.submit("p7", 1).answer == (Outcome.APPLIED, 8)
            assert (bench.proxy.accepted, bench.scores.figures.rebuilds) == (accepted, 2)

        redis.flushall()
        play(scenario, stored, open_tail=Slow)

    @pytest.mark.parametrize(
        "step",
        [
            "INFO", "SCRIPT", "HMGET", "Takes the lock", "TIME", "epoch-taken", "XINFO", "XRANGE", "SCAN", "UNLINK",
            "ZADD", "XGROUP", "run_id", "return redis.call('DEL'",
        ],
    )  # fmt: skip
    def test_step_of_verifying_that_gets_no_answer_costs_its_deadline(
        self,
        play: Callable[..., None],
        stored: str,
        redis: redis_client.Redis,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
        step: str,
    ) -> None:
        async def scenario(bench: Bench) -> None:
            bench.proxy.silence_at = step.encode()
            await bench.until(lambda: not bench.proxy.silence_at, 10)
            await bench.until(lambda: bench.scores.epoch is not None, 10)
            assert await bench.submit("p7", 1).answer == (Outcome.APPLIED, 8)
            # Its own lock is no reason to wait, however its last attempt ended.
            assert "by another server" not in caplog.text

        monkeypatch.setattr(redis_connection, "REPLY_TIMEOUT_S", 0.3)
        redis.flushall()
        redis.set("player:ghost:score", 1)
        play(scenario, stored)

    def test_server_that_waits_for_another_notices_that_redis_is_gone(
        self, play: Callable[..., None], stored: str, redis: redis_client.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def scenario(bench: Bench) -> None:
            await bench.until(lambda: "by another server" in bench.scores.reason)
            accepted = bench.proxy.accepted
            bench.proxy.silence()
            await bench.until(lambda: bench.proxy.accepted > accepted)
            redis.delete(KEYS.rebuild_lock)
            await bench.ready()

        monkeypatch.setattr(redis_connection, "REPLY_TIMEOUT_S", 0.3)
        redis.flushall()
        redis.set(KEYS.rebuild_lock, "of another server", px=60_000)
        play(scenario, stored)

    def test_outbox_that_is_none_is_noticed_without_an_update(
        self, play: Callable[..., None], stored: str, redis: redis_client.Redis
    ) -> None:
        async def scenario(bench: Bench) -> None:
            await bench.ready()
            redis.delete(KEYS.outbox)
            redis.set(KEYS.outbox, "x")
            await bench.until(lambda: redis.type(KEYS.outbox) == b"stream")
            await bench.ready()
            assert await bench.submit("p7", 1).answer == (Outcome.APPLIED, 8)

        redis.flushall()
        play(scenario, stored)

    def test_marker_taken_away_while_running_is_noticed(
        self, play: Callable[..., None], stored: str, redis: redis_client.Redis
    ) -> None:
        async def scenario(bench: Bench) -> None:
            await bench.ready()
            redis.flushall()
            answer = await bench.submit("p7", 1).answer
            assert (answer.status, answer.kind) == (503, "not-applied")
            await bench.until(lambda: redis.exists(KEYS.ready))
            await bench.ready()
            assert await bench.submit("p7", 1).answer == (Outcome.APPLIED, 8)

        play(scenario, stored)

    def test_two_servers_fill_once(
        self, redis: redis_client.Redis, redis_server: RedisServer, stored: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def main() -> None:
            async with bench(redis, redis_server, stored) as one, bench(redis, redis_server, stored) as other:
                await one.ready()
                await other.ready()
                assert one.scores.epoch == other.scores.epoch

        caplog.set_level("INFO", "server.rebuild")
        asyncio.run(main())
        assert len([record for record in caplog.records if "rebuilt Redis" in record.message]) == 1

    def test_nothing_is_accepted_while_the_database_is_away_too(
        self, play: Callable[..., None], redis: redis_client.Redis
    ) -> None:
        async def scenario(bench: Bench) -> None:
            problem = await bench.submit("p7", 1).answer
            assert (problem.status, problem.kind) == (503, "not-applied")
            await bench.until(lambda: "the database fails" in bench.scores.reason)
            assert redis.exists(KEYS.ready) == 0

        redis.flushall()
        play(scenario)
