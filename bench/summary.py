"""From runs to what one reads: medians with their spread, ratios, targets, Markdown.

Pure: runs in, text and figures out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any, Final

MEASURED: Final = ("rps", "p50_ms", "p99_ms", "p999_ms", "cpu_us_per_request")
PROCESSES: Final = ("server", "Redis", "Kafka", "relay", "persister", "PostgreSQL")
FIRST: Final = "scoreboard"
SAME_DUTY: Final = "scoreboard, persister paused"
TARGETS: Final = {
    ("POST /update-score", "uWebSockets.js"): 1.25,
    ("POST /update-score", "Go"): 1.3,
    ("POST /update-score", "FastAPI"): 10.0,
    ("GET /leaderboard", "uWebSockets.js"): 1.0,
    ("GET /leaderboard", "Go"): 1.0,
    ("GET /leaderboard", "FastAPI"): 15.0,
}
"""How many times a peer's requests a second the scoreboard is to answer."""

DISTURBED_PERCENT: Final = 15.0
"""Of all cores together. The idle among the candidates and services are counted too, and take 3 to 5."""

Run = Mapping[str, Any]
Line = dict[str, Any]


class ErrorsError(Exception):
    """Runs with errors, which are no figures; the message names them."""


def refuse_errors(runs: Iterable[Run]) -> None:
    """Raises ErrorsError unless every request was answered, with 2xx, and every event came."""
    failed = [
        f"{run['candidate']}, {run['endpoint']}, {run['connections']} connections, round {run['round']}: "
        f"{run['errors']} errors" + (f", {run['events_lost']} of them lost events" if run.get("events_lost") else "")
        for run in runs
        if run["errors"]
    ]
    if failed:
        raise ErrorsError("\n".join(failed))


def disturbed(runs: Iterable[Run]) -> bool:
    """Whether strangers had so much of the machine during a run that it measured them too."""
    return any(run["others_percent"] > DISTURBED_PERCENT for run in runs)


def summarize(runs: Sequence[Run]) -> list[Line]:
    """A line for each candidate, endpoint and number of connections, in the order of their first runs.

    `ratio` is how many times its requests a second the scoreboard answered: the median over rounds, since the two
    runs of one round lie closest in time.
    """
    groups: dict[tuple[str, int, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run["endpoint"], run["connections"], run["candidate"]), []).append(run)
    lines = []
    for (endpoint, connections, candidate), ours in groups.items():
        line: Line = {"candidate": candidate, "endpoint": endpoint, "connections": connections, "rounds": len(ours)}
        for name in MEASURED:
            values = [run[name] for run in ours]
            line |= {name: median(values), f"{name}_min": min(values), f"{name}_max": max(values)}
        parts = {name: median(run["cpu_us_by_process"].get(name, 0.0) for run in ours) for name in PROCESSES}
        line["others_percent"] = median(run["others_percent"] for run in ours)
        line |= {"cpu_us_by_process": parts, "errors": sum(run["errors"] for run in ours)}
        first = {run["round"]: run["rps"] for run in groups.get((endpoint, connections, FIRST), [])}
        ratios = [first[run["round"]] / run["rps"] for run in ours if run["round"] in first and run["rps"]]
        line["ratio"] = median(ratios) if ratios else None
        lines.append(line)
    order = {endpoint: at for at, endpoint in enumerate(dict.fromkeys(line["endpoint"] for line in lines))}
    return sorted(lines, key=lambda line: (order[line["endpoint"]], line["connections"]))


def table(lines: Sequence[Line]) -> str:
    """The lines as Markdown, a table for each endpoint and number of connections."""
    tables = []
    for endpoint, connections in dict.fromkeys((line["endpoint"], line["connections"]) for line in lines):
        rows = [
            f"**`{endpoint}`, {connections} connections**",
            "",
            "| candidate | requests/s (min to max) | scoreboard / it | p50 ms | p99 ms (min to max) | p99.9 ms "
            f"| {' | '.join(f'{name} µs' for name in PROCESSES)} | others | errors |",
            "|---" + "|--:" * (7 + len(PROCESSES)) + "|",
        ]
        rows += [_row(line) for line in lines if (line["endpoint"], line["connections"]) == (endpoint, connections)]
        tables.append("\n".join(rows))
    return "\n\n".join(tables)


def _row(line: Line) -> str:
    is_first = line["candidate"] == FIRST
    cells = [
        line["candidate"],
        f"{line['rps']:,.0f} ({line['rps_min']:,.0f} to {line['rps_max']:,.0f})",
        "" if is_first or line["ratio"] is None else f"{line['ratio']:.2f}",
        f"{line['p50_ms']:.1f}",
        f"{line['p99_ms']:.1f} ({line['p99_ms_min']:.1f} to {line['p99_ms_max']:.1f})",
        f"{line['p999_ms']:.1f}",
        *(f"{line['cpu_us_by_process'][name]:.1f}" for name in PROCESSES),
        f"{line['others_percent']:.0f} %",
        f"{line['errors']:,}",
    ]
    return f"| {' | '.join(cells)} |"


def targets(lines: Sequence[Line]) -> list[Line]:
    """What was to be reached, and whether it was: requests/s, p99 and the server's CPU beside each peer's."""
    by_name = {(line["endpoint"], line["connections"], line["candidate"]): line for line in lines}
    verdicts = []
    for endpoint, connections in dict.fromkeys((line["endpoint"], line["connections"]) for line in lines):
        for first in (FIRST, SAME_DUTY):
            ours = by_name.get((endpoint, connections, first))
            for (wanted_endpoint, peer), times in TARGETS.items():
                theirs = by_name.get((endpoint, connections, peer))
                if ours and theirs and endpoint == wanted_endpoint:
                    verdicts.append(_verdict(ours, theirs, times))
    return verdicts


def _verdict(ours: Line, theirs: Line, times: float) -> Line:
    ratio = ours["rps"] / theirs["rps"]
    if ours["candidate"] == FIRST and theirs["ratio"] is not None:
        ratio = theirs["ratio"]
    return {
        "candidate": ours["candidate"],
        "peer": theirs["candidate"],
        "endpoint": ours["endpoint"],
        "connections": ours["connections"],
        "wanted_ratio": times,
        "ratio": ratio,
        "p99_is_lower": ours["p99_ms"] < theirs["p99_ms"],
        "cpu_is_lower": ours["cpu_us_per_request"] < theirs["cpu_us_per_request"],
        "reached": ratio >= times,
    }


def targets_table(verdicts: Sequence[Line]) -> str:
    """The verdicts as Markdown."""
    rows = [
        "| who | endpoint, connections | against | wanted | got | p99 | server CPU |",
        "|---|---|---|--:|--:|---|---|",
    ]
    for verdict in verdicts:
        got = f"{verdict['ratio']:.3f}" + ("" if verdict["reached"] else ", **missed**")
        cells = [
            verdict["candidate"],
            f"{verdict['endpoint']}, {verdict['connections']}",
            verdict["peer"],
            f"{verdict['wanted_ratio']:g}",
            got,
            "lower" if verdict["p99_is_lower"] else "**higher**",
            "less" if verdict["cpu_is_lower"] else "**more**",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)
