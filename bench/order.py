"""What the order of text costs the batch statement: keys by their bytes, and by the order of the database.

`python -m bench.order` feeds several databases in turn, a batch each, so that whatever else this machine does slows all
of them alike: the ratios hold even where the figures do not. A figure is CPU time of the one backend, read from the
kernel.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, Final, NamedTuple

import psycopg

from bench.history import BATCH_EVENTS, TOPIC, Events
from bench.words import commit
from server.embedded import PostgresServer
from sync import store
from sync.store import Store, migrate
from tests.databases import migrate_as_before
from tests.services import locale_of_databases

FIRST: Final = 10
"""Batches that do not count: the tables are small, and the plan is new."""

PLAYERS: Final = 100_000
RATE: Final = 15_000
_STATEMENT: Final = store._PERSIST
_AS_BEFORE: Final = _STATEMENT.replace(b' COLLATE "C"', b"")


class Case(NamedTuple):
    """A database, how its batches are sorted, and what they have cost, in µs an event."""

    name: str
    store: Store
    backend: int
    statement: bytes
    events: Events
    used_us: list[float]


def _open(server: PostgresServer, locale: str, name: str, *, tables: bool, statement: bool) -> Case:
    database = name.replace(" ", "_")
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {database}")
    url = server.url_of(database)
    (migrate if tables else migrate_as_before)(url)
    made = Store(url)
    backend = made._connected().info.backend_pid
    return Case(f"{locale}, {name}", made, backend, _STATEMENT if statement else _AS_BEFORE, Events(PLAYERS, RATE), [])


def _feed(case: Case) -> None:
    batch = case.events.take(BATCH_EVENTS)
    store._PERSIST = case.statement
    before_ns = _cpu_ns(case.backend)
    case.store.persist(batch, TOPIC, "bench", {0: case.events.made})
    case.used_us.append((_cpu_ns(case.backend) - before_ns) / 1000 / len(batch))


def _cpu_ns(pid: int) -> int:
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])


def main() -> int:
    """Measure, and print a line for each kind of database."""
    parser = argparse.ArgumentParser(prog="python -m bench.order", description="Measure what the order of text costs.")
    parser.add_argument("--batches", type=int, default=100, help=f"of {BATCH_EVENTS} events for each database (100)")
    arguments = parser.parse_args()
    rng, cases = random.Random(1), list[Case]()
    with contextlib.ExitStack() as cleanup:
        directory = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        for locale in dict.fromkeys((locale_of_databases(), "C")):
            server: Any = PostgresServer(directory / locale, locale=locale)
            cleanup.callback(server.stop)
            server.start()
            cases.append(_open(server, locale, "all as before", tables=False, statement=False))
            cases.append(_open(server, locale, "only the statement by bytes", tables=False, statement=True))
            cases.append(_open(server, locale, "all by bytes", tables=True, statement=True))
        for case in cases:
            cleanup.callback(case.store.close)
        for _ in range(FIRST + arguments.batches):
            for case in rng.sample(cases, len(cases)):
                _feed(case)
    for case in cases:
        used_us = statistics.quantiles(case.used_us[FIRST:], n=10)
        sys.stdout.write(f"{case.name}: {used_us[4]:.1f} µs an event (p10 {used_us[0]:.1f}), {commit()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
