"""What `make bench` makes of its runs: medians, ratios, verdicts, and no figures from runs with errors."""

from __future__ import annotations

from typing import Any

import pytest

from bench.summary import (
    FIRST,
    SAME_DUTY,
    ErrorsError,
    disturbed,
    refuse_errors,
    summarize,
    table,
    targets,
    targets_table,
)

POST, GET = "POST /update-score", "GET /leaderboard"


def run(candidate: str, rps: float, round_: int = 1, **more: Any) -> dict[str, Any]:
    figures = {
        "candidate": candidate,
        "endpoint": POST,
        "connections": 64,
        "round": round_,
        "rps": rps,
        "p50_ms": 2.0,
        "p99_ms": 10.0,
        "p999_ms": 20.0,
        "cpu_us_per_request": 25.0,
        "cpu_us_by_process": {"server": 25.0, "Redis": 8.0},
        "others_percent": 1.0,
        "errors": 0,
    }
    return figures | more


def test_median_stands_beside_its_spread() -> None:
    [line] = summarize([run(FIRST, rps, number) for number, rps in enumerate([900, 100, 500], 1)])
    assert (line["rps"], line["rps_min"], line["rps_max"], line["rounds"]) == (500, 100, 900, 3)


def test_ratio_compares_runs_of_the_same_round() -> None:
    # The machine slows down: medians of the whole would say 3000 / 1000.
    ours = [run(FIRST, rps, number) for number, rps in enumerate([8000, 3000, 1000], 1)]
    theirs = [run("Go", rps, number) for number, rps in enumerate([4000, 1000, 500], 1)]
    first, second = summarize([*ours, *theirs])
    assert (first["ratio"], second["ratio"]) == (1.0, 2.0)


def test_ratio_without_a_run_of_the_scoreboard_is_none() -> None:
    [line] = summarize([run("Go", 1000)])
    assert line["ratio"] is None
    assert "| Go | 1,000 (1,000 to 1,000) |  | 2.0 |" in table([line])


def test_candidate_that_answered_nothing_has_no_ratio() -> None:
    _, line = summarize([run(FIRST, 1000), run("Go", 0.0, errors=1)])
    assert line["ratio"] is None


def test_every_endpoint_and_number_of_connections_has_its_table() -> None:
    runs = [
        run(name, 1000, endpoint=endpoint, connections=connections)
        for endpoint in (POST, GET)
        for connections in (256, 64)
        for name in (FIRST, "Go")
    ]
    text = table(summarize(runs))
    titles = [line for line in text.splitlines() if line.startswith("**")]
    assert titles == [
        f"**`{POST}`, 64 connections**",
        f"**`{POST}`, 256 connections**",
        f"**`{GET}`, 64 connections**",
        f"**`{GET}`, 256 connections**",
    ]
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 4 * (2 + 2)
    assert len({line.count("|") for line in rows}) == 1


def test_runs_without_errors_pass() -> None:
    refuse_errors([run(FIRST, 1000), run("Go", 900)])


def test_run_with_errors_is_refused_by_name() -> None:
    runs = [run(FIRST, 1000), run("Go", 9000, round_=2, errors=3), run("FastAPI", 10, errors=7, events_lost=7)]
    with pytest.raises(ErrorsError) as refused:
        refuse_errors(runs)
    assert str(refused.value).splitlines() == [
        f"Go, {POST}, 64 connections, round 2: 3 errors",
        f"FastAPI, {POST}, 64 connections, round 1: 7 errors, 7 of them lost events",
    ]


def test_strangers_on_the_machine_are_told_of() -> None:
    assert not disturbed([run(FIRST, 1000), run("Go", 900)])
    assert disturbed([run(FIRST, 1000), run("Go", 900, others_percent=60.0)])


def test_verdict_says_what_was_reached_and_what_was_missed() -> None:
    runs = [
        run(FIRST, 12_400),
        run(SAME_DUTY, 13_000, p99_ms=4.0),
        run("uWebSockets.js", 10_000, p99_ms=5.0, cpu_us_per_request=20.0),
    ]
    missed, reached = targets(summarize(runs))
    assert (missed["candidate"], missed["ratio"], missed["reached"]) == (FIRST, 1.24, False)
    assert (reached["candidate"], reached["ratio"], reached["reached"]) == (SAME_DUTY, 1.3, True)
    assert (missed["p99_is_lower"], reached["p99_is_lower"], reached["cpu_is_lower"]) == (False, True, False)
    rows = targets_table([missed, reached]).splitlines()
    assert rows[2].endswith("| 1.25 | 1.240, **missed** | **higher** | **more** |")
    assert rows[3].endswith("| 1.25 | 1.300 | lower | **more** |")


def test_peer_that_was_left_out_has_no_verdict() -> None:
    assert targets(summarize([run(FIRST, 1000), run(SAME_DUTY, 1000)])) == []
