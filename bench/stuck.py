"""Clients that ask for the widest stream and never read a byte of it: what they cost, and when they are sent away.

They live in the process of whoever makes them, for they do nothing. Their own receive buffers are small, since those
of a real client are in another machine's memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.processes import resident_bytes
from tests.client import metric
from tests.services import ServerProcess
from tests.wire import Wire

QUERY = "limit=100&scores=all"
RECEIVE_BUFFER_BYTES = 4096
PAGE_BYTES = 4096
CLOSE = 8
CONNECTIONS, LAGGING = "scoreboard_live_connections", "scoreboard_live_lagging"
GROWTH_LIMIT_BYTES = 100_000_000


class StuckClients:
    """`count` of them at one server, and what was seen of them so far."""

    def __init__(self, server: ServerProcess, count: int) -> None:
        self._server = server
        self._start_bytes = (resident_bytes(server.pid), kernel_bytes())
        self._most_bytes = self._start_bytes
        self._lagging = 0
        self._others = int(metric(server, CONNECTIONS))
        self._connected = count
        self._wires: list[Wire] = []
        for _ in range(count):
            self._wires.append(Wire(server.port, RECEIVE_BUFFER_BYTES))
            answer = self._wires[-1].upgrade(f"/live-updates?{QUERY}")
            assert answer.status == 101, answer.body

    def look(self) -> None:
        """See what is so at the moment."""
        self._most_bytes = (
            max(self._most_bytes[0], resident_bytes(self._server.pid)),
            max(self._most_bytes[1], kernel_bytes()),
        )
        self._lagging = max(self._lagging, int(metric(self._server, LAGGING)))
        # Asked of the server: a client that reads nothing cannot see the end, which comes behind what it did not read.
        self._connected = max(0, int(metric(self._server, CONNECTIONS)) - self._others)

    @property
    def all_closed(self) -> bool:
        """Whether the server has given all of them up."""
        return self._connected == 0

    def close_codes(self) -> set[int | None]:
        """Read everything at last: the codes they were closed with; None is one that was cut."""
        return set(map(_read_to_the_end, self._wires))

    def figures(self) -> dict[str, Any]:
        """The most that was seen at once, and how far memory rose above the start."""
        return {
            "stuck": len(self._wires),
            "stuck_lagging": self._lagging,
            "stuck_closed": len(self._wires) - self._connected,
            "server_growth_mb": round((self._most_bytes[0] - self._start_bytes[0]) / 1e6, 1),
            "kernel_growth_mb": round((self._most_bytes[1] - self._start_bytes[1]) / 1e6, 1),
            "kernel_growth_at_end_mb": round((kernel_bytes() - self._start_bytes[1]) / 1e6, 1),
        }

    def errors(self) -> list[str]:
        """What did not come about."""
        figures = self.figures()
        found = [
            f"expected {figures['stuck']} stuck clients to be {what}, came to {figures[f'stuck_{what}']}"
            for what in ("lagging", "closed")
            if figures[f"stuck_{what}"] < figures["stuck"]
        ]
        found += [
            f"memory of the {where} grew by {figures[f'{where}_growth_mb']} MB"
            for where in ("server", "kernel")
            if figures[f"{where}_growth_mb"] * 1e6 > GROWTH_LIMIT_BYTES
        ]
        return found

    def hang_up(self) -> None:
        """Close what is left."""
        for wire in self._wires:
            wire.close()


def _read_to_the_end(wire: Wire) -> int | None:
    try:
        while True:
            opcode, payload = wire.frame()
            if opcode == CLOSE:
                return int.from_bytes(payload[:2], "big")
    except (EOFError, ConnectionError):
        return None


def kernel_bytes() -> int:
    """What the kernel holds for all TCP connections of this machine, both ends."""
    line = next(line for line in Path("/proc/net/sockstat").read_text().splitlines() if line.startswith("TCP:"))
    return int(line.split()[-1]) * PAGE_BYTES
