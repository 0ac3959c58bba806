"""Child processes: started, started again when they die, stopped in order, and never outliving their parent.

Knows nothing of what the children do. Every child is started through server/child_wrapper.py, which ties its life to
its parent's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from server.restarts import RestartCounts, inherited
from server.signals import Impatient, StopSignals

FIRST_DELAY_S: Final = 0.2
LONGEST_DELAY_S: Final = 5.0
STEADY_AFTER_S: Final = 60.0
"""A child that lived this long is taken for a sound one: delays and the count of its ends start over."""

GIVE_UP_AFTER: Final = 10
"""Ends in a row, none after a steady life: half a minute at least. What a failover of a store may end is back by then,
and a container that is given up takes the parts along that were well."""

ILL_AFTER: Final = 3
"""Ends in a row after which a child is called ill also while it happens to run."""

_LOOK_EVERY_S: Final = 0.05
_WRAPPER: Final = Path(__file__).with_name("child_wrapper.py")
_log = logging.getLogger("supervisor")


class Child:
    """One process: its name, its command line, and whatever runs of it at the moment.

    `log` gets its output (appended), else it shares ours. It has a session of its own, so a Ctrl-C in the terminal
    reaches only us; if we die, however we die, the kernel sends it `orphan_signal`. `owner` is (uid, gid) to run as,
    `inherits` are our file descriptors that it keeps open.

    Start it from the main thread: the kernel's signal comes when the *thread* that started the child ends.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        env: Mapping[str, str] | None = None,
        *,
        log: Path | None = None,
        cwd: Path | None = None,
        owner: tuple[int, int] | None = None,
        orphan_signal: signal.Signals = signal.SIGKILL,
    ) -> None:
        self.name = name
        self.argv = list(argv)
        self.env = env
        self.log = log
        self.cwd = cwd
        self.owner = owner
        self.orphan_signal = orphan_signal
        self.stop_signal = signal.SIGTERM
        self.inherits: tuple[int, ...] = ()
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self._asked = False

    @property
    def pid(self) -> int:
        """Of the process that runs, or ran last."""
        if self._process is None:
            raise RuntimeError(f"{self.name} was never started")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process is there; a paused one is."""
        return self._process is not None and self._process.poll() is None

    @property
    def status(self) -> int | None:
        """Exit status, negative for a signal; None while it runs or before its first start."""
        return self._process.poll() if self._process else None

    def start(self) -> None:
        """Start the process and wait until it is ready, where there is a way to know."""
        self.launch()

    def launch(self) -> None:
        """Start the process; returns before it is ready for anything."""
        if self.running:
            raise RuntimeError(f"{self.name} runs already")
        self._asked = False
        with contextlib.ExitStack() as stack:
            output = None
            if self.log:
                output = stack.enter_context(self.log.open("ab"))
                self._log_start = output.tell()
            self._process = subprocess.Popen(
                _wrapped(self.argv, self.orphan_signal, self.owner),
                env=self.env,
                cwd=self.cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                pass_fds=self.inherits,
            )

    def wait(self, timeout_s: float) -> int | None:
        """Its exit status once it has ended; None when it has not within `timeout_s`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            if self._process:
                self._process.wait(timeout_s)
        return self.status

    def ask_to_stop(self) -> None:
        """Tell it to end, once, and wake it if it is paused; does not wait."""
        if self.running and not self._asked:
            self._asked = True
            self._send(self.stop_signal)
            self.resume()

    def stop(self, grace_s: float = 10.0) -> int | None:
        """Ask it to end, and kill it when `grace_s` is over; returns its exit status."""
        self.ask_to_stop()
        if self.running and self.wait(grace_s) is None:
            _log.warning("%s did not end within %.0f s and is killed", self.name, grace_s)
            self.kill()
        return self.status

    def kill(self) -> None:
        """End it as a power cut would (SIGKILL), with all its children."""
        family = self.family()
        self._send(signal.SIGKILL)
        for pid in family:
            _signal_if_there(pid, signal.SIGKILL)
        self.wait(10)
        deadline = time.monotonic() + 10
        while any(map(alive, family)) and time.monotonic() < deadline:
            time.sleep(0.005)

    def pause(self) -> None:
        """Stop it as a debugger would (SIGSTOP), with all its children: connections stay open, nothing answers."""
        self._send(signal.SIGSTOP)
        for pid in self.family():
            _signal_if_there(pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on after `pause`."""
        for pid in self.family():
            _signal_if_there(pid, signal.SIGCONT)
        self._send(signal.SIGCONT)

    def family(self) -> list[int]:
        """The process ids of its children, and theirs."""
        return list(_descendants(self.pid)) if self.running else []

    def output_tail(self, lines: int = 20) -> str:
        """The last lines of its log since the last start; empty without a log."""
        if not self.log or not self.log.exists():
            return ""
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            return "\n".join(log.read().decode(errors="replace").splitlines()[-lines:])

    def _send(self, number: signal.Signals) -> None:
        if self._process:
            self._process.send_signal(number)


def alive(pid: int) -> bool:
    """Whether a process runs under `pid`; a zombie does not."""
    return _process_state(pid) not in ("", "Z", "X")


def _descendants(pid: int) -> Iterator[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in map(int, children):
        yield child
        yield from _descendants(child)


def _signal_if_there(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _process_state(pid: int) -> str:
    """The kernel's letter for what the process does, such as S or T; empty when it is not there."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[0]


class GivenUpError(Exception):
    """The vital children ended too often; the last exit status of the one that ended last."""

    def __init__(self, status: int | None) -> None:
        super().__init__(ended(status))
        self.status = exit_status(status) or 1


class Supervisor:
    """Keeps children running: one that ends is started again, after 0.2 s at first and 5 s at most, for ever.

    Only when each of the `vital` ones has ended `give_up_after` times in a row, there is no more use in that.
    """

    def __init__(
        self, children: Sequence[Child], vital: Collection[Child] = (), give_up_after: int = GIVE_UP_AFTER
    ) -> None:
        self.children = list(children)
        self.restarts = {child.name: 0 for child in children}
        """How often each was started again."""
        self._vital = list(vital)
        self._give_up_after = give_up_after
        self._ends: dict[str, int] = {}
        self._last_end: dict[str, str] = {}
        self._started_at: dict[str, float] = {}
        self._delays: dict[str, float] = {}
        self._restart_at: dict[str, float] = {}

    def start(self) -> None:
        """Start all that do not run yet, in order."""
        for child in self.children:
            self._launch(child)

    def tend(self, duration_s: float) -> None:
        """Start again whatever ends, for `duration_s`; to be called again and again, from the main thread.

        Raises GivenUpError.
        """
        deadline = time.monotonic() + duration_s
        while True:
            for child in self.children:
                if not child.running:
                    self._restart(child, time.monotonic())
            if time.monotonic() >= deadline:
                return
            time.sleep(_LOOK_EVERY_S)

    def stop(self, grace_s: float = 10.0) -> None:
        """End the first, which takes work in, and then the others, which finish it, all at the same time."""
        for child in self.children[:1]:
            self.stop_one(child, grace_s)
        for child in self.children:
            child.ask_to_stop()
        for child in list(self.children):
            self.stop_one(child, grace_s)

    def stop_one(self, child: Child, grace_s: float = 10.0) -> None:
        """End one child and let go of it."""
        self.children.remove(child)
        _log.info("%s %s", child.name, ended(child.stop(grace_s)))

    def complaints(self) -> list[str]:
        """What is wrong with children, in words: one does not run, ends again and again, or is paused (SIGSTOP)."""
        found = []
        for child in self.children:
            ends = self._ends_in_a_row(child)
            if ends >= ILL_AFTER:
                found.append(f"{child.name} {self._last_end[child.name]}, {ends} times in a row by now")
            elif not child.running:
                found.append(f"{child.name} {ended(child.status)}")
            elif _process_state(child.pid) in ("T", "t"):
                found.append(f"{child.name} is paused")
        return found

    def run(self, grace_s: float = 10.0, on_turn: Callable[[], None] | None = None) -> int:
        """Start all and tend them until a signal to stop, then `stop` them; `on_turn` is called every 50 ms.

        Returns the exit status: 0 after such a stop; that of a vital child which has ended too often (1 where it was
        0), once the others are stopped; 128 and its number after a second signal, which ends all at once.
        """
        received = StopSignals()
        counts = self.publish_restarts(self.children)
        everyone = list(self.children)
        status = 0
        try:
            try:
                self.start()
                while not received.came:
                    self.tend(_LOOK_EVERY_S)
                    self._reap_orphans()
                    counts.write(self.restarts)
                    if on_turn:
                        on_turn()
            except GivenUpError as given_up:
                status = given_up.status
            self.stop(grace_s)
        except Impatient:
            _log.warning("told to stop once more: everything ends at once")
            status = 128 + received.numbers[1]
        finally:
            received.ignore()
            for child in everyone:
                child.kill()
        return status

    @staticmethod
    def publish_restarts(children: Sequence[Child]) -> RestartCounts:
        """Let these children, not started yet, tell how often each was started again."""
        counts = RestartCounts([child.name for child in children])
        for child in children:
            child.env = environ = dict(os.environ if child.env is None else child.env)
            child.inherits += (*inherited(environ), counts.descriptor)
            counts.announce(environ)
        return counts

    def _reap_orphans(self) -> None:
        """Collect what children leave behind: process 1 of a container inherits it."""
        ours = {child.pid for child in self.children if child.running}
        with contextlib.suppress(ChildProcessError):
            # Looked at first: the status of a child of ours is for its Child to collect.
            while found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if found.si_pid in ours:
                    return
                os.waitpid(found.si_pid, 0)

    def _launch(self, child: Child) -> None:
        try:
            if not child.running:
                child.launch()
        except OSError as error:  # no process or no file left on this machine: there may be, later
            _log.error("%s cannot be started: %s", child.name, error)
        self._started_at[child.name] = time.monotonic()

    def _ends_in_a_row(self, child: Child) -> int:
        """How often it has ended without a steady life since; 0 once it has one."""
        ends = self._ends.get(child.name, 0)
        steady = ends and child.running and time.monotonic() - self._started_at[child.name] >= STEADY_AFTER_S
        return 0 if steady else ends

    def _restart(self, child: Child, now: float) -> None:
        if child.name not in self._restart_at:
            alive_s = now - self._started_at[child.name]
            ends = self._ends[child.name] = 1 if alive_s >= STEADY_AFTER_S else self._ends.get(child.name, 0) + 1
            self._last_end[child.name] = ended(child.status)
            if child in self._vital and min(map(self._ends_in_a_row, self._vital)) >= self._give_up_after:
                _log.error("%s %s, %d times in a row by now: giving up", child.name, ended(child.status), ends)
                raise GivenUpError(child.status)
            delay_s = self._delays[child.name] = next_delay(self._delays.get(child.name), alive_s)
            self._restart_at[child.name] = now + delay_s
            said = ended(child.status)
            _log.warning("%s %s after %.1f s; it starts again in %.1f s", child.name, said, alive_s, delay_s)
        elif now >= self._restart_at[child.name]:
            del self._restart_at[child.name]
            self.restarts[child.name] = self.restarts.get(child.name, 0) + 1
            self._launch(child)


def next_delay(last_s: float | None, alive_s: float) -> float:
    """Seconds to wait before a child that lived `alive_s` is started again; `last_s` was the wait before it."""
    if last_s is None or alive_s >= STEADY_AFTER_S:
        return FIRST_DELAY_S
    return min(2 * last_s, LONGEST_DELAY_S)


def ended(status: int | None) -> str:
    """An exit status in words."""
    if status is None:
        return "was not running"
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"exited with status {status}"


def exit_status(status: int | None) -> int:
    """A child's exit status as a shell gives it on: 128 and the number for a signal, 1 if it never started."""
    if status is None:
        return 1
    return status if status >= 0 else 128 - status


def _wrapped(argv: list[str], orphan_signal: signal.Signals, owner: tuple[int, int] | None) -> list[str]:
    uid, gid = owner or (-1, -1)
    # -I -S: neither the current directory nor the environment gets a say in what the wrapper imports.
    wrapper = [sys.executable, "-I", "-S", str(_WRAPPER)]
    return [*wrapper, *map(str, (os.getpid(), int(orphan_signal), uid, gid)), *argv]
