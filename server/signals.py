"""Which signals ask a process to end in order, and when a second one means at once. Knows no process."""

from __future__ import annotations

import signal


def stop_signals() -> tuple[signal.Signals, ...]:
    """SIGTERM, SIGINT and SIGHUP (the terminal is gone); without SIGHUP where it is ignored, as nohup(1) wants it."""
    always = (signal.SIGTERM, signal.SIGINT)
    return always if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (*always, signal.SIGHUP)


def insists(number: int) -> bool:
    """Whether a further signal of that number means: at once.

    A terminal that closes sends SIGHUP twice, by its shell and by the kernel.
    """
    return number != signal.SIGHUP


class Impatient(BaseException):
    """Told to stop while stopping: at once, then."""


class StopSignals:
    """Notes the signals that ask to stop; raises Impatient at the second, if that one insists."""

    def __init__(self) -> None:
        self.numbers: list[signal.Signals] = []
        self._heeded = stop_signals()
        for number in self._heeded:
            signal.signal(number, self._note)

    @property
    def came(self) -> bool:
        """Whether we were asked to stop."""
        return bool(self.numbers)

    def ignore(self) -> None:
        """The end is under way."""
        for number in self._heeded:
            signal.signal(number, signal.SIG_IGN)

    def _note(self, number: int, _frame: object) -> None:
        if self.numbers and not insists(number):
            return
        self.numbers.append(signal.Signals(number))
        if len(self.numbers) == 2:
            raise Impatient
