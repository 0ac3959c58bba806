"""Many watchers in one process: counts the frames that each gets, and notes for a sample what arrived when.

    python -m bench.watchers PORT CLIENTS QUERY

Commands (bench/generator.py): `begin`, `end`, `save FILE`. Raw sockets on uvloop, since a client library costs more
than the server does: of a frame only its header is looked at, and whoever is in one shard gets the same bytes, so
those that equal the last ones are not even parsed. Messages of the sample are decoded when all is over.
"""

from __future__ import annotations

import asyncio
import base64
import collections
import hashlib
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, cast

import msgspec
import uvloop

from bench.generator import commands, reply
from server.embedded import ADDRESS

SAMPLE: Final = 100
"""Watchers whose delays count, spread evenly over all; up to twice as many are all in the sample."""

CONNECTING: Final = 256
"""Handshakes under way at once."""

CONNECT_WITHIN_S: Final = 60.0
SPARE_FILES: Final = 64
KEY: Final = base64.b64encode(b"benchmark client")
ACCEPT: Final = base64.b64encode(hashlib.sha1(KEY + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
TEXT, CLOSE, PING = 1, 8, 9

KIND_AT: Final = len(b'{"type":"')
"""Where in a message the first letter of its type stands."""


class Row(msgspec.Struct, rename="camel"):
    """A player of a list."""

    player_id: str
    score: int


class Board(msgspec.Struct, tag="leaderboardUpdate", tag_field="type", rename="camel"):
    """What a delay is measured by with scores=none."""

    top_scores: list[Row]


class Score(msgspec.Struct, tag="scoreUpdate", tag_field="type", rename="camel"):
    """The same with scores=all."""

    player_id: str
    new_score: int


class Skipped(msgspec.Struct, tag="scoreUpdatesSkipped", tag_field="type"):
    """So many changes were left out of the flood."""

    count: int


class Status(msgspec.Struct, tag="status", tag_field="type"):
    """Whether changes arrive."""

    live: bool


_decode = msgspec.json.Decoder(Board | Score | Skipped | Status).decode


def frames(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(opcode, start, end) of the payload of each whole frame; RFC 6455, 5.2, without masks: a server sends none."""
    at, size = 0, len(data)
    while at + 2 <= size:
        length, start = data[at + 1], at + 2
        if length == 126:
            start = at + 4
            length = int.from_bytes(data[at + 2 : start], "big")
        elif length == 127:
            start = at + 10
            length = int.from_bytes(data[at + 2 : start], "big")
        if start + length > size:
            return
        yield data[at] & 0x0F, start, start + length
        at = start + length


class Chunk:
    """Whole frames as they came in one piece, and what they are."""

    __slots__ = ("boards", "controls", "data", "frames", "size")

    def __init__(self, data: bytes) -> None:
        self.frames = self.boards = self.size = 0
        self.controls: list[tuple[int, bytes]] = []
        for opcode, start, end in frames(data):
            self.size = end
            self.frames += 1
            if opcode != TEXT:
                self.controls.append((opcode, data[start:end]))
            elif data[start + KIND_AT] == 108:  # l, as in leaderboardUpdate
                self.boards += 1
        self.data = data

    def told(self, kind: str) -> tuple[list[tuple[str, int]], int]:
        """(player, score) of all messages that count, in their order, and how many changes were skipped."""
        found: list[tuple[str, int]] = []
        skipped = 0
        for opcode, start, end in frames(self.data):
            if opcode != TEXT:
                continue
            message = _decode(self.data[start:end])
            if isinstance(message, Board) and kind == "none":
                found += [(row.player_id, row.score) for row in message.top_scores]
            elif isinstance(message, Score):
                found.append((message.player_id, message.new_score))
            elif isinstance(message, Skipped):
                skipped += message.count
        return found, skipped


class Crowd:
    """All watchers."""

    def __init__(self, port: int, clients: int, query: str) -> None:
        self.last = Chunk(b"")
        self.open = 0
        self.served = 0
        self.closed: collections.Counter[str] = collections.Counter()
        self.all_served = asyncio.Event()
        self.recording = False
        self.request = (
            f"GET /live-updates?{query} HTTP/1.1\r\nHost: {ADDRESS}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {KEY.decode()}\r\n\r\n"
        ).encode()
        self._port = port
        self._kind = "none" if "scores=none" in query else "all"
        step = 1 if clients <= 2 * SAMPLE else clients / SAMPLE
        sample = {int(number * step) for number in range(min(clients, int(clients / step)))}
        self.watchers = [Watcher(self, number in sample) for number in range(clients)]

    async def connect(self) -> dict[str, Any]:
        """Connect all; each is there when it has its first list."""
        started_s = time.monotonic()
        loop, free = asyncio.get_running_loop(), asyncio.Semaphore(CONNECTING)
        refused = 0

        async def connect(watcher: Watcher) -> None:
            nonlocal refused
            async with free:
                try:
                    await loop.create_connection(lambda: watcher, ADDRESS, self._port)
                    await watcher.upgraded
                except OSError:
                    refused += 1

        await asyncio.gather(*map(connect, self.watchers))
        try:
            async with asyncio.timeout(CONNECT_WITHIN_S):
                while self.served + refused + self.closed.total() < len(self.watchers):
                    self.all_served.clear()
                    await self.all_served.wait()
        except TimeoutError:
            refused = len(self.watchers) - self.served
        return {"connect_s": time.monotonic() - started_s, "connected": self.served, "refused": refused}

    def begin(self) -> dict[str, Any]:
        """Count from here on."""
        for watcher in self.watchers:
            watcher.frames = watcher.boards = 0
            watcher.arrivals.clear()
        self.recording = True
        self._began_s = time.monotonic()
        return {}

    def end(self) -> dict[str, Any]:
        """What was counted since; the sample goes on noting, for what is still on its way."""
        seconds = time.monotonic() - self._began_s
        boards = sorted(watcher.boards for watcher in self.watchers)
        return {
            "seconds": seconds,
            "frames_per_s": sum(watcher.frames for watcher in self.watchers) / seconds,
            "boards_median_per_s": boards[len(boards) // 2] / seconds,
            "boards_worst_per_s": boards[0] / seconds,
            "open": self.open,
            "closed": dict(self.closed),
        }

    def save(self, path: str) -> dict[str, Any]:
        """Write what the sample saw: what each distinct chunk told, and for each watcher (ns, chunk)."""
        numbers: dict[int, int] = {}
        chunks: list[tuple[list[tuple[str, int]], int]] = []
        arrivals = []
        for watcher in self.watchers:
            if not watcher.sampled:
                continue
            seen = []
            for at_ns, chunk in watcher.arrivals:
                number = numbers.get(id(chunk))
                if number is None:
                    number = numbers[id(chunk)] = len(chunks)
                    chunks.append(chunk.told(self._kind))
                seen.append((at_ns, number))
            arrivals.append(seen)
        Path(path).write_bytes(msgspec.msgpack.encode((chunks, arrivals)))
        return {"sample": len(arrivals)}


class Watcher(asyncio.Protocol):
    """One WebSocket connection."""

    __slots__ = ("_crowd", "_rest", "_served", "_transport", "arrivals", "boards", "frames", "sampled", "upgraded")

    def __init__(self, crowd: Crowd, sampled: bool) -> None:
        self.frames = self.boards = 0
        self.sampled = sampled
        self.arrivals: list[tuple[int, Chunk]] = []
        self.upgraded: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._crowd = crowd
        self._rest = b""
        self._served = False
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio: connected."""
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._crowd.request)

    def connection_lost(self, error: Exception | None) -> None:
        """asyncio: closed, by whomever."""
        if not self.upgraded.done():
            self.upgraded.set_exception(ConnectionError("closed before the upgrade"))
            return
        self._crowd.open -= 1
        self._crowd.closed["cut"] += 1
        self._crowd.all_served.set()

    def data_received(self, data: bytes) -> None:
        """asyncio: frames, the last one perhaps not whole."""
        if not self._served:
            self._begin(data)
            return
        crowd = self._crowd
        if self._rest:
            data = self._rest + data
        chunk = crowd.last
        if data != chunk.data:
            chunk = Chunk(data)
            self._rest = data[chunk.size :]
            if self._rest:
                chunk.data = data[: chunk.size]
            for opcode, payload in chunk.controls:
                self._control(opcode, payload)
            if not chunk.controls and chunk.size:
                crowd.last = chunk
        else:
            self._rest = b""
        self.frames += chunk.frames
        self.boards += chunk.boards
        if self.sampled and crowd.recording:
            self.arrivals.append((time.monotonic_ns(), chunk))

    def _begin(self, data: bytes) -> None:
        """The answer to the handshake, then the first list; what comes with that is not counted."""
        self._rest += data
        if not self.upgraded.done():
            head, end, rest = self._rest.partition(b"\r\n\r\n")
            if not end:
                return
            if not head.startswith(b"HTTP/1.1 101 ") or ACCEPT not in head:
                self.upgraded.set_exception(ConnectionError(head.decode("latin-1")))
                self._abort()
                return
            self._rest = rest
            self._crowd.open += 1
            self.upgraded.set_result(None)
        chunk = Chunk(self._rest)
        if chunk.boards:
            self._rest = self._rest[chunk.size :]
            self._served = True
            self._crowd.served += 1
            self._crowd.all_served.set()

    def _control(self, opcode: int, payload: bytes) -> None:
        if opcode == PING and self._transport is not None:
            self._transport.write(bytes([0x8A, 0x80 | len(payload), 0, 0, 0, 0]) + payload)  # masked with zeros
        elif opcode == CLOSE:
            self._crowd.closed[str(int.from_bytes(payload[:2], "big"))] += 1
            self._crowd.closed["cut"] -= 1
            self._abort()

    def _abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()


async def _run(port: int, clients: int, query: str) -> None:
    crowd = Crowd(port, clients, query)
    reply(await crowd.connect())
    async for command in commands():
        name, _, argument = command.partition(" ")
        if name == "begin":
            reply(crowd.begin())
        elif name == "end":
            reply(crowd.end())
        elif name == "save":
            reply(crowd.save(argument))


def _raise_file_limit(clients: int) -> None:
    """Raises SystemExit where the machine allows fewer open files than that takes."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < clients + SPARE_FILES:
        raise SystemExit(f"a process may open {hard} files here: expected room for {clients} clients")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    _raise_file_limit(int(sys.argv[2]))
    uvloop.run(_run(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
