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
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from bench.generator import Generator, GeneratorError
from bench.posters import LEADERS, Log, player_name
from bench.processes import Meter, peak_resident_bytes
from bench.stack import Stack
from server.embedded import ServiceError
from tests.services import JWT_SECRET, UnavailableError

TABLE_CLIENTS = (100, 1_000, 10_000)
TABLE_RATES = (100, 2_000)
WARM_UP_S = 10.0
"""Posting before anything counts: a Kafka that has just started compiles itself first."""

LAST_WITHIN_S = 3.0
"""What no watcher has seen this long after the last POST counts as unseen."""

SETTINGS = {"LIVE_MAX_PER_IP": "0", "LIVE_MAX_CONNECTIONS": "0"}
"""Everybody comes from one address."""

Figures = dict[str, Any]


def run(stack: Stack, clients: int, rate: float, seconds: float, scores: str, players: int) -> Figures:
    """One run: connect, warm up, measure, and see that nothing went wrong meanwhile (`errors` says what did)."""
    _say(f"{clients:,} watchers, scores={scores}, {rate:g} updates/s by {players} players, {seconds:g} s")
    environ = {**os.environ, "JWT_SECRET": JWT_SECRET}
    with contextlib.ExitStack() as cleanup, tempfile.TemporaryDirectory(prefix="bench-live-") as directory:
        seen_path, log_path = Path(directory, "seen"), Path(directory, "log")
        posters = Generator("bench.posters", str(stack.server.port), str(rate), str(players), env=environ)
        cleanup.callback(posters.stop)
        posters.answer()
        watchers = Generator("bench.watchers", str(stack.server.port), str(clients), f"limit=10&scores={scores}")
        cleanup.callback(watchers.stop)
        connected = watchers.answer()
        posters.ask("start")
        time.sleep(WARM_UP_S)
        meter = Meter({**stack.measured, "watchers": watchers, "posters": posters})
        watchers.ask("begin")
        began_ns = time.monotonic_ns()
        time.sleep(seconds)
        counted = watchers.ask("end")
        ended_ns = time.monotonic_ns()
        used_us, others_percent = meter.used_us(), meter.others_percent()
        posted = posters.ask("stop")
        time.sleep(LAST_WITHIN_S)
        watchers.ask(f"save {seen_path}")
        posters.ask(f"save {log_path}")
        log = msgspec.msgpack.decode(log_path.read_bytes(), type=Log)
        chunks, arrivals = msgspec.msgpack.decode(seen_path.read_bytes())
    answers_ms, seen_ms, unseen = delays(log, chunks, arrivals, began_ns, ended_ns, leaders_only=scores == "none")
    figures = {
        "clients": clients,
        "rate": rate,
        "scores": scores,
        "players": players,
        "seconds": seconds,
        "frames_per_s": round(counted["frames_per_s"]),
        "boards_per_client_per_s": round(counted["boards_median_per_s"], 2),
        "boards_worst_client_per_s": round(counted["boards_worst_per_s"], 2),
        "p50_ms": round(percentile(seen_ms, 50), 1),
        "p99_ms": round(percentile(seen_ms, 99), 1),
        "max_ms": round(percentile(seen_ms, 100), 1),
        "unseen": unseen,
        "posts_per_s": round(len(answers_ms) / counted["seconds"], 1),
        "post_p50_ms": round(percentile(answers_ms, 50), 1),
        "post_p99_ms": round(percentile(answers_ms, 99), 1),
        "post_max_ms": round(percentile(answers_ms, 100), 1),
        "connect_s": round(connected["connect_s"], 2),
        "server_rss_mb": round(peak_resident_bytes(stack.server.pid) / 1e6, 1),
        "server_cpu": round(used_us["server"] / 1e6 / counted["seconds"], 2),
        "cpu": {part: round(each_us / 1e6 / counted["seconds"], 2) for part, each_us in used_us.items()},
        "others_percent": round(others_percent),
        "load": os.getloadavg()[0],
    }
    figures["errors"] = errors(connected, counted, posted, figures)
    return figures


def delays(
    log: Log,
    chunks: Sequence[Sequence[tuple[str, int]]],
    arrivals: Iterable[Sequence[tuple[int, int]]],
    began_ns: int,
    ended_ns: int,
    *,
    leaders_only: bool,
) -> tuple[array[float], array[float], int]:
    """(ms until the answer, ms until each watcher of the sample saw it, how many times one did not).

    Of the POSTs that the schedule put between `began_ns` and `ended_ns`; the latter of leaders only where nobody
    else can be seen. Scores only ever rise here.
    """
    answers_ms, seen_ms, unseen = array("d"), array("d"), 0
    posts: dict[str, list[tuple[int, int]]] = {}
    rows = zip(log.players, log.new_scores, log.scheduled_ns, log.answered_ns, strict=True)
    for player, new_score, scheduled_ns, answered_ns in rows:
        if began_ns <= scheduled_ns < ended_ns:
            answers_ms.append((answered_ns - scheduled_ns) / 1e6)
            if player < LEADERS or not leaders_only:
                posts.setdefault(player_name(player), []).append((new_score, scheduled_ns))
    for arrived in arrivals:
        shown: dict[str, tuple[list[int], list[int]]] = {player: ([], []) for player in posts}
        for at_ns, chunk in arrived:
            for player, score in chunks[chunk]:
                if player in shown and (not shown[player][0] or shown[player][0][-1] < score):
                    shown[player][0].append(score)
                    shown[player][1].append(at_ns)
        for player, changes in posts.items():
            scores, times_ns = shown[player]
            for new_score, scheduled_ns in changes:
                first = bisect.bisect_left(scores, new_score)
                if first < len(scores):
                    seen_ms.append((times_ns[first] - scheduled_ns) / 1e6)
                else:
                    unseen += 1
    return answers_ms, seen_ms, unseen


def errors(connected: Figures, counted: Figures, posted: Figures, figures: Figures) -> list[str]:
    """Why the figures of a run are not to be trusted."""
    clients, rate = figures["clients"], figures["rate"]
    found = [f"POST: {failure[:300]}" for failure in posted["failed"]]
    if connected["connected"] < clients:
        found.append(f"expected {clients} watchers, got {connected['connected']}")
    if counted["open"] < connected["connected"]:
        found.append(f"watchers were closed: {counted['closed']}")
    if posted["answered"] < posted["posted"]:
        found.append(f"{posted['posted'] - posted['answered']} POSTs were never answered")
    if figures["posts_per_s"] < 0.98 * rate:
        found.append(f"expected {rate:g} POSTs/s, came to {figures['posts_per_s']:g}")
    if figures["unseen"]:
        found.append(f"{figures['unseen']} changes were not seen by a watcher that should have")
    return found


def percentile(values: array[float], percent: int) -> float:
    """NaN of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) * percent // 100, len(ordered) - 1)] if ordered else float("nan")


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
                runs.append(run(stack, clients, rate, arguments.seconds, arguments.scores, arguments.players))
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
