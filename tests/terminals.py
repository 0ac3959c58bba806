"""A terminal for tests that want one to close: programs in it get what a shell's user would send them."""

from __future__ import annotations

import os
import pty
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from server.supervisor import alive
from tests.services import ROOT, wait_until


class Terminal:
    """A program that leads a terminal's session, as a shell does."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str]) -> None:
        self.pid, self._master = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.execvpe(argv[0], list(argv), dict(env))
        os.set_blocking(self._master, False)
        self._said = b""

    @property
    def said(self) -> str:
        """What it has written so far."""
        try:
            while part := os.read(self._master, 65536):
                self._said += part
        except OSError:  # nothing at this moment, or nobody there any more
            pass
        return self._said.decode()

    @property
    def family(self) -> list[int]:
        """The process ids below it."""
        found, unseen = [], [self.pid]
        while unseen:
            pid = unseen.pop()
            unseen += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
            found.append(pid)
        return found[1:]

    def hang_up(self) -> None:
        """Close the terminal: the kernel sends SIGHUP, and whatever is written from now on fails."""
        os.close(self._master)

    def status(self, deadline_s: float = 30) -> int:
        """The exit status, once it has ended."""

        def ended() -> list[int]:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            return [os.waitstatus_to_exitcode(status)] if pid else []

        return wait_until(ended, deadline_s, "it did not end")[0]

    def kill(self) -> None:
        """End it, if it still runs."""
        if alive(self.pid):
            os.kill(self.pid, signal.SIGKILL)
