"""Slow-loris: what thousands of connections that never finish a request cost everybody else.

    python -m bench.slow_clients [CLIENTS [RATE]]        5000 and 500 POSTs/s; prints one JSON object per round

A third of the connections say nothing, a third send a header byte by byte, a third a body; each that is closed comes
back at once. Rounds without and with them alternate, so that a busy machine shows. A POST counts from when the
schedule wanted it to leave.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Final

import uvloop

from bench.processes import resident_bytes
from server.embedded import ADDRESS, RedisServer, free_port
from tests.client import connect, token, trust, wait_until_writable
from tests.services import ServerProcess

ROUNDS: Final = 3
ROUND_S: Final = 12.0
CONNECTIONS: Final = 32
ARRIVE_S: Final = 8.0
PAUSE_S: Final = 5.0
"""Between two bytes of a slow client: the server waits 10 s."""

_BODY: Final = b'{"playerId":"%s","scoreDelta":1}'


def _post(player: str, length: int | None = None) -> bytes:
    body = _BODY % player.encode()
    head = f"POST /update-score HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {token(player)}\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n%s" % (length or len(body), body)


async def _be_slow(port: int, kind: int) -> None:
    await asyncio.sleep(random.uniform(0, ARRIVE_S))
    request = _post("slow", 1000)
    head = b"GET /healthz HTTP/1.1\r\nHost: bench\r\nX-Slow: "  # a request line in pieces would be a 505
    begin, rest = ((b"", b""), (head, b"a" * 3000), (request, b" " * 900))[kind]
    while True:
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection(ADDRESS, port)
            writer.write(begin)
            gone = asyncio.ensure_future(_end(reader))
            for at in range(1000):
                await asyncio.wait([gone], timeout=PAUSE_S)
                if gone.done():
                    break
                writer.write(rest[at : at + 1])
            writer.close()
        await asyncio.sleep(0.1)


async def _end(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(OSError):
        await reader.read()


def _slow_clients(port: int, count: int) -> None:
    async def all_of_them() -> None:
        await asyncio.gather(*(_be_slow(port, number % 3) for number in range(count)))

    uvloop.run(all_of_them())


async def _measure(port: int, rate: float) -> tuple[list[float], Counter[str]]:
    """Delays in ms of POSTs at a fixed rate, and how they were answered."""
    delays_ms: list[float] = []
    answers: Counter[str] = Counter()
    started_s = time.perf_counter()

    async def poster(number: int) -> None:
        reader, writer = await asyncio.open_connection(ADDRESS, port)
        for turn in range(int(rate * ROUND_S / CONNECTIONS)):
            due_s = started_s + (turn * CONNECTIONS + number) / rate
            await asyncio.sleep(max(0, due_s - time.perf_counter()))
            writer.write(_requests[(turn * CONNECTIONS + number) % len(_requests)])
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            await reader.readexactly(length)
            delays_ms.append((time.perf_counter() - due_s) * 1000)
            answers[head[9:12].decode()] += 1
        writer.close()

    await asyncio.gather(*(poster(number) for number in range(CONNECTIONS)))
    return sorted(delays_ms), answers


_requests: list[bytes] = []


def _round(server: ServerProcess, rate: float, slow: int) -> None:
    attackers = multiprocessing.get_context("spawn").Process(target=_slow_clients, args=(server.port, slow))
    if slow:
        attackers.start()
        time.sleep(ARRIVE_S + 4)  # all of them are there
    delays_ms, answers = uvloop.run(_measure(server.port, rate))
    held = sum(1 for _ in Path(f"/proc/{server.pid}/fd").iterdir())
    figures = {
        "slow_clients": slow,
        "open_files": held,
        "p50_ms": round(delays_ms[len(delays_ms) // 2], 2),
        "p99_ms": round(delays_ms[len(delays_ms) * 99 // 100], 2),
        "max_ms": round(delays_ms[-1], 1),
        "answers": dict(answers),
        "server_mb": round(resident_bytes(server.pid) / 2**20, 1),
    }
    sys.stdout.write(json.dumps(figures) + "\n")
    sys.stdout.flush()
    if slow:
        attackers.terminate()
        attackers.join()
        time.sleep(2)


def main(clients: int = 5000, rate: float = 500) -> None:
    """Measure, with a server and a Redis of its own."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        redis = RedisServer(Path(scratch) / "redis")
        none = free_port()
        settings = {
            "REDIS_PORT": str(redis.port),
            "KAFKA_BROKERS": f"{ADDRESS}:{none}",
            "DATABASE_URL": f"postgresql://{ADDRESS}:{none}/none",
        }
        server = ServerProcess(Path(scratch), settings)
        for process in (redis, server):
            stack.callback(process.stop)
        redis.start()
        with connect(redis) as client:
            trust(client)
        server.start()
        wait_until_writable(server)
        _requests.extend(_post(f"player{number}") for number in range(1000))
        for _ in range(ROUNDS):
            _round(server, rate, 0)
            _round(server, rate, clients)


if __name__ == "__main__":
    main(*(int(each) for each in sys.argv[1:3]))
