"""The plots of bench/growth.json."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

Figures = dict[str, Any]
WIDTH_IN, HEIGHT_IN, DOTS_PER_IN = 11.0, 3.8, 110


def plot(lines: Iterable[Figures], directory: Path) -> None:
    """A file growth-PART.png for each part that was measured."""
    parts: dict[str, list[Figures]] = {}
    for line in lines:
        parts.setdefault(line["part"], []).append(line)
    directory.mkdir(parents=True, exist_ok=True)
    for part, points in parts.items():
        DRAWN[part](points)
        for axes in pyplot.gcf().axes:
            if axes.get_yscale() == "linear":
                axes.set_ylim(0, 1.05 * axes.dataLim.ymax)  # half of it shall look like half
        pyplot.tight_layout()
        pyplot.savefig(directory / f"growth-{part}.png", dpi=DOTS_PER_IN)
        pyplot.close()


def _players(points: list[Figures]) -> None:
    updates, memory, reads = _axes("updates/s, 64 connections", "Redis, bytes a player", "GET /leaderboard, ms")
    sizes = [point["players"] for point in points]
    updates.plot(sizes, [point["updates_per_s"] for point in points], "o-")
    memory.plot(sizes, [point["redis_bytes_per_player"] for point in points], "o-")
    for share in ("p50", "p99"):
        reads.plot(sizes, [point[f"get_{share}_ms"] for point in points], "o-", label=share)
    reads.legend()
    for axes in (updates, memory, reads):
        axes.set(xscale="log", xlabel="players")


def _watchers(points: list[Figures]) -> None:
    delay, frames, server = _axes("POST to frame, ms", "frames/s, all watchers", "server, cores")
    sizes = [point["clients"] for point in points]
    for share in ("p50", "p99"):
        delay.plot(sizes, [point[f"{share}_ms"] for point in points], "o-", label=share)
    delay.legend()
    frames.plot(sizes, [point["frames_per_s"] for point in points], "o-")
    server.plot(sizes, [point["server_cpu"] for point in points], "o-")
    for axes in (delay, frames, server):
        axes.set(xscale="log", xlabel="watchers")


def _history(points: list[Figures]) -> None:
    rates, reads, sizes = _axes("events/s; dots: from Kafka", "one player's latest 100, ms", "bytes an event")
    for layout in dict.fromkeys(point["layout"] for point in points):
        grown = [point for point in points if point["layout"] == layout and point["how"] == "statement"]
        rows = [point["rows"] / 1e6 for point in grown]
        [line] = rates.plot(rows, [point["events_per_s"] for point in grown], label=layout)
        reads.plot(rows, [point["player_p50_ms"] for point in grown])
        sizes.plot(rows, [point["bytes_per_event"] for point in grown])
        for point in points:
            if point["layout"] == layout and point["how"] != "statement":
                rates.plot([point["rows"] / 1e6], [point["events_per_s"]], "o", color=line.get_color())
    rates.legend(fontsize="x-small", loc="lower left")
    reads.set_yscale("log")  # one of them goes through all rows
    for axes in (rates, reads, sizes):
        axes.set(xlabel="million rows")


def _axes(*titles: str) -> Any:
    """Axes side by side."""
    _, all_axes = pyplot.subplots(1, len(titles), figsize=(WIDTH_IN, HEIGHT_IN))
    for axes, title in zip(all_axes, titles, strict=True):
        axes.set_title(title, fontsize="medium")
        axes.grid(alpha=0.3)
    return all_axes


DRAWN: Final[dict[str, Callable[[list[Figures]], None]]] = {
    "players": _players,
    "watchers": _watchers,
    "history": _history,
}
