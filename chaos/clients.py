"""Game clients: a process that posts updates at a steady rate and asks again until each is answered.

    python -m chaos.clients PORT SEED RATE LEDGER

Every update has an Idempotency-Key and is sent with it until a 200 comes, over as many connections as that takes.
When standard input ends no new updates are made; once all are answered the ledger is saved. Prints its Figures as a
line of JSON each second, and a last one at the end. Knows nothing of what is done to the scoreboard meanwhile.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from collections import deque
from pathlib import Path
from typing import Final, cast

import msgspec
import uvloop

from bench.http_answer import complete
from chaos.ledger import Ledger, player_name
from server.auth import issue
from server.embedded import ADDRESS

PLAYERS: Final = 300
CONNECTIONS: Final = 64
LARGEST_DELTA: Final = 1000

PATIENCE_S: Final = 4.0
"""How long a client waits for an answer before it tries another connection: twice the server's deadline."""

RETRY_S: Final = 0.2
TICK_S: Final = 0.005
ANSWER_WITHIN_S: Final = 120.0
"""How long after the last new update all must have been answered."""


class Figures(msgspec.Struct):
    """How it went so far."""

    acknowledged: int = 0
    replayed: int = 0  # answered from memory: the change had been applied before, and its answer was lost
    retries: int = 0
    refused: int = 0  # final answers other than 200: there should be none
    unanswered: int = 0
    longest_outage_ms: int = 0


class Update:
    """One change and since when it waits for its 200."""

    __slots__ = ("delta", "number", "player", "request", "since_s")

    def __init__(self, number: int, player: int, delta: int, request: bytes) -> None:
        self.number = number
        self.player = player
        self.delta = delta
        self.request = request
        self.since_s = time.monotonic()


class Clients:
    """All connections, and the ledger they write."""

    def __init__(self, port: int, seed: int, rate: float) -> None:
        self.port = port
        self.ledger = Ledger()
        self.figures = Figures()
        self.idle: deque[Client] = deque()
        self.ending = asyncio.Event()
        self._rate = rate
        self._rng = random.Random(seed)
        self._made = 0
        secret = os.environ["JWT_SECRET"].encode()
        self._heads = [_head(issue(secret, player_name(number))) for number in range(PLAYERS)]
        self._all = [Client(self) for _ in range(CONNECTIONS)]

    @property
    def unanswered(self) -> int:
        """Updates that wait for their 200."""
        return sum(client.update is not None for client in self._all)

    async def run(self) -> None:
        """Post until `ending` is set, then until all is answered."""
        loop = asyncio.get_running_loop()
        connecting = [loop.create_task(client.connect()) for client in self._all]
        told_s, last_s, due = time.monotonic(), time.monotonic(), 0.0
        while not self.ending.is_set():
            await asyncio.sleep(TICK_S)
            now_s = time.monotonic()
            # What nobody could take is not made up for: a player in an outage waits, and does not hurry behind it.
            due = min(due + (now_s - last_s) * self._rate, CONNECTIONS)
            last_s = now_s
            while due >= 1 and self.idle:
                due -= 1
                self.idle.popleft().submit(self._new_update())
            if now_s > told_s + 1:
                told_s = now_s
                self._abort_the_silent(now_s)
                self.tell()
        deadline_s = time.monotonic() + ANSWER_WITHIN_S
        while self.unanswered and time.monotonic() < deadline_s:
            await asyncio.sleep(0.1)
            self._abort_the_silent(time.monotonic())
        for task in connecting:
            task.cancel()

    def tell(self) -> None:
        """Print the figures."""
        self.figures.acknowledged, self.figures.unanswered = len(self.ledger), self.unanswered
        print(msgspec.json.encode(self.figures).decode(), flush=True)

    def _new_update(self) -> Update:
        self._made += 1
        player, delta = self._rng.randrange(PLAYERS), self._rng.randint(1, LARGEST_DELTA)
        body = b'{"playerId":"%s","scoreDelta":%d}' % (player_name(player).encode(), delta)
        request = b"%s%d\r\nContent-Length: %d\r\n\r\n%s" % (self._heads[player], self._made, len(body), body)
        return Update(self._made, player, delta, request)

    def _abort_the_silent(self, now_s: float) -> None:
        for client in self._all:
            if client.sent_s is not None and now_s > client.sent_s + PATIENCE_S:
                client.abort()


def _head(token: str) -> bytes:
    lines = ["POST /update-score HTTP/1.1", f"Host: {ADDRESS}", f"Authorization: Bearer {token}", "Idempotency-Key: "]
    return "\r\n".join(lines).encode()


class Client(asyncio.Protocol):
    """One game client: one connection at a time, one update at a time."""

    def __init__(self, clients: Clients) -> None:
        self.update: Update | None = None
        self.sent_s: float | None = None
        self._clients = clients
        self._transport: asyncio.Transport | None = None
        self._lost = asyncio.Event()
        self._answer = b""

    async def connect(self) -> None:
        """Keep a connection, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await loop.create_connection(lambda: self, ADDRESS, self._clients.port)
            except OSError:  # which TimeoutError is too
                await asyncio.sleep(RETRY_S)
            else:
                await self._lost.wait()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio: connected."""
        self._transport = cast(asyncio.Transport, transport)
        self._lost.clear()
        self._answer = b""
        if self.update is None:
            self._clients.idle.append(self)
        else:
            self._send_again()

    def connection_lost(self, error: Exception | None) -> None:
        """asyncio: the server died, closed it, or was silent for too long."""
        self._transport, self.sent_s = None, None
        if self.update is None:
            self._clients.idle.remove(self)
        self._lost.set()

    def submit(self, update: Update) -> None:
        """Post a new update."""
        self.update = update
        self._send()

    def abort(self) -> None:
        """Give this connection up; the update goes over the next one."""
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """asyncio: an answer, or a piece of one."""
        self._answer += data
        answer = complete(self._answer)
        if answer is None:
            return
        self._answer, self.sent_s = b"", None
        self._take(answer.status, b"\r\nidempotent-replayed:" in answer.head, answer.body)

    def _take(self, status: int, replayed: bool, body: bytes) -> None:
        update, figures = self.update, self._clients.figures
        assert update is not None, "an answer without a question"
        if status == 503:
            # The Retry-After of 1 s is for the many; a few may ask sooner, to see when the outage ends.
            asyncio.get_running_loop().call_later(RETRY_S, self._send_again)
            return
        if status == 200:
            new_score = int(body[body.rindex(b":") + 1 : -1])
            self._clients.ledger.add(update.number, update.player, update.delta, new_score)
            figures.replayed += replayed
            waited_ms = int((time.monotonic() - update.since_s) * 1000)
            figures.longest_outage_ms = max(figures.longest_outage_ms, waited_ms)
        else:
            figures.refused += 1
            print(f"{status} for update {update.number}: {body!r}", file=sys.stderr)
        self.update = None
        self._clients.idle.append(self)

    def _send_again(self) -> None:
        if self.update is not None and self.sent_s is None and self._transport is not None:
            self._clients.figures.retries += 1
            self._send()

    def _send(self) -> None:
        assert self.update is not None
        assert self._transport is not None
        self.sent_s = time.monotonic()
        self._transport.write(self.update.request)


async def _run(port: int, seed: int, rate: float, path: Path) -> None:
    clients = Clients(port, seed, rate)
    loop = asyncio.get_running_loop()
    stdin = sys.stdin.fileno()

    def on_input() -> None:
        if not os.read(stdin, 4096):
            loop.remove_reader(stdin)
            clients.ending.set()

    loop.add_reader(stdin, on_input)
    await clients.run()
    clients.ledger.save(path)
    clients.tell()


if __name__ == "__main__":
    uvloop.run(_run(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), Path(sys.argv[4])))
