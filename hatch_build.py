"""Compiles server/uws_*.c when the package is built: with the C compiler that is there, or else with Zig's.

Zig comes from the package index, is put into pip's build environment only, and brings its own headers. Needs Linux,
as the server does.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCES = ("server/uws_native.c", "server/uws_wire.c")
LIBRARY = "server/libuws_native.so"
ZIG = "ziglang==0.17.1"
FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-fPIC", "-shared")


class CustomBuildHook(BuildHookInterface[Any]):
    """hatchling: see `[tool.hatch.build.targets.wheel.hooks.custom]`."""

    def dependencies(self) -> list[str]:
        """Zig, unless there is a compiler that works."""
        return [] if self._compile(self._own_compiler()) is None else [ZIG]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and put the library into the wheel."""
        del version
        problem = self._compile(self._own_compiler()) and self._compile(
            [sys.executable, "-m", "ziglang", "cc", "-mcpu=baseline"]
        )
        if problem:
            raise RuntimeError(
                f"{' and '.join(SOURCES)} cannot be compiled: {problem}\n"
                "With HATCH_BUILD_NO_HOOKS=true it is left out. The server is slower without it, and reads only what "
                "uWebSockets' own parser reads."
            )
        build_data["artifacts"].append(LIBRARY)
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-linux_{os.uname().machine}"

    @staticmethod
    def _own_compiler() -> list[str]:
        return shlex.split(os.environ.get("CC", "cc"))

    def _compile(self, compiler: list[str]) -> str | None:
        """Why it did not work."""
        root = Path(self.root)
        # Put into place at the end: a server that runs from this tree has the old one open.
        with tempfile.TemporaryDirectory(dir=root / "server", prefix=".build-") as directory:
            library = Path(directory, "library.so")
            argv = [*compiler, *FLAGS, "-o", str(library), *(str(root / source) for source in SOURCES)]
            env = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": directory, "ZIG_LOCAL_CACHE_DIR": directory}
            try:
                done = subprocess.run(argv, check=False, capture_output=True, text=True, env=env)
            except OSError as error:
                return str(error)
            if done.returncode:
                return done.stderr or f"exit status {done.returncode}"
            library.replace(root / LIBRARY)
        return None
