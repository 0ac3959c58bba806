"""`make bench-sustain`: the highest rate of updates that everything together keeps up with, on this machine.

POSTs come on a fixed schedule, whatever the answers do. A rate is sustained when all are answered well and soon, and
neither their wait, nor the age of the outbox, nor the persister's lag, nor the delay of live updates grows. Short runs
find the rate between one that is sustained and one that is not; a long one confirms it, and a quarter, half and three
quarters of it show what answers take below. Prints a Markdown table, writes bench/sustain.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from bench.gauges import Gauges, Sample
from bench.generator import Generator, GeneratorError
from bench.live import SETTINGS, percentile
from bench.posters import Log
from bench.processes import Meter
from bench.slopes import grows, growth
from bench.stack import Stack
from bench.words import commit, machine
from server.embedded import ServiceError
from tests.services import JWT_SECRET, UnavailableError

RESULTS: Final = Path(__file__).with_suffix(".json")
PLAYERS: Final = 2_000
"""Every run brings new tokens; those of so many are known to the server before the run counts."""

WATCHERS: Final = 10
LOOK_EVERY_S: Final = 1.0
WARM_UP_S: Final = 30.0
"""At the beginning: a Kafka that has just started compiles itself first."""

FILL_S: Final = 5.0
"""Before each run counts: what is under way at any moment has to get there first."""

ALLOWED_MS: Final = 500.0
"""As much may be gained over a run, as chance: a batch of the persister is 200 ms and more."""

WAITED_MS: Final = 100.0
"""As long may 99 of 100 POSTs take: a queue that is full and grows no more is one that nobody wants to stand in."""

ANSWERED: Final = 0.99
"""The share of the schedule that has to be answered within the run."""

TRIES: Final = 2
"""A short run that is not sustained may have met with a stranger's load."""

SHARES: Final = (0.25, 0.5, 0.75)
"""Of the sustained rate: how long answers take below it."""

PRECISION: Final = 1.05
STEP_DOWN: Final = 0.95
"""After a long run that was not sustained at what short ones had found."""

Figures = dict[str, Any]


def run(stack: Stack, rate: float, seconds: float) -> Figures:
    """A run at a rate; `against` says why it is not sustained."""
    _say(f"{rate:,.0f} updates/s for {seconds:g} s")
    with contextlib.ExitStack() as cleanup:
        env = {**os.environ, "JWT_SECRET": JWT_SECRET}
        posters = Generator("bench.posters", str(stack.server.port), str(rate), str(PLAYERS), env=env)
        cleanup.callback(posters.stop)
        watchers = Generator("bench.watchers", str(stack.server.port), str(WATCHERS), "limit=10&scores=none")
        cleanup.callback(watchers.stop)
        posters.answer()
        watchers.answer()
        gauges = Gauges(stack)
        cleanup.callback(gauges.close)
        posters.ask("start")
        time.sleep(FILL_S)
        meter = Meter({**stack.measured, "posters": posters, "watchers": watchers})
        began_ns = time.monotonic_ns()
        samples = sampled(gauges, seconds)
        ended_ns = time.monotonic_ns()
        used_us, others_percent = meter.used_us(), meter.others_percent()
        posted = posters.ask("stop")
        log = _saved(posters)
    stack.settle()
    counted_s = (ended_ns - began_ns) / 1e9  # a little more than `seconds`: the last look takes time
    answers = waits_ms(log, began_ns, ended_ns)
    answers_ms = array("d", (wait_ms for second in answers for wait_ms in second))
    figures: Figures = {
        "rate": round(rate),
        "seconds": seconds,
        "posts_per_s": round(len(answers_ms) / len(answers), 1),
        "post_p50_ms": percentile(answers_ms, 50),
        "post_p99_ms": percentile(answers_ms, 99),
        "post_p999_ms": percentile(answers_ms, 99.9),
        **series(samples, answers, rate),
        "outbox_entries_max": max(sample.outbox_entries for sample in samples),
        "lag_events_max": max(sample.lag_events for sample in samples),
        "cores": {part: round(each_us / 1e6 / counted_s, 2) for part, each_us in used_us.items()},
        "others_percent": round(others_percent),
    }
    figures["against"] = against(figures, posted["failed"])
    _say("sustained" if not figures["against"] else "; ".join(figures["against"]))
    return figures


def sampled(gauges: Gauges, seconds: float) -> list[Sample]:
    gauges.look()  # what came before does not count
    samples, began_s = [], time.monotonic()
    while (due_s := began_s + (len(samples) + 1) * LOOK_EVERY_S) <= began_s + seconds:
        time.sleep(max(0, due_s - time.monotonic()))
        samples.append(gauges.look())
    return samples


def _saved(posters: Generator) -> Log:
    with tempfile.TemporaryDirectory(prefix="bench-sustain-") as directory:
        log = Path(directory, "log")
        posters.ask(f"save {log}")
        return msgspec.msgpack.decode(log.read_bytes(), type=Log)


def waits_ms(log: Log, began_ns: int, ended_ns: int) -> list[list[float]]:
    """For each second between, how long the POSTs answered in it had waited, from when the schedule wanted them."""
    seconds: list[list[float]] = [[] for _ in range((ended_ns - began_ns) // 1_000_000_000)]
    for scheduled_ns, answered_ns in zip(log.scheduled_ns, log.answered_ns, strict=True):
        second = (answered_ns - began_ns) // 1_000_000_000
        if 0 <= second < len(seconds):
            seconds[second].append((answered_ns - scheduled_ns) / 1e6)
    return seconds


def series(samples: list[Sample], answers: list[list[float]], rate: float) -> dict[str, Figures]:
    """What must not grow, all of it in ms: its median, its worst, its gain, and whether that is growth."""
    measured = {
        # A second without an answer is a second more for all that wait.
        "wait": [statistics.median(second) if second else 1000.0 for second in answers],
        "outbox": [float(sample.outbox_ms) for sample in samples],
        "lag": [1000 * sample.lag_events / rate for sample in samples],
        "delay": [sample.delay_ms for sample in samples],
    }
    return {
        name: {
            "p50_ms": round(statistics.median(values), 1),
            "max_ms": round(max(values), 1),
            "gained_ms": round(growth(values).total, 1),
            "grows": grows(values, ALLOWED_MS),
        }
        for name, values in measured.items()
    }


MOVERS: Final = {
    "wait": ("the wait for an answer", "server, Redis or the posters"),
    "outbox": ("the outbox", "relay or Kafka"),
    "lag": ("the persister's lag", "persister or PostgreSQL"),
    "delay": ("the delay of live updates", "relay, Kafka or the server's hub"),
}


def against(figures: Figures, failed: list[str]) -> list[str]:
    """Why a rate is not sustained: nothing, if it is."""
    found = [f"POST failed: {failure[:200]}" for failure in failed[:1]]
    if figures["posts_per_s"] < ANSWERED * figures["rate"]:
        found.append(f"only {figures['posts_per_s']:,.0f} of {figures['rate']:,} POSTs/s were answered")
    if figures["post_p99_ms"] > WAITED_MS:
        found.append(f"one POST in a hundred waited {figures['post_p99_ms']:,.0f} ms and more ({MOVERS['wait'][1]})")
    for name, (what, movers) in MOVERS.items():
        if figures[name]["grows"]:
            found.append(f"{what} grew by {figures[name]['gained_ms']:,.0f} ms ({movers})")
    return found


def search(is_sustained: Callable[[float], bool], rate: float) -> float:
    """The highest rate that is, to PRECISION: up or down from `rate` by halves, then between; 0 if there is none."""
    low, high = 0.0, 0.0
    while not (low and high):
        if is_sustained(rate):
            low, rate = rate, 2 * rate
        else:
            high, rate = rate, rate / 2
            if rate < 1:
                return 0
    while high / low > PRECISION:
        rate = (low * high) ** 0.5
        if is_sustained(rate):
            low = rate
        else:
            high = rate
    return low


def measure(stack: Stack, seconds: float, short_s: float, first_rate: float) -> Figures:
    """All runs: those that look for the rate, the long one, and those at shares of it."""
    where = {"machine": machine(), "commit": commit()}
    run(stack, 1000, WARM_UP_S)
    runs: list[Figures] = []

    def is_sustained(rate: float, run_s: float) -> bool:
        runs.append(run(stack, rate, run_s))
        return not runs[-1]["against"]

    rate = search(lambda rate: any(is_sustained(rate, short_s) for _ in range(TRIES)), first_rate)
    while rate >= 1 and not is_sustained(rate, seconds):
        rate *= STEP_DOWN
    for share in SHARES if rate >= 1 else ():
        is_sustained(share * rate, short_s)
    return where | {"sustained_per_s": round(rate), "limit": limit(runs, round(rate)), "runs": runs}


def limit(runs: list[Figures], sustained: float) -> str:
    """What stood against the lowest rate above the one that was sustained, and who used the cores then."""
    beyond = [figures for figures in runs if figures["against"] and figures["rate"] > sustained]
    if not beyond:
        return "none was found"
    figures = min(beyond, key=lambda figures: float(figures["rate"]))
    cores, available = figures["cores"], os.cpu_count() or 1
    largest = sorted(cores, key=lambda part: -float(cores[part]))
    parts = ", ".join(f"{part} {cores[part]:.2f}" for part in largest)
    used = sum(cores.values()) + available * figures["others_percent"] / 100
    return (
        f"at {figures['rate']:,}/s {'; '.join(figures['against'])}. "
        f"Cores in use: {used:.2f} of {available} ({parts}, others {available * figures['others_percent'] / 100:.2f})"
    )


def table(figures: Figures) -> str:
    """The runs as Markdown, in the order of their rates."""
    parts = list(figures["runs"][0]["cores"])
    names = ["updates/s", "s", "POST p50, p99, p99.9 ms"]
    names += [f"{name} p50, max, gained ms" for name in MOVERS] + [f"{part} cores" for part in parts]
    names += ["others", "sustained"]
    lines = [f"| {' | '.join(names)} |", "|" + "--:|" * len(names)]
    for each in sorted(figures["runs"], key=lambda each: (each["rate"], each["seconds"])):
        cells = [
            f"{each['rate']:,}",
            f"{each['seconds']:g}",
            f"{each['post_p50_ms']}, {each['post_p99_ms']}, {each['post_p999_ms']}",
        ]
        for name in MOVERS:
            values = each[name]
            cells.append(f"{values['p50_ms']:,.0f}, {values['max_ms']:,.0f}, {values['gained_ms']:+,.0f}")
        cells += [f"{each['cores'][part]:.2f}" for part in parts]
        cells += [f"{each['others_percent']} %", "no" if each["against"] else "yes"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Sustained: {figures['sustained_per_s']:,}/s. Limit: {figures['limit']}."])


def _say(what: str) -> None:
    sys.stderr.write(f"bench-sustain: {what}\n")


def main() -> int:
    """Measure; 1 when something that is needed is missing, or no rate is sustained."""
    parser = argparse.ArgumentParser(prog="python -m bench.sustain", description="Find the rate that is kept up with.")
    parser.add_argument("--seconds", type=float, default=300, help="length of the run that counts (300)")
    parser.add_argument(
        "--short", type=float, default=20, help="length of those that look for the rate, 10 or more (20)"
    )
    parser.add_argument("--rate", type=float, default=4000, help="where to begin, in updates a second (4000)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="(bench/sustain.json)")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as cleanup:
        try:
            stack = Stack(Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))), SETTINGS)
            _say("starting Redis, Kafka, PostgreSQL, server and sync")
            stack.start(cleanup)
            figures = measure(stack, arguments.seconds, arguments.short, arguments.rate)
        except (UnavailableError, ServiceError, GeneratorError) as error:
            _say(str(error))
            return 1
    arguments.results.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
    print(table(figures))
    return 0 if figures["sustained_per_s"] else 1


if __name__ == "__main__":
    sys.exit(main())
