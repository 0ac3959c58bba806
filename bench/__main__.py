"""`make bench` and `make bench-quick`: the scoreboard beside its peers, then the whole way of an update.

The figures are this machine's, load generator included: compare them with others of the same run only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import duty, plot, summary, whole_way, wrk
from bench.candidates import Candidate, peers
from bench.compare import Comparison
from bench.stack import TOPIC, Stack
from bench.words import commit, machine, say
from server.embedded import ServiceError
from tests.services import ROOT, UnavailableError

RESULTS = Path(__file__).with_name("results.json")
TABLE = ROOT / "docs/bench-results.md"
PLOT = ROOT / "docs/bench.png"
PLAYERS = [f"player{number}" for number in range(1, 10_001)]
LIMITS = {"RATE_LIMIT_PER_SECOND": "10", "RATE_LIMIT_BURST": "20"}
"""On for everybody: ten thousand subjects in turn stay below it, so that it costs but does not refuse."""

DISTURBED = (
    "**Others used much of the machine during some runs (column `others`): trust the ratios little, the rates less.**"
)


def main() -> int:
    """Measure; 1 when something that is needed is missing, an answer is wrong, or a run had errors."""
    arguments = _arguments()
    started_s = time.monotonic()
    with contextlib.ExitStack() as cleanup:
        try:
            wrk.require_wrk()
            directory = arguments.logs or Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
            directory.mkdir(parents=True, exist_ok=True)
            figures = measure(arguments, directory, cleanup)
        except (wrk.MissingWrkError, UnavailableError, duty.WrongAnswerError) as error:
            say(str(error))
            return 1
    figures["duration_s"] = round(time.monotonic() - started_s)
    sys.stdout.write(report(figures))
    try:
        summary.refuse_errors(figures["runs"])
        summary.refuse_errors(_whole_way_runs(figures))
    except summary.ErrorsError as error:
        say(f"NOT VALID, nothing was written: a run with errors measures nothing\n{error}")
        return 1
    RESULTS.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
    if not arguments.quick:
        TABLE.write_text(f"# The scoreboard beside its peers\n\n![{PLOT.name}]({PLOT.name})\n\n{report(figures)}")
        plot.draw(figures["summary"], PLOT, _where(figures))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure the scoreboard beside its peers.")
    parser.add_argument("--quick", action="store_true", help="under two minutes: short runs, 64 connections, no docs")
    parser.add_argument("--seconds", type=int, help="length of a run (10; quick: 2)")
    parser.add_argument("--rounds", type=int, help="how often everybody has a turn (5; quick: 3)")
    parser.add_argument("--connections", help="how many at once, with commas (64,256; quick: 64)")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep logs and data here")
    arguments = parser.parse_args()
    arguments.seconds = arguments.seconds or (2 if arguments.quick else 10)
    arguments.rounds = arguments.rounds or (3 if arguments.quick else 5)
    counts = arguments.connections or ("64" if arguments.quick else "64,256")
    arguments.connections = [int(count) for count in counts.split(",")]
    return arguments


def measure(arguments: argparse.Namespace, directory: Path, cleanup: contextlib.ExitStack) -> dict[str, Any]:
    """Start everything, let everybody have their turns, and stop it when `cleanup` ends.

    Raises UnavailableError and WrongAnswerError.
    """
    where = machine()
    stack = Stack(directory, LIMITS)
    say("building the peers")
    others, left_out = peers(directory, stack.settings)
    for name, why in left_out.items():
        say(f"{name} is left out: {why}")
    say(f"starting Redis, Kafka, PostgreSQL, server and sync, {', '.join(peer.name for peer in others)}")
    stack.start(cleanup)
    stack.create_topics([peer.topic for peer in others])
    for peer in list(others):
        cleanup.callback(peer.stop)
        try:
            peer.start()
        except ServiceError as error:
            others.remove(peer)
            left_out[peer.name] = str(error)
            say(f"{peer.name} is left out: {error}")
    candidates = [
        Candidate(summary.FIRST, stack.server, TOPIC),
        Candidate(summary.SAME_DUTY, stack.server, TOPIC, persister_paused=True),
        *(Candidate(peer.name, peer, peer.topic) for peer in others),
    ]
    comparison = Comparison(stack, candidates, PLAYERS)
    comparison.check()
    comparison.warm_up(arguments.seconds)
    runs = list(comparison.rounds(arguments.rounds, arguments.seconds, arguments.connections))
    lines = summary.summarize(runs)
    return {
        "machine": where | stack.versions(),
        "commit": commit(),
        "mode": "quick" if arguments.quick else "full",
        "seconds": arguments.seconds,
        "rounds": arguments.rounds,
        "left_out": left_out,
        "runs": runs,
        "summary": lines,
        "targets": summary.targets(lines),
        "whole_way": None if arguments.quick else whole_way.measure(stack, arguments.seconds, PLAYERS),
    }


def report(figures: dict[str, Any]) -> str:
    """All of it as Markdown."""
    parts = [
        _where(figures),
        "Each in turn on the same Redis and the same Kafka; whoever has no turn runs on, idle. Medians of the rounds. "
        "`scoreboard / it` is the scoreboard's requests a second divided by the candidate's (median of the rounds' "
        "ratios). CPU is per request: what the candidate's server used, and what the services did meanwhile and until "
        "the last event had arrived; `others` is what strangers and the idle used of the machine meanwhile. What each "
        "leaves out: bench/peers/README.md.",
        *(f"Left out: {name}, because {why}." for name, why in figures["left_out"].items()),
        *([DISTURBED] if summary.disturbed(figures["runs"]) else []),
        summary.table(figures["summary"]),
        "**What it was to reach**",
        summary.targets_table(figures["targets"]),
    ]
    if figures["whole_way"]:
        parts += ["**The whole way of an update, process by process**", whole_way.table(figures["whole_way"])]
    return "\n\n".join(parts) + "\n"


def _where(figures: dict[str, Any]) -> str:
    where = figures["machine"]
    return (
        f"make bench{'-quick' if figures['mode'] == 'quick' else ''}, {figures['rounds']} rounds of "
        f"{figures['seconds']:g} s: {where['cores']} cores ({where['cpu']}), load generator included, load average "
        f"{where['load_before']} before, Python {where['python']}, {where['redis']}, PostgreSQL "
        f"{where['postgresql']}, commit {figures['commit']}"
    )


def _whole_way_runs(figures: dict[str, Any]) -> list[dict[str, Any]]:
    runs = figures["whole_way"]["runs"] if figures["whole_way"] else []
    return [
        {"candidate": "the whole way", "endpoint": run["name"], "connections": "-", "round": 1, "errors": run["errors"]}
        for run in runs
    ]


if __name__ == "__main__":
    sys.exit(main())
