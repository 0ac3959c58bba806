"""`make bench-growth`: what the scoreboard costs as it grows, by players, by watchers and by rows of history.

Writes a line of JSON for each point to bench/growth.json, beside the lines of other parts, and the plots to docs/.
Everything runs on this machine, load included.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import redis

from bench import history, live, wrk
from bench.fill import fill, player_name
from bench.processes import Meter, resident_bytes
from bench.stack import Stack
from bench.words import commit, machine
from server.config import Settings
from server.embedded import ServiceError
from server.keys import Keys
from tests.services import JWT_SECRET, UnavailableError

RESULTS: Final = Path(__file__).with_suffix(".json")
PARTS: Final = ("players", "watchers", "history")
POSTING: Final = 10_000
"""Players who score while we measure, spread evenly over all; as many on every board, as each token has its cost."""

CONNECTIONS: Final = 64
FIRST: Final = 1000
"""Players of the warm-up, whose memory does not count: nor does what Redis takes for anything else by then."""

WARM_UP_S: Final = 10.0
"""A Kafka that has just started compiles itself first."""

BYTES_A_PLAYER: Final = 400
"""More than it is, so that no size is begun that memory does not hold."""

WATCHED_RATE: Final = 100.0

Figures = dict[str, Any]


def players(stack: Stack, sizes: list[int], seconds: float) -> Iterator[Figures]:
    """Updates and reads on boards of these sizes, one grown out of the other."""
    client = redis.Redis(stack.redis.host, stack.redis.port)
    _post(stack, [player_name(number) for number in range(FIRST)], WARM_UP_S)
    begun_bytes = _used_bytes(client)
    for before, size in itertools.pairwise([FIRST, *sizes]):
        if (free := _free_bytes()) < (size - before) * BYTES_A_PLAYER:
            _say(f"{size:,} players would take more memory than the {free / 1e9:.1f} GB that are free: left out")
            return
        _grow(stack, client, before, size)
        held_bytes = _used_bytes(client) - begun_bytes
        posting = [player_name(number) for number in range(0, size, max(1, size // POSTING))]
        _meet(stack, posting)
        load, cpu_us = _post(stack, posting, seconds)
        get = wrk.run(f"{stack.server.url}/leaderboard?limit=10", wrk.gets(), connections=CONNECTIONS, seconds=seconds)
        yield {
            "part": "players",
            "players": size,
            "redis_bytes_per_player": round(held_bytes / (size - FIRST), 1),
            "redis_rss_bytes": resident_bytes(stack.redis.pid),
            "updates_per_s": round(load.per_second),
            "update_p50_ms": load.p50_us / 1000,
            "update_p99_ms": load.p99_us / 1000,
            "cpu_us_per_update": cpu_us,
            "gets_per_s": round(get.per_second),
            "get_p50_ms": get.p50_us / 1000,
            "get_p99_ms": get.p99_us / 1000,
            "errors": load.failed + load.refused + get.failed + get.refused,
        }


def _grow(stack: Stack, client: redis.Redis, before: int, size: int) -> None:
    """Fill the board up to `size`, with nobody there to relay it."""
    stack.relay.stop()
    began_s = time.monotonic()
    fill(client, range(before, size), Settings(rate_limit_per_second=0), lambda _: None)
    _say(f"{size:,} players are there after {time.monotonic() - began_s:.0f} s more")
    stack.relay.start()


def _meet(stack: Stack, names: list[str]) -> None:
    """Let the server see every token once: only the first time does it check the signature."""
    seconds = len(names) / 5000
    while _post(stack, names, seconds)[0].requests < len(names):
        seconds *= 2


def _post(stack: Stack, names: list[str], seconds: float) -> tuple[wrk.Load, dict[str, float]]:
    """Load, and CPU time of each process in µs an update."""
    meter = Meter(stack.measured)
    load = wrk.run(stack.server.url, wrk.posts(JWT_SECRET, names), connections=CONNECTIONS, seconds=seconds)
    used_us = meter.used_us()
    stack.settle()
    return load, {part: round(each_us / load.requests, 1) for part, each_us in used_us.items()}


def _used_bytes(client: redis.Redis) -> int:
    """What Redis holds beside the outbox, whose events are on their way out."""
    owed = client.memory_usage(Keys().outbox) or 0
    info: Any = client.info("memory")
    return int(info["used_memory"] - info["mem_clients_normal"] - info["mem_aof_buffer"] - owed)


def _free_bytes() -> int:
    found = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return int(found.split()[1]) * 1024


def watchers(stack: Stack, sizes: list[int], seconds: float) -> Iterator[Figures]:
    """The live board with so many watchers, as bench.live measures it."""
    arguments = argparse.Namespace(scores="none", players=1000, stuck=0, seconds=seconds)
    for size in sizes:
        stack.restart_server()  # its memory is the run's own then
        yield {"part": "watchers"} | live.run(stack, arguments, size, WATCHED_RATE)


class Lines:
    """The results: a line for each point, and those of an earlier run until the same is measured again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._new: set[tuple[Any, Any]] = set()
        self._where = {"commit": commit(), "machine": machine()}

    def read(self) -> list[Figures]:
        """All there are."""
        return [json.loads(line) for line in self._path.read_text().splitlines()] if self._path.exists() else []

    def add(self, figures: Figures) -> None:
        """Keep one more, in place of those that an earlier run had of the same part and layout."""
        kind = figures["part"], figures.get("layout")
        kept = [line for line in self.read() if kind in self._new or (line["part"], line.get("layout")) != kind]
        self._new.add(kind)
        lines = [json.dumps(line, ensure_ascii=False) for line in [*kept, figures | self._where]]
        self._path.write_text("\n".join(lines) + "\n")
        print(lines[-1], flush=True)


def _sizes(text: str) -> list[int]:
    return sorted(int(float(size)) for size in text.split(","))


def _say(what: str) -> None:
    sys.stderr.write(f"bench-growth: {what}\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.growth", description="Measure what growth costs.")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"what is to grow ({','.join(PARTS)}); empty: plot")
    parser.add_argument("--players", type=_sizes, default="1e4,1e5,1e6", help="sizes of the board (1e4,1e5,1e6)")
    parser.add_argument("--watchers", type=_sizes, default="100,300,1000,3000,10000", help="(100,300,1000,3000,10000)")
    parser.add_argument("--seconds", type=float, default=10, help="length of each run of players and watchers (10)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="(bench/growth.json)")
    parser.add_argument("--plots", type=Path, default=RESULTS.parent.parent / "docs", metavar="DIR", help="(docs)")
    history.add_arguments(parser)
    return parser.parse_args()


def main() -> int:
    """Measure and plot; 1 when something that is needed is missing, or a run had errors."""
    arguments = _parse()
    lines, parts = Lines(arguments.results), set(filter(None, arguments.parts.split(",")))
    errors: list[Any] = []
    with contextlib.ExitStack() as cleanup:
        directory = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        try:
            if parts & {"players", "watchers"}:
                wrk.require_wrk()
                for figures in _with_stack(directory, arguments, parts):
                    lines.add(figures)
                    errors += [figures["errors"]] if figures["errors"] else []
            if "history" in parts:
                for figures in history.measure(directory, arguments, _say):
                    lines.add(figures)
        except (wrk.MissingWrkError, UnavailableError, ServiceError) as error:
            _say(str(error))
            return 1
    for error in errors:
        _say(f"ERROR: {error}")
    if arguments.plots:
        from bench.growth_plots import plot  # not before: matplotlib is slow to load, and may not be there

        plot(lines.read(), arguments.plots)
    return 1 if errors else 0


def _with_stack(directory: Path, arguments: argparse.Namespace, parts: set[str]) -> Iterator[Figures]:
    with contextlib.ExitStack() as cleanup:
        stack = Stack(directory, live.SETTINGS)
        _say("starting Redis, Kafka, PostgreSQL, server and sync")
        stack.start(cleanup)
        if "watchers" in parts:  # while the board is small, as in bench.live
            yield from watchers(stack, arguments.watchers, arguments.seconds)
        if "players" in parts:
            yield from players(stack, arguments.players, arguments.seconds)


if __name__ == "__main__":
    sys.exit(main())
