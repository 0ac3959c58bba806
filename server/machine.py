"""Which machines uWebSockets' library is made for, and where it comes from there.

socketify's wheel has it for Linux on x86-64, its fork delian-socketify for Linux on arm64, for some Pythons only. Knows
nothing of the library itself.
"""

from __future__ import annotations

import platform
import sys
from typing import Final

ARM64_PYTHONS: Final = ((3, 11), (3, 13))
"""What delian-socketify has wheels for; pyproject.toml and scripts/setup.sh say the same."""


def why_unusable(system: str, machine: str, python: tuple[int, int]) -> str | None:
    """Why the server cannot run on such a machine, in one sentence; None where it can."""
    if system != "Linux" or machine not in ("x86_64", "aarch64"):
        return (
            f"uWebSockets' library is for Linux on x86-64 and arm64, not for {system} on {machine}: use the container"
        )
    if machine == "aarch64" and python not in ARM64_PYTHONS:
        known = " and ".join(f"{major}.{minor}" for major, minor in ARM64_PYTHONS)
        return f"on arm64, uWebSockets' library is for Python {known}, not for {python[0]}.{python[1]}"
    return None


def this_machine() -> tuple[str, str, tuple[int, int]]:
    """What `why_unusable` asks for: system, machine and Python version."""
    return platform.system(), platform.machine(), sys.version_info[:2]


def brings_libuv(machine: str) -> bool:
    """Whether the wheel carries a libuv of its own for the dynamic linker; elsewhere it needs the system's."""
    return machine == "aarch64"
