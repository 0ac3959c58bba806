"""`scoreboard health`: how the processes are. Stores are not asked: neither an outage nor a rebuild is an illness.

With `--server` it is what a container's HEALTHCHECK asks. Whoever restarts what is ill would otherwise take a server
that is well down with a persister that cannot work, again and again.

The server is asked for /healthz. Relay and persister have no ear, so the supervisor of `scoreboard all` answers for
its children, and that of WORKERS for its own, since the port shows whichever worker is well. They do so on an abstract
Unix socket: it takes no file, so the root may be read-only, and a container's network keeps it to the container.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Final

from server import config
from server.errors import ConfigError

WITHIN_S: Final = 1.5
"""Longest wait for each of the answers."""

WELL: Final = "ok"


ALL: Final = "all"
WORKERS: Final = "workers"
"""The supervisors that may be above a server: that of `scoreboard all`, and that of its workers."""


class Desk:
    """Where a supervisor is asked how its children are."""

    def __init__(self, host: str, port: int, of: str = ALL) -> None:
        """Raises ConfigError when another supervisor on this machine has the same host and port."""
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.bind(_desk_of(host, port, of))
        except OSError as error:
            self._socket.close()
            raise ConfigError(f"PORT: expected one that no other scoreboard has, got {port}: {error}") from error
        self._socket.listen(16)
        self._socket.setblocking(False)

    def answer(self, complaints: Callable[[], Sequence[str]]) -> None:
        """Answer those who have asked since the last time; never waits."""
        with contextlib.suppress(BlockingIOError):
            while True:
                asker, _ = self._socket.accept()
                with asker, contextlib.suppress(OSError):  # who has left wants no answer
                    asker.setblocking(False)
                    asker.send(("\n".join(complaints()) or WELL).encode())

    def close(self) -> None:
        """Nobody is answered any more."""
        self._socket.close()


def health(argv: list[str]) -> int:
    """Say how server, relay and persister are; 0 if all of them are well, else 1."""
    description = "Whether the processes are well. Stores may be away: see /readyz for what works."
    parser = argparse.ArgumentParser(prog="scoreboard health", description=description)
    parser.add_argument(
        "--server", action="store_true", help="ask for the server alone: for an orchestrator that restarts what is ill"
    )
    alone = parser.parse_args(argv).server
    settings = config.load()
    host, port = settings.host, settings.port
    complaints = [*of_supervisor(host, port, WORKERS), *of_server(host, port)]
    if not alone:
        complaints = [*of_supervisor(host, port), *complaints]
    sys.stdout.write("\n".join(complaints or [WELL]) + "\n")
    return 1 if complaints else 0


def of_supervisor(host: str, port: int, of: str = ALL) -> list[str]:
    """What a supervisor has to complain of; nothing where there is none (`serve` alone)."""
    with socket.socket(socket.AF_UNIX) as desk:
        desk.settimeout(WITHIN_S)
        try:
            desk.connect(_desk_of(host, port, of))
            said = _read_all(desk).decode()
        except ConnectionRefusedError:
            return []
        except OSError as error:
            return [f"the supervisor does not answer: {error}"]
    return [] if said == WELL else said.splitlines() or ["the supervisor does not answer"]


def of_server(host: str, port: int) -> list[str]:
    """What is wrong with GET /healthz, if anything."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    try:
        with socket.create_connection((reached, port), WITHIN_S) as server:
            server.sendall(f"GET /healthz HTTP/1.1\r\nHost: {reached}\r\nConnection: close\r\n\r\n".encode())
            status_line = _read_all(server).partition(b"\r\n")[0].decode("latin-1")
    except OSError as error:
        return [f"the server does not answer at {reached}, port {port}: {error}"]
    if status_line.split()[1:2] != ["200"]:
        return [f"the server says of /healthz: {status_line or 'nothing'}"]
    return []


def _desk_of(host: str, port: int, of: str) -> str:
    return f"\0scoreboard/{host}/{port}/{of}"


def _read_all(connection: socket.socket) -> bytes:
    said = b""
    while part := connection.recv(4096):
        said += part
    return said
