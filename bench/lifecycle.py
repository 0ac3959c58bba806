"""How a server ends with many sockets open, and what a request costs with one worker and with two.

    python -m bench.lifecycle [--sockets 5000] [--rate 3000] [--seconds 15]

The last line is one JSON object. Redis is real; nothing is relayed, so the outbox grows.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

import redis

from bench.generator import Generator
from bench.processes import Meter
from server.embedded import ADDRESS, RedisServer, free_port
from tests.client import can_write, trust
from tests.services import JWT_SECRET, ServerProcess, environment, wait_until

PLAYERS: Final = 1000


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description="The end of a server, and the cost of workers.")
    parser.add_argument("--sockets", type=int, default=5000)
    parser.add_argument("--rate", type=int, default=3000, help="POSTs a second for each worker")
    parser.add_argument("--seconds", type=float, default=15)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="scoreboard-bench-") as scratch:
        store = RedisServer(Path(scratch, "redis"))
        store.start()
        try:
            with redis.Redis(store.host, store.port) as client:
                trust(client)
            figures: dict[str, Any] = {
                "sockets": arguments.sockets,
                "exit_s": [end_with(arguments.sockets, workers, Path(scratch), store) for workers in (1, 2)],
            }
            # One at full load, two at the same load each, and two that share the load of one: the fewer updates a
            # batch holds, the more each costs.
            for workers, rate in ((1, arguments.rate), (2, 2 * arguments.rate), (2, arguments.rate)) * 2:
                split = cost(workers, rate, arguments.seconds, Path(scratch), store)
                figures.setdefault(f"us_per_post_{workers}_workers_{rate}_per_s", []).append(split)
        finally:
            store.stop()
    print(json.dumps(figures))


def server_of(workers: int, directory: Path, store: RedisServer) -> ServerProcess:
    """A server that takes updates."""
    settings = {
        "REDIS_PORT": str(store.port),
        "KAFKA_BROKERS": f"{ADDRESS}:{free_port()}",
        "DATABASE_URL": f"postgresql://{ADDRESS}:{free_port()}/none",
        "RATE_LIMIT_PER_SECOND": "0",
        "LIVE_MAX_PER_IP": "0",
        "WORKERS": str(workers),
    }
    server = ServerProcess(directory, settings)
    server.start()
    wait_until(lambda: all(can_write(server) for _ in range(10 * workers)), 20)
    wait_until(lambda: len(listeners(server.port)) == workers, 20)
    return server


def listeners(port: int) -> list[int]:
    """The processes that listen on a port."""
    return pids_of("-ltnp", f"sport = :{port}")


def pids_of(*arguments: str) -> list[int]:
    """The process of each socket that ss finds."""
    listed = subprocess.run(["ss", "-H", *arguments], capture_output=True, text=True, check=True).stdout
    return list(map(int, re.findall(r"pid=(\d+)", listed)))


def end_with(sockets: int, workers: int, directory: Path, store: RedisServer) -> float:
    """Seconds from SIGTERM to the end, with so many watchers."""
    server = server_of(workers, directory, store)
    crowd = Generator("bench.watchers", str(server.port), str(sockets), "")
    try:
        crowd.answer()
        spread = Counter(pids_of("-tnp", "state", "established", f"sport = :{server.port}"))
        print(f"{workers} worker(s): sockets of each {sorted(spread.values())}", flush=True)
        started_s = time.monotonic()
        os.kill(server.pid, signal.SIGTERM)
        status = server.wait(30)
        took_s = time.monotonic() - started_s
        assert status == 0, f"it ended with {status}"
        print(f"{workers} worker(s): ended {took_s:.2f} s after SIGTERM", flush=True)
        return round(took_s, 2)
    finally:
        server.kill()
        crowd.stop()


def cost(workers: int, rate: int, seconds: float, directory: Path, store: RedisServer) -> dict[str, float]:
    """CPU time of one POST in µs: of the server's processes, and of Redis."""
    server = server_of(workers, directory, store)
    posters = Generator(
        "bench.posters", str(server.port), str(rate), str(PLAYERS), env=environment({"JWT_SECRET": JWT_SECRET})
    )
    with contextlib.ExitStack() as stack:
        stack.callback(server.stop)
        stack.callback(posters.stop)
        posters.answer()
        meter = Meter({"server": server, "redis": store})
        posters.ask("start")
        time.sleep(seconds)
        said = posters.ask("stop")
        assert not said["failed"], said
        split = {name: round(used_us / said["answered"], 1) for name, used_us in meter.used_us().items()}
        print(f"{workers} worker(s), {said['answered']} POSTs at {rate} a second: {split} µs each", flush=True)
        return split


if __name__ == "__main__":
    main()
