"""POST → WebSocket: how long until a watcher sees a change. Run in a process of its own, prints JSON.

python -m bench.latency URL SECONDS        the secret comes in JWT_SECRET
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import sys
import time

from websockets.asyncio.client import ClientConnection, connect

from server.auth import issue

PLAYERS = 1000
"""Each scores every 5 s, so that no two of its changes fall into one flush and only one is shown."""

UPDATES_PER_SECOND = 200
POSTERS = 8
LAST_WITHIN_S = 1.0
"""What is not seen this long after the last POST never will be."""


class Board:
    """When each change was posted, answered and seen; a change is (player, new score)."""

    def __init__(self) -> None:
        self.posted_s: dict[tuple[str, int], float] = {}
        self.answers_ms: list[float] = []
        self.seen_ms: list[float] = []

    async def watch(self, socket: ClientConnection) -> None:
        """Note every change that arrives."""
        async for text in socket:
            now_s = time.perf_counter()
            message = json.loads(text)
            if message["type"] == "scoreUpdate":
                posted_s = self.posted_s.pop((message["playerId"], message["newScore"]), None)
                if posted_s is not None:
                    self.seen_ms.append((now_s - posted_s) * 1000)

    async def post(self, host: str, port: int, players: list[str], until_s: float) -> None:
        """Let the players score one after the other, at random moments, over one connection."""
        secret = os.environ["JWT_SECRET"].encode()
        requests = {player: _request(host, player, issue(secret, player)) for player in players}
        scores = dict.fromkeys(players, 0)
        reader, writer = await asyncio.open_connection(host, port)
        due_s = time.perf_counter()
        for player in itertools.cycle(players):
            due_s += random.expovariate(UPDATES_PER_SECOND / POSTERS)
            if due_s >= until_s:
                break
            await asyncio.sleep(due_s - time.perf_counter())
            scores[player] += 1
            started_s = self.posted_s[player, scores[player]] = time.perf_counter()
            writer.write(requests[player])
            await _read_answer(reader)
            self.answers_ms.append((time.perf_counter() - started_s) * 1000)
        writer.close()


def _request(host: str, player: str, token: str) -> bytes:
    body = json.dumps({"playerId": player, "scoreDelta": 1})
    head = f"POST /update-score HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {token}\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


async def _read_answer(reader: asyncio.StreamReader) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    if b" 200 " not in head.partition(b"\r\n")[0]:
        raise RuntimeError(f"expected 200, got {head.decode()}")
    length = head.partition(b"content-length:")[2].partition(b"\r\n")[0]
    await reader.readexactly(int(length))


async def measure(address: str, seconds: float) -> dict[str, float]:
    """Figures in ms; `unseen` counts changes that no message told of."""
    host, _, port = address.removeprefix("http://").rpartition(":")
    board = Board()
    async with connect(f"ws://{host}:{port}/live-updates?limit=10", compression=None) as socket:
        await socket.recv()
        watching = asyncio.create_task(board.watch(socket))
        until_s = time.perf_counter() + seconds
        names = [f"watched{number}" for number in range(PLAYERS)]
        posters = [board.post(host, int(port), names[first::POSTERS], until_s) for first in range(POSTERS)]
        started_s = time.perf_counter()
        await asyncio.gather(*posters)
        duration_s = time.perf_counter() - started_s
        await asyncio.sleep(LAST_WITHIN_S)
        watching.cancel()
    return {
        "updates": len(board.answers_ms),
        "per_second": len(board.answers_ms) / duration_s,
        "post_p50_ms": _percentile(board.answers_ms, 50),
        "post_p99_ms": _percentile(board.answers_ms, 99),
        "seen_p50_ms": _percentile(board.seen_ms, 50),
        "seen_p99_ms": _percentile(board.seen_ms, 99),
        "unseen": len(board.posted_s),
    }


def _percentile(values: list[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) * percent // 100, len(ordered) - 1)] if ordered else float("nan")


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asyncio.run(measure(sys.argv[1], float(sys.argv[2])))) + "\n")
