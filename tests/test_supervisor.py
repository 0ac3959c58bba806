"""Children: restarted when they die, stopped in order, and never left behind."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from server.restarts import VARIABLE, restart_counts
from server.supervisor import ILL_AFTER, Child, GivenUpError, Supervisor, alive, ended, next_delay
from tests.services import ROOT, wait_until

SLEEP = ["sleep", "1000"]


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    supervisor = Supervisor([])
    yield supervisor
    for child in supervisor.children:
        if child.running:
            child.kill()


InAProcess = Callable[[str], subprocess.Popen[str]]


@pytest.fixture
def in_a_process() -> Iterator[InAProcess]:
    """Runs code in a process of its own, with what it and its children say in its stdout."""
    head = """
import logging, sys
from pathlib import Path
from server.supervisor import Child, Supervisor
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
"""
    with contextlib.ExitStack() as stack:

        def run(code: str) -> subprocess.Popen[str]:
            argv = [sys.executable, "-u", "-c", head + code]
            process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield run


def noting_its_end(name: str, notes: Path) -> Child:
    """A child that writes its name down when it is told to end, and takes its time."""
    code = f"""
import signal, sys, time
def end(*_):
    time.sleep(0.1)
    open({str(notes)!r}, "a").write("{name} ")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(1000)
"""
    return Child(name, [sys.executable, "-c", code], log=notes.with_name(f"{name}.log"))


def test_delay_doubles_up_to_five_seconds() -> None:
    delays = [next_delay(None, 0)]
    for _ in range(6):
        delays.append(next_delay(delays[-1], 0.1))
    assert delays == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]


def test_delay_starts_over_after_a_minute_alive() -> None:
    assert [next_delay(5.0, alive_s) for alive_s in (59.0, 60.0)] == [5.0, 0.2]


def test_status_in_words() -> None:
    assert [ended(status) for status in (0, 3, -9)] == [
        "exited with status 0",
        "exited with status 3",
        "was killed by SIGKILL",
    ]


def test_killed_child_starts_again_and_the_log_says_why(
    supervisor: Supervisor, caplog: pytest.LogCaptureFixture
) -> None:
    child = Child("sleeper", SLEEP)
    supervisor.children.append(child)
    supervisor.start()
    first = child.pid
    os.kill(first, signal.SIGKILL)

    def started_again() -> bool:
        supervisor.tend(0.05)
        return child.pid != first

    wait_until(started_again)
    assert child.running
    assert "sleeper was killed by SIGKILL after" in caplog.text
    assert "it starts again in 0.2 s" in caplog.text


def test_child_that_ends_by_itself_starts_again_with_growing_delays(
    supervisor: Supervisor, caplog: pytest.LogCaptureFixture
) -> None:
    supervisor.children.append(Child("brief", ["sh", "-c", "exit 3"]))
    supervisor.start()

    def failed_thrice() -> bool:
        supervisor.tend(0.05)
        return caplog.text.count("brief exited with status 3") == 3

    wait_until(failed_thrice)
    assert [f"again in {delay} s" in caplog.text for delay in (0.2, 0.4, 0.8)] == [True] * 3


def test_stop_ends_the_first_child_before_the_others_are_told(tmp_path: Path, supervisor: Supervisor) -> None:
    notes = tmp_path / "notes"
    children = [noting_its_end(name, notes) for name in ("first", "second", "third")]
    supervisor.children += children
    supervisor.start()
    wait_until(lambda: all("ready" in child.output_tail() for child in children))
    supervisor.stop()
    ended_in_order = notes.read_text().split()
    assert ended_in_order[0] == "first"
    assert sorted(ended_in_order[1:]) == ["second", "third"]
    assert [child.status for child in children] == [0, 0, 0]


def test_stop_tells_all_others_before_it_waits_for_one(tmp_path: Path, supervisor: Supervisor) -> None:
    both = tmp_path / "second", tmp_path / "third"
    on_term = "touch {0}; while ! [ -e {1} ]; do sleep 0.02; done; exit 0"
    code = f"trap '{on_term}' TERM; echo ready; while :; do sleep 0.02; done"
    waiting = [
        Child(mine.name, ["sh", "-c", code.format(mine, other)], log=mine.with_suffix(".log"))
        for mine, other in (both, both[::-1])
    ]
    supervisor.children += [Child("first", SLEEP), *waiting]
    supervisor.start()
    wait_until(lambda: all("ready" in child.output_tail() for child in waiting))
    supervisor.stop(grace_s=30)
    assert [child.status for child in waiting] == [0, 0]


def test_stop_kills_what_does_not_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    child = Child("deaf", ["sh", "-c", "trap '' TERM; echo ready; sleep 1000 & wait; wait"], log=tmp_path / "log")
    child.start()
    wait_until(lambda: "ready" in child.output_tail())
    family = child.family()
    assert child.stop(grace_s=0.2) == -signal.SIGKILL
    assert not any(map(alive, family))
    assert "deaf did not end within" in caplog.text


def test_paused_child_can_be_stopped() -> None:
    child = Child("sleeper", SLEEP)
    child.start()
    child.pause()
    assert child.stop() == -signal.SIGTERM


def test_kill_takes_the_grandchildren_along(tmp_path: Path) -> None:
    child = Child("parent", ["sh", "-c", "sleep 1000 & echo ready; wait"], log=tmp_path / "log")
    child.start()
    wait_until(lambda: "ready" in child.output_tail())
    family = child.family()
    assert family
    child.kill()
    assert not any(map(alive, family))


def test_terminal_signals_do_not_reach_children() -> None:
    child = Child("sleeper", SLEEP)
    child.start()
    try:
        assert os.getsid(child.pid) == child.pid
    finally:
        child.kill()


def test_output_tail_shows_this_start_only(tmp_path: Path) -> None:
    child = Child("speaker", ["sh", "-c", "echo $$"], log=tmp_path / "log")
    for _ in range(2):
        child.start()
        child.wait(10)
    assert child.output_tail() == str(child.pid)


def test_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    child = Child("absent", ["/no/such/program"], log=tmp_path / "log")
    child.start()
    assert child.wait(10) == 1
    assert "/no/such/program: [Errno 2]" in child.output_tail()


def test_what_is_wrong_with_children_is_told_in_words(supervisor: Supervisor) -> None:
    well, paused, dead = (Child(name, SLEEP) for name in ("well", "paused", "dead"))
    supervisor.children += [well, paused, dead]
    assert supervisor.complaints() == [f"{name} was not running" for name in ("well", "paused", "dead")]
    supervisor.start()
    assert supervisor.complaints() == []
    paused.pause()
    dead.kill()
    wait_until(lambda: "paused is paused" in supervisor.complaints())  # a stop is not there at once
    assert supervisor.complaints() == ["paused is paused", "dead was killed by SIGKILL"]
    paused.resume()
    wait_until(lambda: supervisor.complaints() == ["dead was killed by SIGKILL"])


@pytest.mark.parametrize(("ending", "status"), [("exit 3", 3), ("exit 0", 1), ("kill -KILL $$", 137)])
def test_child_that_ends_again_and_again_takes_the_others_down(
    tmp_path: Path, in_a_process: InAProcess, ending: str, status: int
) -> None:
    supervised = in_a_process(f"""
other = Child("other", ["sleep", "1000"])
brief = Child("brief", ["sh", "-c", "echo x >> {tmp_path}/starts; {ending}"])
sys.exit(Supervisor([other, brief], vital=[brief], give_up_after=3).run())
""")
    said = supervised.communicate(timeout=60)[0]
    assert supervised.returncode == status
    assert (tmp_path / "starts").read_text() == "x\n" * 3
    assert "3 times in a row by now: giving up" in said
    assert "other was killed by SIGTERM" in said


def test_program_that_cannot_be_started_is_given_up_too(in_a_process: InAProcess) -> None:
    supervised = in_a_process("""
absent = Child("absent", ["true"], cwd=Path("/no/such/directory"))
sys.exit(Supervisor([absent], vital=[absent], give_up_after=2).run())
""")
    said = supervised.communicate(timeout=60)[0]
    assert supervised.returncode == 1
    assert "absent cannot be started" in said


def test_child_that_is_not_vital_is_started_again_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    well, brief = Child("well", SLEEP), Child("brief", ["false"])
    supervisor = Supervisor([well, brief], vital=[well], give_up_after=1)
    supervisor.start()

    def started_thrice() -> bool:
        supervisor.tend(0.05)
        return supervisor.restarts == {"well": 0, "brief": 3}

    try:
        wait_until(started_thrice)
        wait_until(lambda: not brief.running)
        supervisor.tend(0)
        assert supervisor.complaints() == ["brief exited with status 1, 4 times in a row by now"]
        assert well.running
        assert "giving up" not in caplog.text
    finally:
        well.kill()


def test_vital_children_are_given_up_only_when_all_of_them_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.supervisor.LONGEST_DELAY_S", 0.05)
    first, second = (Child(name, SLEEP) for name in ("first", "second"))
    supervisor = Supervisor([first, second], vital=[first, second], give_up_after=2)
    supervisor.start()

    def ends_twice(child: Child) -> None:
        target = supervisor.restarts[child.name] + 2

        def restarted() -> bool:
            if child.running:
                child.kill()
            supervisor.tend(0.05)
            return supervisor.restarts[child.name] >= target

        wait_until(restarted)

    try:
        ends_twice(first)
        assert second.running
        with pytest.raises(GivenUpError, match="was killed by SIGKILL"):
            ends_twice(second)
    finally:
        first.kill()


def test_steady_one_is_well_although_it_ended_often_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.supervisor.LONGEST_DELAY_S", 0.05)
    child = Child("late", SLEEP)
    supervisor = Supervisor([child])
    supervisor.start()
    try:
        for count in range(1, ILL_AFTER + 1):
            child.kill()

            def restarted(count: int = count) -> bool:
                supervisor.tend(0.05)
                return supervisor.restarts["late"] == count

            wait_until(restarted)
        assert supervisor.complaints() == ["late was killed by SIGKILL, 3 times in a row by now"]
        monkeypatch.setattr("server.supervisor.STEADY_AFTER_S", 0.0)
        assert supervisor.complaints() == []
    finally:
        child.kill()


def test_children_know_how_often_each_was_started_again(tmp_path: Path, in_a_process: InAProcess) -> None:
    told = tmp_path / "told"
    code = f"""
import os, time
from server.restarts import restart_counts
while restart_counts().get("brief", 0) < 2: time.sleep(0.02)
open({str(told)!r}, "w").write(repr(sorted(restart_counts())))
time.sleep(1000)
"""
    # The second supervisor hands on what the first one tells.
    below = f"Supervisor([Child('reader', [sys.executable, '-c', {code!r}])]).run()"
    inner = f"import sys; from server.supervisor import Child, Supervisor; {below}"
    supervised = in_a_process(f"""
inner = Child("inner", [sys.executable, "-c", {inner!r}])
sys.exit(Supervisor([inner, Child("brief", ["false"])]).run())
""")
    wait_until(lambda: told.exists() and told.read_text() == "['brief', 'inner', 'reader']", 30)
    supervised.terminate()
    assert supervised.wait(60) == 0


def test_counts_of_an_environment_that_was_copied_are_none(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        assert restart_counts({VARIABLE: f"{file.fileno()}:relay;987654:server"}) == {}


def test_ends_count_from_the_start_after_a_steady_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.supervisor.STEADY_AFTER_S", 0.0)
    child = Child("steady", SLEEP)
    supervisor = Supervisor([child], vital=[child], give_up_after=2)
    supervisor.start()
    for _ in range(4):
        before = child.pid
        child.kill()

        def started_again(before: int = before) -> bool:
            supervisor.tend(0.05)
            return child.pid != before

        wait_until(started_again)
    assert child.running
    child.kill()


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_everything_at_once(
    tmp_path: Path, in_a_process: InAProcess, first: signal.Signals, number: signal.Signals
) -> None:
    log = tmp_path / "log"
    supervised = in_a_process(f"""
deaf = Child("deaf", ["sh", "-c", "trap 'echo deaf to it' TERM; echo $$; while true; do sleep 0.05; done"],
    log=Path({str(log)!r}))
sys.exit(Supervisor([deaf]).run(grace_s=1000))
""")
    pid = int(wait_until(lambda: log.exists() and log.read_text().strip()) or 0)
    supervised.send_signal(first)
    wait_until(lambda: "deaf to it" in log.read_text())
    supervised.send_signal(number)
    assert supervised.wait(60) == 128 + number
    assert not alive(pid)
    assert supervised.communicate()[0].count("told to stop once more") == 1


def test_what_children_leave_behind_is_collected(in_a_process: InAProcess) -> None:
    supervised = in_a_process("""
import ctypes
assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0  # PR_SET_CHILD_SUBREAPER: orphans come to us, as to process 1
leaves = ["sh", "-c", "for i in 1 2 3; do sh -c 'sleep 0.1 &'; done; echo left; exec sleep 1000"]
sys.exit(Supervisor([Child("leaving", leaves)]).run())
""")

    def children() -> list[str]:
        return Path(f"/proc/{supervised.pid}/task/{supervised.pid}/children").read_text().split()

    assert supervised.stdout is not None
    assert supervised.stdout.readline() == "left\n"
    wait_until(lambda: len(children()) == 1, message="zombies stay")
    supervised.terminate()
    assert supervised.wait(60) == 0


PARENT = """
import sys
from server.supervisor import Child, Supervisor
deeper = [sys.executable, "-c", '''
from server.supervisor import Child, Supervisor
child = Child("grandchild", ["sleep", "1000"])
child.launch()
print(child.pid, flush=True)
Supervisor([child]).run()
''']
Supervisor([Child("child", deeper), Child("sleeper", ["sleep", "1000"])]).run(grace_s=5)
"""


@pytest.fixture
def parent() -> Iterator[subprocess.Popen[str]]:
    """A process that runs a supervisor, under which another one runs."""
    with subprocess.Popen([sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def its_processes(parent: subprocess.Popen[str]) -> list[int]:
    assert parent.stdout is not None
    grandchild = int(parent.stdout.readline())

    def children() -> list[int]:
        return list(map(int, Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()))

    return [*wait_until(lambda: children() if len(children()) == 2 else []), grandchild]


def test_kill_9_of_the_parent_leaves_nothing_behind(parent: subprocess.Popen[str]) -> None:
    processes = its_processes(parent)
    assert len(processes) == 3
    assert all(map(alive, processes))
    parent.kill()
    wait_until(lambda: not any(map(alive, processes)), message="children outlived their parent")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_run_ends_everything_on_a_signal(parent: subprocess.Popen[str], number: signal.Signals) -> None:
    processes = its_processes(parent)
    parent.send_signal(number)
    assert parent.wait(10) == 0
    assert not any(map(alive, processes))


def test_parent_that_died_before_the_child_was_up_leaves_no_child(tmp_path: Path) -> None:
    child = Child("sleeper", SLEEP)
    child.start()
    wrapped = [part if part != str(os.getpid()) else "1" for part in child_command(child)]
    child.kill()
    started = time.monotonic()
    assert subprocess.run(wrapped, check=False).returncode == 0
    assert time.monotonic() - started < 100, "it became the program although its parent was gone"


def child_command(child: Child) -> list[str]:
    from server import supervisor

    return supervisor._wrapped(child.argv, child.orphan_signal, child.owner)


def test_log_is_appended_and_nothing_is_left_open(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    supervisor = Supervisor([Child("speaker", ["sh", "-c", "echo here; sleep 1000"], log=tmp_path / "log")])
    before = len(os.listdir("/proc/self/fd"))
    supervisor.start()
    supervisor.stop()
    assert len(os.listdir("/proc/self/fd")) == before
    assert "speaker was killed by SIGTERM" in caplog.text
