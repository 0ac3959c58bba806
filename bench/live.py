"""`make bench-live`: the live board with many watchers, from the POST through Kafka to the frame.

Everything is real and on this machine: the stack of bench/stack.py, one process that holds all watchers, one that
posts. The delay of a change is from when the schedule wanted its POST to leave until a watcher has the first frame
that shows that score of that player, or a later one: changes that are merged into one frame have a delay each.
Prints progress to standard error, and one JSON object as the last line.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import json
import os
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from bench.generator import Generator, GeneratorError
from bench.posters import LEADERS, Log, player_name
from bench.processes import Meter, peak_resident_bytes
from bench.stack import Stack
from bench.stuck import StuckClients
from server.embedded import ServiceError
from tests.services import JWT_SECRET, UnavailableError

TABLE_CLIENTS = (100, 1_000, 10_000)
TABLE_RATES = (100, 2_000)
WARM_UP_S = 10.0
"""Posting before anything counts: a Kafka that has just started compiles itself first."""

LAST_WITHIN_S = 3.0
"""What no watcher has seen this long after the last POST counts as unseen."""

LOOK_EVERY_S = 0.2

SETTINGS = {"LIVE_MAX_PER_IP": "0", "LIVE_MAX_CONNECTIONS": "0"}
"""Everybody comes from one address."""

Figures = dict[str, Any]


class Load:
    """Watchers and posters of one run, and what is measured of them."""

    def __init__(self, stack: Stack, arguments: argparse.Namespace, clients: int, rate: float) -> None:
        self._stack = stack
        self._loads = {"clients": clients, "rate": rate, "scores": arguments.scores, "players": arguments.players}
        environ = {**os.environ, "JWT_SECRET": JWT_SECRET}
        port = str(stack.server.port)
        self._posters = Generator("bench.posters", port, str(rate), str(arguments.players), env=environ)
        self._watchers = Generator("bench.watchers", port, str(clients), f"limit=10&scores={arguments.scores}")

    def start(self) -> None:
        """Connect everybody, and post for a while before anything counts."""
        self._posters.answer()
        self._connected = self._watchers.answer()
        self._posters.ask("start")
        time.sleep(WARM_UP_S)

    def measure(self, seconds: float, meanwhile: Callable[[], None] = lambda: None) -> Figures:
        """The figures of the next `seconds`; `meanwhile` is called every LOOK_EVERY_S."""
        meter = Meter({**self._stack.measured, "watchers": self._watchers, "posters": self._posters})
        self._watchers.ask("begin")
        began_ns = time.monotonic_ns()
        while (left_s := began_ns / 1e9 + seconds - time.monotonic()) > 0:
            meanwhile()
            time.sleep(min(LOOK_EVERY_S, left_s))
        counted = self._watchers.ask("end")
        ended_ns = time.monotonic_ns()
        used_us, others_percent, load = meter.used_us(), meter.others_percent(), os.getloadavg()[0]
        time.sleep(LAST_WITHIN_S)
        log, chunks, arrivals = self._saved()
        answers_ms, seen_ms, unseen = delays(log, chunks, arrivals, began_ns, ended_ns)
        skipped = sum(chunks[chunk][1] for seen in arrivals for at_ns, chunk in seen if at_ns < ended_ns)
        counted_s = counted["seconds"]
        figures = {
            **self._loads,
            "seconds": seconds,
            "frames_per_s": round(counted["frames_per_s"]),
            "boards_per_client_per_s": round(counted["boards_median_per_s"], 2),
            "boards_worst_client_per_s": round(counted["boards_worst_per_s"], 2),
            "p50_ms": percentile(seen_ms, 50),
            "p99_ms": percentile(seen_ms, 99),
            "max_ms": percentile(seen_ms, 100),
            "unseen": unseen,
            "skipped_per_client_per_s": round(skipped / len(arrivals) / counted_s, 1),
            "posts_per_s": round(len(answers_ms) / counted_s, 1),
            "post_p50_ms": percentile(answers_ms, 50),
            "post_p99_ms": percentile(answers_ms, 99),
            "post_max_ms": percentile(answers_ms, 100),
            "connect_s": round(self._connected["connect_s"], 2),
            "server_rss_mb": round(peak_resident_bytes(self._stack.server.pid) / 1e6, 1),
            "server_cpu": round(used_us["server"] / 1e6 / counted_s, 2),
            "cpu": {part: round(each_us / 1e6 / counted_s, 2) for part, each_us in used_us.items()},
            "others_percent": round(others_percent),
            "load_average": round(load, 1),
        }
        figures["errors"] = self._errors(counted, figures)
        return figures

    def end(self) -> list[str]:
        """Post no more; what went wrong with the POSTs."""
        posted = self._posters.ask("stop")
        found = [f"POST: {failure[:300]}" for failure in posted["failed"]]
        if posted["answered"] < posted["posted"]:
            found.append(f"{posted['posted'] - posted['answered']} POSTs were never answered")
        return found

    def stop(self) -> None:
        """End the processes."""
        self._watchers.stop()
        self._posters.stop()

    def _saved(self) -> tuple[Log, list[Any], list[Any]]:
        with tempfile.TemporaryDirectory(prefix="bench-live-") as directory:
            seen, log = Path(directory, "seen"), Path(directory, "log")
            self._watchers.ask(f"save {seen}")
            self._posters.ask(f"save {log}")
            chunks, arrivals = msgspec.msgpack.decode(seen.read_bytes())
            return msgspec.msgpack.decode(log.read_bytes(), type=Log), chunks, arrivals

    def _errors(self, counted: Figures, figures: Figures) -> list[str]:
        """Why the figures are not to be trusted."""
        clients, rate, connected = figures["clients"], figures["rate"], self._connected["connected"]
        found = []
        if connected < clients:
            found.append(f"expected {clients} watchers, got {connected}: {self._connected['refused']} were refused")
        if counted["open"] < connected:
            found.append(f"watchers were closed, by close code: {counted['closed']}")
        if figures["posts_per_s"] < 0.98 * rate:
            found.append(f"expected {rate:g} POSTs/s, came to {figures['posts_per_s']:g}")
        if figures["unseen"]:
            found.append(f"{figures['unseen']} changes were not seen by a watcher that should have")
        return found


def run(stack: Stack, arguments: argparse.Namespace, clients: int, rate: float) -> Figures:
    """One run; its `errors` say what went wrong."""
    _say(f"{clients:,} watchers, scores={arguments.scores}, {rate:g} updates/s, {arguments.seconds:g} s")
    load = Load(stack, arguments, clients, rate)
    try:
        load.start()
        if arguments.stuck:
            figures = run_beside_stuck(stack, load, arguments.stuck, arguments.seconds)
        else:
            figures = load.measure(arguments.seconds)
        figures["errors"] += load.end()
    finally:
        load.stop()
    return figures


def run_beside_stuck(stack: Stack, load: Load, stuck: int, seconds: float) -> Figures:
    """Measure without and then with clients that never read, and what those cost."""
    before = load.measure(seconds / 2)
    _say(f"p99 {before['p99_ms']:g} ms; now {stuck} clients that never read")
    clients = StuckClients(stack.server, stuck)
    try:
        figures = load.measure(seconds, clients.look)
        clients.look()
        figures |= {"before": before, **clients.figures()}
        figures["errors"] = before["errors"] + figures["errors"] + clients.errors()
    finally:
        clients.hang_up()
    return figures


def delays(
    log: Log,
    chunks: Sequence[tuple[Sequence[tuple[str, int]], int]],
    arrivals: Iterable[Sequence[tuple[int, int]]],
    began_ns: int,
    ended_ns: int,
) -> tuple[array[float], array[float], int]:
    """(ms until the answer, ms until each watcher of the sample saw it, how many times one did not).

    Of the POSTs that the schedule put between `began_ns` and `ended_ns`; the latter of leaders, whom every list shows
    and no flood leaves out. Scores only ever rise here.
    """
    answers_ms, seen_ms, unseen = array("d"), array("d"), 0
    posts: dict[str, list[tuple[int, int]]] = {}
    rows = zip(log.players, log.new_scores, log.scheduled_ns, log.answered_ns, strict=True)
    for player, new_score, scheduled_ns, answered_ns in rows:
        if began_ns <= scheduled_ns < ended_ns:
            answers_ms.append((answered_ns - scheduled_ns) / 1e6)
            if player < LEADERS:
                posts.setdefault(player_name(player), []).append((new_score, scheduled_ns))
    for arrived in arrivals:
        shown: dict[str, tuple[list[int], list[int]]] = {name: ([], []) for name in posts}
        unwanted: tuple[list[int], list[int]] = ([], [])
        for at_ns, chunk in arrived:
            for name, score in chunks[chunk][0]:
                scores, times_ns = shown.get(name, unwanted)
                if not scores or scores[-1] < score:
                    scores.append(score)
                    times_ns.append(at_ns)
        for name, changes in posts.items():
            scores, times_ns = shown[name]
            for new_score, scheduled_ns in changes:
                first = bisect.bisect_left(scores, new_score)
                if first < len(scores):
                    seen_ms.append((times_ns[first] - scheduled_ns) / 1e6)
                else:
                    unseen += 1
    return answers_ms, seen_ms, unseen


def percentile(values: array[float], percent: float) -> float | None:
    """To a tenth; None of nothing."""
    ordered = sorted(values)
    return round(ordered[min(int(len(ordered) * percent / 100), len(ordered) - 1)], 1) if ordered else None


def table(runs: Iterable[Figures]) -> str:
    """The runs as Markdown."""
    columns = {
        "watchers": "{clients:,}",
        "scores": "{scores}",
        "updates/s": "{rate:,g}",
        "frames/s": "{frames_per_s:,}",
        "boards per watcher and s": "{boards_per_client_per_s:g}",
        "POST → frame p50, p99, max ms": "{p50_ms:g}, {p99_ms:g}, {max_ms:g}",
        "POST p50, p99 ms": "{post_p50_ms:g}, {post_p99_ms:g}",
        "server MB": "{server_rss_mb:g}",
        "server cores": "{server_cpu:g}",
        "connected in s": "{connect_s:g}",
    }
    lines = [f"| {' | '.join(columns)} |", "|" + "--:|" * len(columns)]
    lines += ["| " + " | ".join(cell.format_map(figures) for cell in columns.values()) + " |" for figures in runs]
    return "\n".join(lines)


def _say(what: str) -> None:
    sys.stderr.write(f"bench-live: {what}\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.live", description="Measure the live board.")
    parser.add_argument("--clients", type=int, help="watchers; without it, a table of several numbers and rates")
    parser.add_argument("--rate", type=float, default=2_000, help="updates a second (2000)")
    parser.add_argument("--seconds", type=float, default=20, help="how long to measure (20)")
    parser.add_argument("--scores", choices=("all", "none"), default="none", help="what the watchers ask for (none)")
    parser.add_argument("--players", type=int, default=1_000, help="how many players score (1000)")
    parser.add_argument("--stuck", type=int, default=0, help="clients that never read; 60 s or more show it all (0)")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep logs and data here")
    return parser.parse_args()


def main() -> int:
    """Measure; 1 when something that is needed is missing, or a run had errors."""
    arguments = _parse()
    loads = [(arguments.clients, arguments.rate)]
    if arguments.clients is None:
        loads = [(clients, rate) for clients in TABLE_CLIENTS for rate in TABLE_RATES]
    runs: list[Figures] = []
    with contextlib.ExitStack() as cleanup:
        try:
            directory = arguments.logs or Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
            directory.mkdir(parents=True, exist_ok=True)
            stack = Stack(directory, SETTINGS)
            _say("starting Redis, Kafka, PostgreSQL, server and sync")
            stack.start(cleanup)
            for clients, rate in loads:
                if runs:
                    stack.restart_server()  # its memory is the run's own then
                runs.append(run(stack, arguments, clients, rate))
        except (UnavailableError, ServiceError, GeneratorError) as error:
            _say(str(error))
            return 1
    if arguments.clients is None:
        print(table(runs))
    failures = [failure for figures in runs for failure in figures["errors"]]
    for failure in failures:
        _say(f"ERROR: {failure}")
    print(json.dumps(runs if arguments.clients is None else runs[0]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
