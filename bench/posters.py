"""Game clients that post on a fixed schedule, however late the answers come.

    python -m bench.posters PORT RATE PLAYERS        the secret comes in JWT_SECRET

Commands (bench/generator.py): `start`, `stop`, `save FILE`. Every delay counts from when the schedule wanted
the POST to leave: one that had to wait for a free connection is late, and is not left out. The first LEADERS players
are far ahead of the others, so whatever they score changes the first list; they make every second update.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, Final, cast

import msgspec
import uvloop

from bench.generator import commands, reply
from bench.http_answer import complete
from server.auth import issue
from server.embedded import ADDRESS

LEADERS: Final = 10
"""As many as the shortest list shows."""

HEAD_START: Final = 10**12
CONNECTIONS: Final = 64
SECONDS_IDLE: Final = 5.0
"""Longest that a connection may wait for its turn: the server closes it after 10."""

TICK_S: Final = 0.001
"""uvloop rounds to whole ms, and would spin below one."""

ANSWERS_WITHIN_S: Final = 10.0


def player_name(number: int) -> str:
    """Leaders come first."""
    return f"leader{number}" if number < LEADERS else f"player{number}"


class Log(msgspec.Struct):
    """Every POST that was answered with 200, one list for each of its fields; times are CLOCK_MONOTONIC."""

    players: list[int] = []
    new_scores: list[int] = []
    scheduled_ns: list[int] = []
    answered_ns: list[int] = []


class Posters:
    """All connections and the schedule."""

    def __init__(self, port: int, rate: float, players: int) -> None:
        self.port = port
        self.log = Log()
        self.idle: deque[Poster] = deque()
        self.failed: list[str] = []
        self._waiting: deque[int] = deque()  # when the schedule wanted them to leave
        self._rate = rate
        self._rng = random.Random(1)
        self._posted = 0
        self._answered = 0
        self._running = False
        secret = os.environ["JWT_SECRET"].encode()
        self._heads = [_head(issue(secret, player_name(number))) for number in range(players)]
        self._connections = [Poster(self) for _ in range(min(CONNECTIONS, max(1, int(rate * SECONDS_IDLE))))]

    async def prepare(self) -> None:
        """Connect, and put the leaders ahead."""
        loop = asyncio.get_running_loop()
        for connection in self._connections:
            await loop.create_connection(connection.itself, ADDRESS, self.port)
        for player in range(LEADERS):
            self._submit(player, HEAD_START, time.monotonic_ns())
            await self._all_answered()

    def start(self) -> None:
        """Follow the schedule from now on."""
        self._running = True
        self._task = asyncio.get_running_loop().create_task(self._follow_schedule())

    async def stop(self) -> dict[str, Any]:
        """Post no more and wait for the answers."""
        self._running = False
        await self._task
        await self._all_answered()
        return {"posted": self._posted, "answered": self._answered, "failed": self.failed[:5]}

    def save(self, path: str) -> dict[str, Any]:
        """Write the log."""
        Path(path).write_bytes(msgspec.msgpack.encode(self.log))
        return {}

    def take(self, poster: Poster) -> None:
        """The connection is free: whoever waits longest goes first."""
        self.idle.append(poster)
        if self._waiting:
            self._post(self._waiting.popleft())

    def answered(self) -> None:
        """One more answer, good or bad."""
        self._answered += 1

    async def _follow_schedule(self) -> None:
        began_ns, number = time.monotonic_ns(), 0
        while self._running:
            due = int((time.monotonic_ns() - began_ns) * self._rate / 1e9) + 1
            while number < due:
                scheduled_ns = began_ns + int(number * 1e9 / self._rate)
                number += 1
                if self.idle:
                    self._post(scheduled_ns)
                else:
                    self._waiting.append(scheduled_ns)
            next_s = (began_ns + number * 1e9 / self._rate - time.monotonic_ns()) / 1e9
            await asyncio.sleep(max(TICK_S, next_s))

    def _post(self, scheduled_ns: int) -> None:
        turn, is_other = divmod(self._posted, 2)
        others = len(self._heads) - LEADERS
        player = LEADERS + turn % others if is_other and others else turn % LEADERS
        self._submit(player, self._rng.randint(1, 100), scheduled_ns)

    def _submit(self, player: int, delta: int, scheduled_ns: int) -> None:
        self._posted += 1
        body = b'{"playerId":"%s","scoreDelta":%d}' % (player_name(player).encode(), delta)
        request = b"%s%d\r\n\r\n%s" % (self._heads[player], len(body), body)
        self.idle.popleft().submit(player, scheduled_ns, request)

    async def _all_answered(self) -> None:
        deadline_s = time.monotonic() + ANSWERS_WITHIN_S
        while self._answered < self._posted and time.monotonic() < deadline_s:  # noqa: ASYNC110 (not worth events)
            await asyncio.sleep(0.01)


def _head(token: str) -> bytes:
    lines = ["POST /update-score HTTP/1.1", f"Host: {ADDRESS}", f"Authorization: Bearer {token}"]
    return "\r\n".join([*lines, "Content-Type: application/json", "Content-Length: "]).encode()


class Poster(asyncio.Protocol):
    """One keep-alive connection, one request at a time."""

    def __init__(self, posters: Posters) -> None:
        self._posters = posters
        self._transport: asyncio.Transport | None = None
        self._answer = b""
        self._player = self._scheduled_ns = 0

    def itself(self) -> Poster:
        """What asyncio wants to make a protocol with."""
        return self

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio: connected."""
        self._transport = cast(asyncio.Transport, transport)
        self._posters.idle.append(self)

    def connection_lost(self, error: Exception | None) -> None:
        """asyncio: the server closed it, which it should not."""
        self._posters.failed.append(f"connection lost: {error}")
        if self in self._posters.idle:
            self._posters.idle.remove(self)

    def submit(self, player: int, scheduled_ns: int, request: bytes) -> None:
        """Send a POST."""
        assert self._transport is not None
        self._player, self._scheduled_ns = player, scheduled_ns
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        """asyncio: an answer, or a piece of one."""
        self._answer += data
        answer = complete(self._answer)
        if answer is None:
            return
        self._answer = b""
        posters, log = self._posters, self._posters.log
        posters.answered()
        if answer.status == 200:
            log.players.append(self._player)
            log.new_scores.append(int(answer.body[answer.body.rindex(b":") + 1 : -1]))
            log.scheduled_ns.append(self._scheduled_ns)
            log.answered_ns.append(time.monotonic_ns())
        else:
            posters.failed.append((answer.head + answer.body).decode("latin-1"))
        posters.take(self)


async def _run(port: int, rate: float, players: int) -> None:
    posters = Posters(port, rate, players)
    await posters.prepare()
    reply({})
    async for command in commands():
        name, _, argument = command.partition(" ")
        if name == "start":
            posters.start()
            reply({})
        elif name == "stop":
            reply(await posters.stop())
        elif name == "save":
            reply(posters.save(argument))


if __name__ == "__main__":
    uvloop.run(_run(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])))
