"""Several server processes on one port: `scoreboard serve` with WORKERS above 1.

The parent holds the port, so that nobody else gets it, and never listens; each worker listens for itself
(SO_REUSEPORT), and the kernel spreads connections over them. Knows nothing of what a worker does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from typing import Final

from server.config import Settings
from server.errors import UwsError
from server.health import WORKERS, Desk
from server.listening import bound, why_not
from server.signals import Impatient, StopSignals
from server.supervisor import Child, GivenUpError, Supervisor, ended

WORKER: Final = "--worker"
"""Argument of `serve` that makes it one of several."""

_LOOK_EVERY_S: Final = 0.05
_log = logging.getLogger("workers")


def hold_port(host: str, port: int) -> socket.socket:
    """A socket that keeps `port` (a free one for 0) for processes of ours, without listening.

    Raises UwsError when somebody else has it, be it a stale worker.
    """
    try:
        holder = bound(host, port)
    except OSError as error:
        raise UwsError(why_not(error, host, port)) from error
    # Only now that it is ours alone: set before, it would let us in beside whoever shares the port already.
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    # That was for what a server before us left in TIME_WAIT; kept, it would let in a second parent before we listen.
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    return holder


def run(settings: Settings, grace_s: float) -> int:
    """Run the workers until a signal to stop; a second one ends them at once. Returns the exit status.

    One that ends is started again for ever, as long as there is another. Raises UwsError when the port cannot be had.
    """
    with hold_port(settings.host, settings.port) as holder:
        port = holder.getsockname()[1]
        argv = [sys.executable, "-m", "server", "serve", WORKER]
        names = [f"worker {number}" for number in range(1, settings.workers + 1)]
        # Workers of a parent that was killed end as if it had told them to.
        workers = [
            Child(name, argv, _environment(settings, port, index), orphan_signal=signal.SIGTERM)
            for index, name in enumerate(names)
        ]
        _log.info("%d workers share port %d", len(workers), port)
        with contextlib.closing(Desk(settings.host, port, WORKERS)) as desk:
            return _run(workers, grace_s + settings.drain_delay_ms / 1000, desk)


def _environment(settings: Settings, port: int, index: int) -> dict[str, str]:
    metrics_port = settings.metrics_port and settings.metrics_port + index
    return {**os.environ, "PORT": str(port), "METRICS_PORT": str(metrics_port), "WORKERS": "1"}


def _run(workers: Sequence[Child], grace_s: float, desk: Desk) -> int:
    """Until told to stop, or until none of the workers lives for long any more."""
    status = 0
    received = StopSignals()
    supervisor = Supervisor(workers, vital=workers)
    counts = supervisor.publish_restarts(workers)
    try:
        try:
            supervisor.start()
            while not received.came:
                supervisor.tend(_LOOK_EVERY_S)
                counts.write(supervisor.restarts)
                desk.answer(supervisor.complaints)
            _log.info("stopping on %s", received.numbers[0].name)
        except GivenUpError as given_up:
            status = given_up.status
        _tell(workers, signal.SIGTERM)
        deadline_s = time.monotonic() + grace_s
        while any(worker.running for worker in workers) and time.monotonic() < deadline_s:
            time.sleep(_LOOK_EVERY_S)
    except Impatient:
        status = 128 + received.numbers[1]
    received.ignore()
    killed = [worker for worker in workers if worker.running]
    for worker in killed:
        worker.kill()
    for worker in workers:
        _log.info("%s %s", worker.name, ended(worker.status))
    return status or (1 if killed else 0)


def _tell(workers: Sequence[Child], number: signal.Signals) -> None:
    """All at once: one after the other would take as many drains as there are workers."""
    for worker in workers:
        if worker.running:
            os.kill(worker.pid, number)
