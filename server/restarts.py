"""How often children were started again, told by every process below their supervisor.

A child that ends at once is never there when Prometheus asks, and a supervisor has no port. So the counts are in a
piece of shared memory: the supervisor writes, whichever child is asked reads. Knows no process.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Final

VARIABLE: Final = "SCOREBOARD_RESTARTS"
"""In a child's environment: `descriptor:name,name` of each supervisor above it, separated by semicolons."""

_NAME: Final = "scoreboard-restarts"
_COUNT: Final = struct.Struct("<Q")


class RestartCounts:
    """What one supervisor writes: a count for each of `names`."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self.descriptor = os.memfd_create(_NAME)
        os.ftruncate(self.descriptor, mmap.PAGESIZE)

    def announce(self, environ: MutableMapping[str, str]) -> None:
        """Say in the environment of a child, which has to inherit `descriptor`, where the counts are."""
        ours = f"{self.descriptor}:{','.join(self._names)}"
        environ[VARIABLE] = ";".join(filter(None, [environ.get(VARIABLE), ours]))

    def write(self, counts: Mapping[str, int]) -> None:
        """Tell the counts; a name that is missing has 0."""
        for index, name in enumerate(self._names):
            os.pwrite(self.descriptor, _COUNT.pack(counts.get(name, 0)), index * _COUNT.size)


def inherited(environ: Mapping[str, str] = os.environ) -> tuple[int, ...]:
    """The descriptors that a supervisor hands on to children of its own."""
    return tuple(descriptor for descriptor, _ in _announced(environ))


def restart_counts(environ: Mapping[str, str] = os.environ) -> dict[str, int]:
    """How often each process below the supervisors above us was started again; empty where there is none."""
    found: dict[str, int] = {}
    for descriptor, names in _announced(environ):
        told = os.pread(descriptor, len(names) * _COUNT.size, 0)
        found |= dict(zip(names, (count for (count,) in _COUNT.iter_unpack(told)), strict=True))
    return found


def _announced(environ: Mapping[str, str]) -> Iterator[tuple[int, list[str]]]:
    for each in filter(None, environ.get(VARIABLE, "").split(";")):
        descriptor, _, names = each.partition(":")
        if _is_ours(descriptor):
            yield int(descriptor), names.split(",")


def _is_ours(descriptor: str) -> bool:
    """Whether it leads to counts: whoever starts us with a copy of our parent's environment hands on no descriptors."""
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}").startswith(f"/memfd:{_NAME}")
    except OSError:
        return False
