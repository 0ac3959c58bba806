"""The sidecar's command line: the relay, the persister, or both as two processes.

Wiring only: settings, logging, signals, and waiting for the services a part needs.
"""

from __future__ import annotations

import argparse
import logging
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Final, TextIO

import psycopg
import redis
from confluent_kafka import KafkaException
from psycopg import errors

from server import logs
from server.config import Settings, load
from server.errors import ConfigError, ScoreboardError
from server.instruments import Metrics
from server.signals import stop_signals
from server.supervisor import Child, Supervisor
from sync import dead_letters, store, topics
from sync.metrics import PersisterMetrics, RelayMetrics
from sync.persister import Persister
from sync.reconcile import Reconciliation
from sync.redis_time import RedisTime
from sync.relay import Relays
from sync.waiting import Outage, Stop, Stopped

USAGE: Final = "usage: sync [relay | persister]"
_log = logging.getLogger("sync")


def main(argv: list[str]) -> int:
    """Run the part that is named, or both; returns the exit status."""
    logs.configure()
    if argv not in ([], *([name] for name in _PARTS)):
        print(f"{USAGE}, got: {' '.join(argv)}", file=sys.stderr)
        return 2
    try:
        settings = _load()
        if not argv:
            return _run_both()
        _run_one(_PARTS[argv[0]], settings)
    except ConfigError as error:
        _log.error("%s", error)
        return 2
    except (ScoreboardError, psycopg.Error, KafkaException) as error:
        _log.error("%s", error)
        return 1
    return 0


def _load() -> Settings:
    settings = load()
    logs.configure(settings.log_format, settings.log_level)
    return settings


def migrate(argv: list[str]) -> int:
    """Create the schema and the topics, now or not at all; returns the exit status."""
    if argv:
        print(f"usage: migrate, got: {' '.join(argv)}", file=sys.stderr)
        return 2
    try:
        settings = _load()
        store.migrate(settings.database_url, settings.history_days)
        topics.ensure_topics(settings)
    except ConfigError as error:
        print(f"migrate: {error}", file=sys.stderr)
        return 2
    except (ScoreboardError, psycopg.Error, KafkaException) as error:
        print(f"migrate: {str(error).strip()}", file=sys.stderr)
        return 1
    return 0


def reconcile(argv: list[str]) -> int:
    """Compare Redis with the database; as diff(1) does, returns 0 for the same, 1 for a difference, 2 for trouble."""
    parser = argparse.ArgumentParser(
        prog="scoreboard reconcile",
        description="Compare the scores of Redis with those of the database, player by player.",
        epilog="Exit status: 0 if all are the same, 1 if some differ, 2 if they could not be compared.",
    )
    parser.add_argument("--repair", action="store_true", help="write what Redis says into the database")
    parser.add_argument("--every", type=_duration_s, metavar="60s", help="again and again, with that much in between")
    arguments = parser.parse_args(argv)
    stop = Stop()
    for number in stop_signals():
        signal.signal(number, stop.request)
    reconciliation = Reconciliation(_load(), stop, _print)
    try:
        while True:
            status = _reconcile_once(reconciliation, repair=arguments.repair)
            if arguments.every is None or stop.wait(arguments.every):
                return status
    finally:
        reconciliation.close()


def list_dead_letters(argv: list[str]) -> int:
    """List the records that could not be stored, or send them once more; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="scoreboard dead-letters",
        description="List the records that could not be stored: topic/partition:offset, when, why, what.",
    )
    parser.add_argument("--limit", type=int, default=100, metavar="N", help="list the latest N only (100)")
    parser.add_argument(
        "--replay", action="store_true", help="send them to their topic once more; what counted counts once"
    )
    parser.add_argument("--only", type=_place, metavar="PARTITION:OFFSET", help="replay this one alone")
    arguments = parser.parse_args(argv)
    if arguments.only and not arguments.replay:
        parser.error("--only says what to --replay")
    try:
        settings = _load()
        if arguments.replay:
            return _replay(settings, arguments.only)
        latest: deque[str] = deque(maxlen=max(0, arguments.limit))
        count = 0
        for letter in dead_letters.letters(settings):
            latest.append(str(letter))
            count += 1
    except ConfigError as error:
        _print(f"dead-letters: {error}", sys.stderr)
        return 2
    except (ScoreboardError, KafkaException) as error:
        _print(f"dead-letters: {error}", sys.stderr)
        return 1
    for line in latest:
        _print(line)
    _print(f"{count} dead letters" + (f", the latest {len(latest)} of them listed" if count > len(latest) else ""))
    return 0


def _replay(settings: Settings, only: tuple[int, int] | None) -> int:
    found = dead_letters.letters(settings)
    chosen = (letter for letter in found if letter.topic and only in (None, (letter.partition, letter.offset)))
    cut: list[str] = []
    count = dead_letters.send_again(settings, _whole(chosen, cut))
    _print(f"{count} records sent once more")
    if cut:
        _print(f"not sent, for they were too large to be kept whole: {', '.join(cut)}")
    return 1 if only and not count else 0


def _whole(found: Iterable[dead_letters.Letter], cut: list[str]) -> Iterator[dead_letters.Letter]:
    """Those letters that can be sent again; `cut` gets the places of the others."""
    for letter in found:
        if letter.whole:
            yield letter
        else:
            cut.append(f"{letter.partition}:{letter.offset}")


def _place(text: str) -> tuple[int, int]:
    matched = re.fullmatch(r"(\d+):(\d+)", text)
    if not matched:
        raise argparse.ArgumentTypeError(f"expected PARTITION:OFFSET such as 3:17, got {text!r}")
    return int(matched[1]), int(matched[2])


def _reconcile_once(reconciliation: Reconciliation, *, repair: bool) -> int:
    started = time.monotonic()
    try:
        outcome = reconciliation.run(repair=repair)
    except (ScoreboardError, psycopg.Error, redis.RedisError, KafkaException) as error:
        _print(f"could not compare: {str(error).strip()}", sys.stderr)
        return 2
    duration_s = time.monotonic() - started
    repaired = f", {outcome.repaired} repaired" if repair else ""
    _print(f"{outcome.compared} players compared in {duration_s:.1f} s: {outcome.differing} differ{repaired}")
    return 1 if outcome.differing else 0


def _duration_s(text: str) -> float:
    matched = re.fullmatch(r"(\d+)([smh]?)", text)
    if not matched or not int(matched[1]):
        raise argparse.ArgumentTypeError(f"expected seconds, or a number with s, m or h, got {text!r}")
    return int(matched[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[matched[2]]


def _print(line: str, file: TextIO = sys.stdout) -> None:
    file.write(f"{line}\n")
    file.flush()


def _run_both() -> int:
    children = [Child(name, [sys.executable, "-m", "sync", name]) for name in _PARTS]
    return Supervisor(children).run()


def _run_one(part: Callable[[Settings, Stop], None], settings: Settings) -> None:
    stop = Stop()
    for number in stop_signals():
        signal.signal(number, stop.request)
    part(settings, stop)


def _relay(settings: Settings, stop: Stop) -> None:
    relays = Relays(settings, stop)
    if settings.relay_metrics_port:
        Metrics(RelayMetrics(relays)).serve(settings.metrics_host, settings.relay_metrics_port, "RELAY_METRICS_PORT")
    if _when_there(relays.kafka_outage, lambda: topics.ensure_topics(settings), stop):
        relays.run()


def _persister(settings: Settings, stop: Stop) -> None:
    persister, port = Persister(settings, stop), settings.persister_metrics_port
    if port:
        redis_time = RedisTime(settings, persister.clock)
        Metrics(PersisterMetrics(persister, redis_time)).serve(settings.metrics_host, port, "PERSISTER_METRICS_PORT")
    ready = _when_there(persister.kafka_outage, lambda: topics.ensure_topics(settings), stop) and _when_there(
        persister.database_outage, lambda: store.migrate(settings.database_url, settings.history_days, stop.heed), stop
    )
    if ready:
        persister.run()


def _when_there(outage: Outage, prepare: Callable[[], None], stop: Stop) -> bool:
    """Prepare a service as soon as it answers; False if we were asked to stop before it did."""
    while not stop.requested:
        try:
            prepare()
        except (KafkaException, psycopg.OperationalError, errors.ReadOnlySqlTransaction) as error:
            stop.wait(outage.failed(error))
        except Stopped:
            return False
        else:
            outage.over()
            return True
    return False


_PARTS: Final = {"relay": _relay, "persister": _persister}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
