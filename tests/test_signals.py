"""A terminal that closes: every command that runs for long ends as it does on SIGTERM, and under nohup not at all."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.embedded import ADDRESS, MockKafka, free_port
from server.signals import StopSignals, stop_signals
from server.supervisor import Child, alive
from tests.services import ROOT, ServerProcess, environment, wait_until
from tests.terminals import Terminal
from tests.wire import Wire, request_bytes

COMMANDS = {
    "serve": (["serve"], {}, 1),
    "workers": (["serve"], {"WORKERS": "2"}, 2),
    "all": (["all"], {}, 3),
    "all with workers": (["all"], {"WORKERS": "2"}, 4),
    "sync": (["sync"], {}, 2),
    "relay": (["sync", "relay"], {}, 1),
    "persister": (["sync", "persister"], {}, 1),
    "reconcile": (["reconcile", "--every", "1h"], {}, 1),
}
"""Arguments, settings, and how many lines say that a process waits for its stores, or for the next time."""

WAITS = ("does not answer, trying on", "Redis at ", "could not compare")


@pytest.fixture(scope="module")
def brokers() -> Iterator[str]:
    """Of a Kafka that answers: a client of one that does not takes its time to end."""
    kafka = MockKafka(("score-updates", "score-updates.dead-letter"))
    kafka.start()
    yield kafka.brokers
    kafka.stop()


def environment_of(more: dict[str, str], brokers: str) -> dict[str, str]:
    """The other stores are not there."""
    nowhere = str(free_port())
    stores = {
        "REDIS_PORT": nowhere,
        "KAFKA_BROKERS": brokers,
        "DATABASE_URL": f"postgresql://{ADDRESS}:{nowhere}/none",
    }
    return environment({"HOST": ADDRESS, "PORT": str(free_port()), **stores, **more})


def waiting(said: str) -> int:
    """How many lines of a log say that a process has come as far as it can."""
    return sum(any(words in line for words in WAITS) for line in said.splitlines())


@pytest.fixture(params=COMMANDS)
def command(request: pytest.FixtureRequest, brokers: str) -> tuple[list[str], dict[str, str], int]:
    """The command line, its environment, and how many waits there will be."""
    arguments, more, waits = COMMANDS[request.param]
    return [sys.executable, "-m", "server", *arguments], environment_of(more, brokers), waits


def test_closed_terminal_ends_every_command_in_order(command: tuple[list[str], dict[str, str], int]) -> None:
    argv, env, waits = command
    terminal = Terminal(argv, env)
    try:
        wait_until(lambda: waiting(terminal.said) >= waits, 30, "it never came that far")
        family = terminal.family
        terminal.hang_up()
        assert terminal.status() in (0, 2) if "reconcile" in argv else terminal.status() == 0
        wait_until(lambda: not any(map(alive, family)), message="children outlived it")
    finally:
        terminal.kill()


@pytest.fixture
def nohup(tmp_path: Path, brokers: str) -> Iterator[Child]:
    """`nohup scoreboard all`."""
    argv = ["nohup", sys.executable, "-m", "server", "all"]
    child = Child("nohup", argv, environment_of({}, brokers), log=tmp_path / "log", cwd=ROOT)
    child.start()
    yield child
    child.kill()


def test_nohup_keeps_it_running_when_the_terminal_closes(nohup: Child) -> None:
    wait_until(lambda: waiting(nohup.output_tail(100)) >= 3, 30)
    for pid in (nohup.pid, *nohup.family()):
        ignored = Path(f"/proc/{pid}/status").read_text().split("\nSigIgn:\t")[1].split("\n")[0]
        assert int(ignored, 16) >> (signal.SIGHUP - 1) & 1
    os.kill(nohup.pid, signal.SIGHUP)
    assert nohup.stop(30) == 0
    assert "SIGHUP" not in nohup.output_tail(100)


def test_second_hangup_does_not_cut_the_drain_short(tmp_path: Path, brokers: str) -> None:
    env = environment_of({}, brokers)
    server = ServerProcess(tmp_path, env, int(env["PORT"]))
    try:
        server.start()
        with Wire(server.port) as wire:
            request = request_bytes("POST", "/update-score", b"{}")
            wire.send(request[:-1])  # in flight: holds up the end
            for _ in range(2):  # a shell sends one, the kernel the other
                os.kill(server.pid, signal.SIGHUP)
                wait_until(lambda: "stopping on SIGHUP" in server.output_tail(100))
            wire.send(request[-1:])
            assert wire.answer().status == 401
        assert server.wait(20) == 0
    finally:
        server.kill()


def test_ignored_hangup_stays_ignored() -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert signal.SIGHUP not in stop_signals()
        StopSignals().ignore()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert signal.SIGHUP in stop_signals()
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
