"""docs/bench.png: requests a second and p99 of each candidate, medians with the spread of the rounds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLOURS = ("#0b6e4f", "#6bbf8e", "#f2a541", "#4f86c6", "#9d6cc1")


def draw(lines: Sequence[dict[str, Any]], path: Path, caption: str) -> None:
    """Draw the lines of bench.summary."""
    import matplotlib  # heavy, and needed at the end of a full run only

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    endpoints = list(dict.fromkeys(line["endpoint"] for line in lines))
    names = list(dict.fromkeys(line["candidate"] for line in lines))
    colours = dict(zip(names, COLOURS, strict=False))
    figure, axes = pyplot.subplots(len(endpoints), 2, figsize=(11, 3.4 * len(endpoints)), squeeze=False)
    for endpoint, (rates, latencies) in zip(endpoints, axes, strict=True):
        ours = [line for line in lines if line["endpoint"] == endpoint]
        _bars(rates, ours, "rps", colours, f"{endpoint}: requests a second")
        _bars(latencies, ours, "p99_ms", colours, f"{endpoint}: p99 in ms, shorter is better")
    handles = [Patch(color=colours[name]) for name in names]
    figure.legend(handles, names, loc="upper center", ncol=len(names), frameon=False)
    figure.text(0.5, 0.01, caption, ha="center", fontsize=7, color="#555555")
    figure.tight_layout(rect=(0, 0.03, 1, 0.95))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _bars(axes: Any, lines: Sequence[dict[str, Any]], name: str, colours: dict[str, str], title: str) -> None:
    counts = list(dict.fromkeys(line["connections"] for line in lines))
    candidates = list(dict.fromkeys(line["candidate"] for line in lines))
    width = 0.8 / len(candidates)
    for line in lines:
        at = counts.index(line["connections"]) + (candidates.index(line["candidate"]) + 0.5) * width - 0.4
        value = line[name]
        spread = [[value - line[f"{name}_min"]], [line[f"{name}_max"] - value]]
        axes.bar(at, value, width * 0.92, color=colours[line["candidate"]], yerr=spread, ecolor="#444444", capsize=2)
        text = f"{value / 1000:.1f}k" if name == "rps" else f"{value:.0f}"
        axes.annotate(text, (at, line[f"{name}_max"]), ha="center", va="bottom", fontsize=7)
    axes.set_xticks(range(len(counts)), [f"{count} connections" for count in counts])
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)
