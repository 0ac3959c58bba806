"""What processes have used so far, as the kernel counts it. Knows nothing of what they do."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Process(Protocol):
    """Anything that runs."""

    @property
    def pid(self) -> int:
        """Of the process."""


def resident_bytes(pid: int) -> int:
    """Memory of the process that is in RAM."""
    return _status_bytes(pid, "VmRSS:")


def peak_resident_bytes(pid: int) -> int:
    """The most of its memory that ever was in RAM."""
    return _status_bytes(pid, "VmHWM:")


def _status_bytes(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return 0


class Meter:
    """CPU time used from here on: by some processes with their children, and by everybody else on the machine."""

    def __init__(self, processes: Mapping[str, Process]) -> None:
        self._pids = {name: process.pid for name, process in processes.items()}
        self._start_us = self._now_us()
        self._machine_start_us, self._started_s = _machine_us(), time.monotonic()

    def used_us(self) -> dict[str, float]:
        """CPU time of each since the start, in µs."""
        # What a thread used that has ended since is lost.
        return {name: max(0.0, now_us - self._start_us[name]) for name, now_us in self._now_us().items()}

    def others_percent(self) -> float:
        """The share of the machine that processes used which are neither measured nor our own load."""
        theirs_us = _machine_us() - self._machine_start_us - sum(self.used_us().values())
        cores_us = (time.monotonic() - self._started_s) * 1e6 * (os.cpu_count() or 1)
        return max(0.0, 100 * theirs_us / cores_us)

    def _now_us(self) -> dict[str, float]:
        return {name: _tree_us(pid) for name, pid in self._pids.items()}


def _tree_us(pid: int) -> float:
    """CPU time of the threads of a process and of its children, those that live."""
    # Not /proc/…/stat: its ticks of 10 ms are too coarse for an idle process.
    used_ns = 0
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            used_ns += int((task / "schedstat").read_text().split()[0])
            used_ns += sum(int(_tree_us(int(child)) * 1000) for child in (task / "children").read_text().split())
    except (FileNotFoundError, ProcessLookupError):
        pass  # a child or a thread that ended while we looked
    return used_ns / 1000


def _machine_us() -> float:
    """CPU time of all processes but this one and the load generators it has waited for."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    ours_s = sum(
        used.ru_utime + used.ru_stime
        for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )
    return ((user + nice + system + irq + softirq + steal) / _TICKS_PER_S - ours_s) * 1e6
