"""A load generator in a process of its own, which does what it is told line by line.

The benchmark writes a command to its standard input, it answers with a line of JSON; when the input ends, it does.
Knows nothing of what the commands mean.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from typing import Any

from tests.services import ROOT


class GeneratorError(Exception):
    """A load generator ended instead of answering."""


class Generator:
    """The benchmark's side: `python -m MODULE ARGUMENTS` and its answers."""

    def __init__(self, module: str, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        self.module = module
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=env,
        )

    @property
    def pid(self) -> int:
        """Of its process."""
        return self._process.pid

    def ask(self, command: str) -> dict[str, Any]:
        """Its answer to a command; raises GeneratorError when it has ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{command}\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise GeneratorError(f"{self.module} has ended") from error
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """What it says next."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise GeneratorError(f"{self.module} ended with status {self._process.wait()}")
        said: dict[str, Any] = json.loads(line)
        return said

    def stop(self) -> None:
        """Let it end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


async def commands() -> AsyncIterator[str]:
    """The generator's side: each command, until the benchmark has none left or is gone."""
    lines = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), os.fdopen(0, "rb", buffering=0))
    while line := await lines.readline():
        yield line.decode().strip()


def reply(figures: Mapping[str, Any]) -> None:
    """Answer the last command."""
    print(json.dumps(figures), flush=True)
