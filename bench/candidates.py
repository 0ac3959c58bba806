"""Who is compared: the scoreboard, and its peers in bench/peers, each a process on a port of its own.

Knows how peers are built and started, and nothing of loads.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from server.embedded import ADDRESS, Service, free_port
from tests.services import ROOT, ServerProcess, UnavailableError, environment

PEERS: Final = ROOT / "bench/peers"
BUILT: Final = ROOT / ".cache/peers"
NODE_MAJORS: Final = ("16", "18", "20")
"""@rjweb/uws brings uWebSockets.js compiled for these."""


class Peer(Service):
    """A peer; ready when it is healthy, which it is once it has met Redis and Kafka."""

    def __init__(self, name: str, argv: Sequence[str], directory: Path, settings: Mapping[str, str]) -> None:
        """`settings` are the stack's; key prefix and topic are the peer's own."""
        self.port = free_port()
        self.slug = name.lower().replace(".", "_")
        self.topic = f"peer-{self.slug}"
        own = {"HOST": ADDRESS, "PORT": str(self.port), "KAFKA_TOPIC": self.topic, "KEY_PREFIX": f"peer:{self.slug}"}
        env = environment({**settings, **own, "LUA_SCRIPT": str(PEERS / "apply_update.lua"), "NODE_ENV": "production"})
        argv = [part.format(port=self.port) for part in argv]
        super().__init__(name, argv, env, log=directory / f"{self.topic}.log", cwd=ROOT)

    @property
    def url(self) -> str:
        """Where it listens, without a slash at the end."""
        return f"http://{ADDRESS}:{self.port}"

    def answers(self) -> bool:
        """Whether it is healthy."""
        try:
            with urllib.request.urlopen(f"{self.url}/healthz", timeout=2) as answer:
                return int(answer.status) == 200
        except OSError:
            return False


@dataclass(frozen=True)
class Candidate:
    """One line of the comparison."""

    name: str
    service: ServerProcess | Peer
    topic: str
    persister_paused: bool = False


def build_fastapi() -> list[str]:
    """The command line; raises UnavailableError without the extra `bench`."""
    missing = [name for name in ("fastapi", "uvicorn", "httptools", "orjson") if not importlib.util.find_spec(name)]
    if missing:
        raise UnavailableError(f"not installed: {', '.join(missing)} (pip install -e '.[bench]')")
    argv = [sys.executable, "-m", "uvicorn", "--app-dir", str(PEERS / "fastapi"), "app:app"]
    argv += ["--host", ADDRESS, "--port", "{port}", "--loop", "uvloop", "--http", "httptools"]
    return [*argv, "--log-level", "warning", "--no-access-log", "--no-server-header", "--no-date-header"]


def build_uws_js() -> list[str]:
    """The command line, after `npm ci` where package-lock.json has changed; raises UnavailableError."""
    node = _program("node")
    major = _output([node, "--version"]).removeprefix("v").partition(".")[0]
    if major not in NODE_MAJORS:
        raise UnavailableError(f"uWebSockets.js comes compiled for Node.js {', '.join(NODE_MAJORS)}; this is {major}")
    lock, done = PEERS / "uws_js/package-lock.json", PEERS / "uws_js/node_modules/.installed"
    if not done.exists() or done.read_bytes() != lock.read_bytes():
        _output([_program("npm"), "ci", "--ignore-scripts", "--no-audit", "--no-fund"], lock.parent)
        done.write_bytes(lock.read_bytes())
    return [node, str(PEERS / "uws_js/server.js")]


def build_go() -> list[str]:
    """The command line of the binary, which `go build` makes anew where something changed; raises UnavailableError."""
    BUILT.mkdir(parents=True, exist_ok=True)
    _output([_program("go"), "build", "-o", str(BUILT / "go"), "."], PEERS / "go")
    return [str(BUILT / "go")]


PEER_BUILDS: Final[Mapping[str, Callable[[], list[str]]]] = {
    "uWebSockets.js": build_uws_js,
    "Go": build_go,
    "FastAPI": build_fastapi,
}


def peers(directory: Path, settings: Mapping[str, str]) -> tuple[list[Peer], dict[str, str]]:
    """Those that this machine can run, and of the others why not."""
    found, left_out = [], {}
    for name, build in PEER_BUILDS.items():
        try:
            found.append(Peer(name, build(), directory, settings))
        except UnavailableError as error:
            left_out[name] = str(error)
    return found, left_out


def _program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise UnavailableError(f"there is no `{name}` on the PATH")
    return path


def _output(argv: Sequence[str], directory: Path = ROOT) -> str:
    done = subprocess.run(argv, cwd=directory, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout)[-1500:]
        raise UnavailableError(f"`{' '.join(argv)}` failed with status {done.returncode}:\n{said}")
    return done.stdout.strip()
