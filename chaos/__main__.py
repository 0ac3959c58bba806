"""`make chaos`: kill, pause and restart every part under load, heal, and compare every place with the ledger.

`losses` lets Redis lose what it had acknowledged instead, `outages` takes Kafka and PostgreSQL away for minutes.
CHAOS_SEED replays a schedule, CHAOS_KILLS is its length, CHAOS_RATE the updates a second. The last line says how it
went; the exit status is 0 only if nothing was lost or doubled and all places agree.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Final, Literal

import msgspec

from bench.stack import Stack
from chaos import schedule
from chaos.checks import Verdict, judge, judge_losses
from chaos.clients import ANSWER_WITHIN_S, Figures
from chaos.ledger import Ledger
from chaos.losses import lose
from chaos.schedule import PARTS, Hit, Loss, Step
from server.embedded import Service
from tests.services import JWT_SECRET, ROOT, SyncProcess, UnavailableError, wait_until

KILLS: Final = 200
LOSSES: Final = 15
RATE: Final = 3000
BACK_WITHIN_S: Final = 90.0

SETTINGS: Final = {"IDEMPOTENCY_MAX_PER_SUBJECT": "0", "IDEMPOTENCY_TTL_S": "900"}
ENTRIES_UNDER_LOAD: Final = 200
"""What a healthy outbox may hold: about 0.1 s of batches."""

SMALL_OUTBOX: Final = {"OUTBOX_MAX_BYTES": "8000000"}
"""Full before an outage of minutes is over: updates then have to wait, and none may be lost."""
REDIS_OPTIONS: Final = {
    # kill -9 leaves the page cache alone, so it is not the disk that matters here. But while a background fsync
    # runs, everysec puts off even the write, for up to 2 s, and answers all the same: that is what a kill loses.
    "appendfsync": "always",
}

Kind = Literal["kills", "losses", "outages"]

_log = logging.getLogger("chaos")


class Load:
    """The process of the clients; its latest Figures arrive by themselves."""

    def __init__(self, port: int, seed: int, rate: int, ledger: Path) -> None:
        self.figures = Figures()
        self._ledger = ledger
        argv = [sys.executable, "-m", "chaos.clients", str(port), str(seed), str(rate), str(ledger)]
        env = {**os.environ, "JWT_SECRET": JWT_SECRET}
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, cwd=ROOT)
        assert self._process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
        self._reader.start()

    def finish(self) -> Ledger:
        """Make no new updates, and wait until the others are answered."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        status = self._process.wait(ANSWER_WITHIN_S + 30)
        assert status == 0, f"the clients ended with status {status}"
        self._reader.join()
        return Ledger.load(self._ledger)

    def stop(self) -> None:
        """End it, whatever it is doing."""
        with contextlib.suppress(BrokenPipeError):
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                pipe.close()
        self._process.kill()
        self._process.wait()

    def _read(self, lines: IO[bytes]) -> None:
        for line in lines:
            self.figures = msgspec.json.decode(line, type=Figures)


class Run:
    """One run: what was done to whom, and what came of it."""

    def __init__(self, stack: Stack, second_relay: Service) -> None:
        self.kills: Counter[str] = Counter()
        self.pauses: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()
        self._stack = stack
        self._parts = {**stack.measured, "second relay": second_relay}

    def take(self, step: Step) -> None:
        """Do what the step says, return when the parts answer again and its quiet is over.

        Kafka may take long: it is waited for only before it is hit again, so the others die during its absence too.
        """
        hit_parts = [hit.part for hit in step.hits]
        self.wait_for(hit_parts)
        begun_s = time.monotonic()
        due = [(hit.after_s, place, hit, self._hit) for place, hit in enumerate(step.hits)]
        due += [(hit.after_s + hit.for_s, place, hit, self._undo) for place, hit in enumerate(step.hits)]
        for at_s, _, hit, act in sorted(due, key=lambda it: it[:2]):
            time.sleep(max(0.0, begun_s + at_s - time.monotonic()))
            act(hit)
        self.wait_for([part for part in hit_parts if part != "Kafka"])
        time.sleep(step.quiet_s)

    def lose(self, loss: Loss, load: Load) -> None:
        """Let Redis lose something, return when updates are acknowledged again and its quiet is over."""
        self.kills["Redis"] += loss.how != "flush"
        self.kills["relay"] += loss.relay_s > 0
        lose(self._stack, loss)
        time.sleep(1.5)  # so that the figures are of later than that: they come once a second
        before = load.figures.acknowledged
        wait_until(lambda: load.figures.acknowledged > before, BACK_WITHIN_S, "nothing is acknowledged any more")
        time.sleep(loss.quiet_s)

    def wait_for(self, names: Iterable[str]) -> None:
        """Return when these parts answer; one that ended by itself is started again, and counted."""
        for name in names:
            wait_until(functools.partial(self._answers, name), BACK_WITHIN_S, f"{name} is not back")

    def _answers(self, name: str) -> bool:
        part = self._parts[name]
        if not part.running:
            _log.warning("%s ended by itself with status %s:\n%s", name, part.status, part.output_tail())
            self.ended[name] += 1
            part.launch()
        return part.answers()

    def _hit(self, hit: Hit) -> None:
        part = self._parts[hit.part]
        if hit.how == "kill":
            self.kills[hit.part] += 1
            part.kill()
        else:
            self.pauses[hit.part] += 1
            part.pause()

    def _undo(self, hit: Hit) -> None:
        part = self._parts[hit.part]
        part.launch() if hit.how == "kill" else part.resume()


def run(directory: Path, seed: int, kills: int, rate: int, kind: Kind = "kills") -> bool:
    """One run, printed; whether nothing was lost or doubled and all places agree.

    `kills` is how many, or how many losses of what Redis had acknowledged. Raises UnavailableError without Java or
    Maven.
    """
    print(f"chaos: CHAOS_SEED={seed} CHAOS_KILLS={kills} CHAOS_RATE={rate} {kind}", flush=True)
    with contextlib.ExitStack() as cleanup:
        stack = Stack(directory, SETTINGS | (SMALL_OUTBOX if kind == "outages" else {}), REDIS_OPTIONS)
        stack.start(cleanup)
        # One waits for the lease of the other: a relay that was paused wakes up beside its successor.
        second_relay = SyncProcess(directory / "second", stack.settings, "relay")
        if kind == "kills":
            (directory / "second").mkdir()
            cleanup.callback(second_relay.stop)
            second_relay.start()
        load = Load(stack.server.port, seed, rate, directory / "ledger")
        cleanup.callback(load.stop)
        wait_until(lambda: load.figures.acknowledged, 30, "nothing is acknowledged")
        torture = Run(stack, second_relay)
        planned = _planned(kind, seed, kills)
        for number, step in enumerate(planned, 1):
            torture.take(step) if isinstance(step, Step) else torture.lose(step, load)
            print(f"{number:4}/{len(planned)} {_so_far(load.figures)}  {_words(step)}", flush=True)
            if kind == "outages":
                torture.wait_for(PARTS[-2:])
                relayed_s, persisted_s = stack.settle(ENTRIES_UNDER_LOAD)
                print(f"{'':9}caught up: Kafka within {relayed_s:.1f} s, PostgreSQL {persisted_s:.1f} s", flush=True)
        began_s = time.monotonic()
        torture.wait_for(part for part in PARTS if part != "second relay" or kind == "kills")
        ledger = load.finish()
        wait_until(lambda: stack.server.status_of("/readyz") == 200, BACK_WITHIN_S, "the server is not ready")
        stack.settle()
        heal_s = time.monotonic() - began_s
        verdict = judge_losses(stack, ledger) if kind == "losses" else judge(stack, ledger)
        return _report(torture, load.figures, heal_s, verdict)


def _planned(kind: Kind, seed: int, kills: int) -> Sequence[Step | Loss]:
    if kind == "outages":
        return schedule.outages()
    return schedule.losses(seed, kills) if kind == "losses" else schedule.steps(seed, kills)


def _so_far(figures: Figures) -> str:
    return f"{figures.acknowledged:9,} acknowledged, longest outage {figures.longest_outage_ms / 1000:4.1f} s"


def _words(step: Step | Loss) -> str:
    if isinstance(step, Step):
        return " + ".join(f"{hit.how} {hit.part} for {hit.for_s:.1f} s" for hit in step.hits)
    relay = f", the relay dead for {step.relay_s:.2f} s before" if step.relay_s else ""
    return {
        "truncate": f"cut {step.cut_bytes:,} bytes off the append-only file{relay}",
        "promote": f"promote a replica that lags {step.lag_s:.2f} s{relay}",
        "flush": f"FLUSHALL{relay}",
    }[step.how]


def _report(torture: Run, figures: Figures, heal_s: float, verdict: Verdict) -> bool:
    print(f"\n{'part':12}{'kills':>7}{'pauses':>8}{'ended by itself':>17}")
    for part in PARTS:
        print(f"{part:12}{torture.kills[part]:7}{torture.pauses[part]:8}{torture.ended[part]:17}")
    lines = {
        "updates acknowledged": f"{figures.acknowledged:,}",
        "of them on a retry": f"{figures.replayed:,} after {figures.retries:,} retries",
        "refused": f"{figures.refused:,}",
        "never answered": f"{figures.unanswered:,}",
        "lost": f"{verdict.lost:,}",
        "duplicated": f"{verdict.duplicated:,}",
        "excused": "" if verdict.excused is None else f"{verdict.excused:,}: lost by Redis before Kafka had them",
        "longest outage seen by a client": f"{figures.longest_outage_ms / 1000:.1f} s",
        "time to heal": f"{heal_s:.1f} s",
    }
    print()
    for name, value in lines.items():
        if value:
            print(f"{name:32}{value}")
    for line in verdict.disagreements[:20]:
        print(f"wrong: {line}")
    excused = "" if verdict.excused is None else f" excused={verdict.excused}"
    print(
        f"chaos: kills={torture.kills.total()} acknowledged={figures.acknowledged} lost={verdict.lost}"
        f" duplicated={verdict.duplicated}{excused} longest_outage_ms={figures.longest_outage_ms}",
        flush=True,
    )
    unwanted = verdict.lost or verdict.duplicated or verdict.disagreements or figures.unanswered or figures.refused
    return not unwanted


def main(argv: list[str]) -> int:
    """Run the schedule that is named, `kills` without one, as the environment says; returns the exit status."""
    kind: Kind
    match argv:
        case [] | ["kills"]:
            kind = "kills"
        case ["losses" | "outages" as kind]:
            pass
        case _:
            print(f"usage: chaos [kills | losses | outages], got: {' '.join(argv)}", file=sys.stderr)
            return 2
    logging.basicConfig(format="chaos: %(message)s")
    seed = int(os.environ.get("CHAOS_SEED") or secrets.randbelow(10**6))
    kills, rate = (
        int(os.environ.get("CHAOS_KILLS") or (LOSSES if kind == "losses" else KILLS)),
        int(os.environ.get("CHAOS_RATE") or RATE),
    )
    with tempfile.TemporaryDirectory(prefix="scoreboard-chaos-") as directory:
        # Readable by the user that PostgreSQL runs as, which is not root.
        Path(directory).chmod(0o755)
        try:
            return 0 if run(Path(directory), seed, kills, rate, kind) else 1
        except UnavailableError as error:
            print(f"chaos: {error}", file=sys.stderr)
            return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
