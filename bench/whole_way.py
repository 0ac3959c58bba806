"""The whole way of a change, from POST to the database and to a watcher, process by process.

Runs follow one another, and each starts when all that the last one left has reached the database.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from bench import wrk
from bench.latency import UPDATES_PER_SECOND
from bench.processes import Meter
from bench.stack import Stack
from bench.words import say
from tests.services import JWT_SECRET, ROOT

MEASURED = ("server", "Redis", "relay", "Kafka", "persister", "PostgreSQL")
BEHIND_THE_ANSWER = MEASURED[2:]
"""They work on after the last answer; what they used is read when they are done."""

Figures = dict[str, Any]


def run_load(stack: Stack, name: str, script: str, connections: int, seconds: int, path: str = "") -> Figures:
    """One run of wrk, until its last event is in the database."""
    say(f"{name} for {seconds} s")
    meter, start_bytes = Meter(stack.measured), stack.server_bytes()
    load = wrk.run(stack.server.url + path, script, connections=connections, seconds=seconds)
    used_us, rest = _end(stack, meter)
    used_us |= {part: later_us for part, later_us in meter.used_us().items() if part in BEHIND_THE_ANSWER}
    return {
        "name": name,
        "per_second": load.per_second,
        "p50_ms": load.p50_us / 1000,
        "p99_ms": load.p99_us / 1000,
        "errors": load.failed + load.refused,
        "cpu_us": {part: used_us[part] / load.requests for part in MEASURED},
        "server_start_bytes": start_bytes,
        **rest,
    }


def _end(stack: Stack, meter: Meter) -> tuple[dict[str, float], Figures]:
    """CPU by process at a run's end, and what its last event took to get to the database."""
    used_us, others_percent = meter.used_us(), meter.others_percent()
    owed, end_bytes = stack.outbox_entries(), stack.server_bytes()
    relayed_s, persisted_s = stack.settle()
    return used_us, {
        "others_percent": others_percent,
        "server_end_bytes": end_bytes,
        "outbox_left_entries": owed,
        "relayed_after_s": relayed_s,
        "persisted_after_s": persisted_s,
    }


def run_load_without_persister(stack: Stack, name: str, script: str, connections: int, seconds: int) -> Figures:
    """A run during which the persister is paused: what server, Redis, relay and Kafka do by themselves."""
    stack.persister.pause()
    resume = threading.Timer(seconds + 1, stack.persister.resume)
    resume.start()
    try:
        return run_load(stack, name, script, connections, seconds)
    finally:
        resume.join()


def run_latency(stack: Stack, seconds: int) -> Figures:
    """POST → WebSocket at a rate far below what it can take."""
    name = f"POST → WebSocket at {UPDATES_PER_SECOND}/s"
    say(f"{name} for {seconds} s")
    meter, start_bytes = Meter(stack.measured), stack.server_bytes()
    argv = [sys.executable, "-m", "bench.latency", stack.server.url, f"{seconds}"]
    environ = {**os.environ, "JWT_SECRET": JWT_SECRET}
    done = subprocess.run(argv, check=True, stdout=subprocess.PIPE, env=environ, cwd=ROOT)
    seen: dict[str, float] = json.loads(done.stdout)
    used_us, rest = _end(stack, meter)
    return {
        "name": name,
        "per_second": seen["per_second"],
        "p50_ms": seen["seen_p50_ms"],
        "p99_ms": seen["seen_p99_ms"],
        "post_p50_ms": seen["post_p50_ms"],
        "post_p99_ms": seen["post_p99_ms"],
        "errors": 0,  # the generator stops at the first
        "unseen": seen["unseen"],
        "cpu_us": {part: used_us[part] / seen["updates"] for part in MEASURED},
        "server_start_bytes": start_bytes,
        **rest,
    }


def run_idle(stack: Stack, seconds: int) -> dict[str, float]:
    """The share of a core, in percent, that each process uses with nothing to do."""
    say(f"idle for {seconds} s")
    time.sleep(1)
    meter, started_s = Meter(stack.measured), time.monotonic()
    time.sleep(seconds)
    duration_us = (time.monotonic() - started_s) * 1e6
    return {part: 100 * used_us / duration_us for part, used_us in meter.used_us().items()}


def measure(stack: Stack, seconds: int, players: Sequence[str]) -> Figures:
    """All runs, one after the other, on a Kafka that has been busy before."""
    posts = wrk.posts(JWT_SECRET, players)
    runs = [
        run_load(stack, "POST /update-score, 64 connections", posts, 64, seconds),
        run_load(stack, "POST /update-score, 256 connections", posts, 256, seconds),
        run_load_without_persister(stack, "POST, 64 connections, persister paused", posts, 64, seconds),
        run_load(stack, "GET /leaderboard, 64 connections", wrk.gets(), 64, seconds, "/leaderboard?limit=10"),
        run_latency(stack, seconds),
    ]
    return {"seconds": seconds, "runs": runs, "idle_percent": run_idle(stack, min(seconds, 5))}


def table(figures: Figures) -> str:
    """The figures as Markdown."""
    lines = [
        f"| load | per second | p50 ms | p99 ms | errors | {' | '.join(f'{part} µs' for part in MEASURED)} "
        "| server MB, start → end | outbox left | in Kafka, PostgreSQL after s | others |",
        "|---" + "|--:" * (8 + len(MEASURED)) + "|",
    ]
    lines += [_row(run) for run in figures["runs"]]
    idle = ", ".join(f"{part} {percent:.1f} %" for part, percent in figures["idle_percent"].items())
    latency = figures["runs"][-1]
    lines += [
        "",
        "CPU is per request; `others` is what strangers used of the machine meanwhile. "
        f"Idle, of a core: {idle}. "
        f"Answers to POST at {UPDATES_PER_SECOND}/s: p50 {latency['post_p50_ms']:.1f}, "
        f"p99 {latency['post_p99_ms']:.1f} ms; {latency['unseen']:g} changes that the watcher was not shown.",
    ]
    return "\n".join(lines)


def _row(run: Figures) -> str:
    cpu = [f"{run['cpu_us'][part]:.1f}" for part in MEASURED]
    if run["name"].startswith("GET"):
        cpu[2:] = [""] * len(BEHIND_THE_ANSWER)  # nothing to relay or persist
    memory = f"{run['server_start_bytes'] / 1e6:.0f} → {run['server_end_bytes'] / 1e6:.0f}"
    cells = [
        run["name"],
        f"{run['per_second']:,.0f}",
        f"{run['p50_ms']:.1f}",
        f"{run['p99_ms']:.1f}",
        f"{run['errors']:,.0f}",
        *cpu,
        memory,
        f"{run['outbox_left_entries']:,}",
        f"{run['relayed_after_s']:.1f}, {run['persisted_after_s']:.1f}",
        f"{run['others_percent']:.0f} %",
    ]
    return f"| {' | '.join(cells)} |"
