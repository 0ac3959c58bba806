"""How fast the persister stores events as the history grows, for several layouts of score_events.

The batch statement alone is fed as the persister feeds it, one connection, batches of its size; only the time within
`Store.persist` counts. At the end the real persister catches up with as many events from Kafka, on the same tables.
Event time passes as at `rate` events a second, since that decides how many rows a chunk gets.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import psycopg
from confluent_kafka import Producer

from bench.fill import player_name
from bench.processes import Meter
from server.config import Settings
from server.embedded import PostgresServer, Service
from server.events import FORMAT_VERSION, ScoreEvent, encode_event
from sync.persister import BATCH_EVENTS
from sync.store import Store, migrate
from sync.topics import ensure_topics, look_up
from tests.services import KafkaBroker, SyncProcess, UnavailableError, locale_of_databases, wait_until
from tests.timescale import TimescaleServer

TOPIC: Final = "score-updates"
POINTS: Final = 20
READS: Final = 50
READ_FOR_S: Final = 2.0
"""Fewer reads where each goes through all rows."""

CATCH_UP_WITHIN_S: Final = 900.0
BEGAN_MS: Final = 1_700_000_000_000

_TIME_FIRST: Final = """
    ALTER TABLE score_events DROP CONSTRAINT score_events_pkey,
        ADD CONSTRAINT score_events_pkey PRIMARY KEY (at, ver_seq, board, player_id)
"""
_BY_PLAYER: Final = "CREATE INDEX score_events_player ON score_events (board, player_id, at)"
_CHUNK: Final = "SELECT set_chunk_time_interval('score_events', INTERVAL '{}')"
_ONE_PLAYER: Final = """
    SELECT at, score FROM score_events WHERE board = 'main' AND player_id = %s ORDER BY at DESC LIMIT 100
"""

Figures = dict[str, Any]
Say = Callable[[str], None]


class Layout(NamedTuple):
    """What is done to score_events while it is empty."""

    statements: tuple[str, ...]
    timescale: bool = False


LAYOUTS: Final = {
    "player-first": Layout(()),
    "time-first": Layout((_TIME_FIRST,)),
    "time-first+player": Layout((_TIME_FIRST, _BY_PLAYER)),
    "player-first/day": Layout((), timescale=True),
    "player-first/hour": Layout((_CHUNK.format("1 hour"),), timescale=True),
    "player-first/5min": Layout((_CHUNK.format("5 minutes"),), timescale=True),
    "time-first/hour": Layout((_TIME_FIRST, _CHUNK.format("1 hour")), timescale=True),
    "time-first+player/5min": Layout((_TIME_FIRST, _CHUNK.format("5 minutes"), _BY_PLAYER), timescale=True),
}
"""By the order of the primary key, `+player` for a second index, behind the slash TimescaleDB's chunk."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What this part may be told."""
    parser.add_argument("--rows", type=lambda text: int(float(text)), default=1_000_000, help="of history (1e6)")
    parser.add_argument(
        "--from-kafka", type=lambda text: int(float(text)), default=200_000, help="events more (2e5; 0: no Kafka)"
    )
    parser.add_argument("--of-players", type=int, default=100_000, help="whose history it is (100000)")
    parser.add_argument("--rate", type=int, default=15_000, help="events a second of event time (15000)")
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help=f"({','.join(LAYOUTS)})")
    parser.add_argument("--locale", default=locale_of_databases(), help="of a plain PostgreSQL (en_US.UTF-8 if known)")
    parser.add_argument("--postgres", action="append", default=[], metavar="NAME=VALUE", help="a setting of the server")


def measure(directory: Path, arguments: argparse.Namespace, say: Say) -> Iterator[Figures]:
    """The points of each layout; one that needs what is not to be had here is left out, and said."""
    with contextlib.ExitStack() as cleanup:
        kafka = None
        if arguments.from_kafka:
            kafka = KafkaBroker(directory / "history-kafka")
            cleanup.callback(kafka.stop)
            kafka.start()
        for number, name in enumerate(arguments.layouts.split(",")):
            say(f"{name}: {arguments.rows:,} rows")
            try:
                yield from _measure(directory / f"history-{number}", kafka, name, arguments)
            except UnavailableError as error:
                say(f"{name}: left out, {error}")


def _measure(directory: Path, kafka: KafkaBroker | None, name: str, arguments: argparse.Namespace) -> Iterator[Figures]:
    layout = LAYOUTS[name]
    directory.mkdir(parents=True)
    with _database(directory, layout, arguments) as (url, server):
        migrate(url)
        with psycopg.connect(url, autocommit=True) as connection:
            for statement in layout.statements:
                connection.execute(statement.encode())
        events = Events(arguments.of_players, arguments.rate)
        shared = {"part": "history", "layout": name, "locale": arguments.locale, "settings": arguments.postgres}
        for figures in _grow(url, server, events, arguments.rows):
            yield shared | {"how": "statement"} | figures
        if kafka is None:
            return
        topic = f"{TOPIC}-{directory.name}"
        settings = Settings(database_url=url, kafka_brokers=kafka.brokers, kafka_topic=topic, history_days=0)
        ensure_topics(settings)
        _produce(settings, events, arguments.from_kafka)
        caught_up = _catch_up(directory, settings, arguments.from_kafka)
        yield shared | {"how": "from Kafka", "rows": arguments.rows + arguments.from_kafka} | caught_up


@contextlib.contextmanager
def _database(directory: Path, layout: Layout, arguments: argparse.Namespace) -> Iterator[tuple[str, Service]]:
    """A server of its own for each layout, so that no other's pages are in its memory; gone afterwards."""
    options = {"max_connections": "50"} | dict(option.split("=", 1) for option in arguments.postgres)
    if layout.timescale:
        # As the other: TimescaleDB of the tests does not write through, and has the default for shared_buffers.
        timescale = TimescaleServer(directory / "timescale.log", {"fsync": "on", "shared_buffers": "64MB"} | options)
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(timescale.remove)
            timescale.start()
            with psycopg.connect(timescale.url_of("postgres"), autocommit=True) as connection:
                connection.execute("CREATE DATABASE scoreboard TEMPLATE template0")
            yield timescale.url_of("scoreboard"), timescale
    else:
        postgres = PostgresServer(directory / "postgres", options=options, locale=arguments.locale)
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(shutil.rmtree, directory, ignore_errors=True)  # all layouts would be 40 GB
            cleanup.callback(postgres.stop)
            postgres.start()
            yield postgres.url, postgres


class Events:
    """Events without end: players in no order, time as at `rate`."""

    def __init__(self, players: int, rate: int) -> None:
        self.made = 0
        self._rng = random.Random(1)
        self._scores = [0] * players
        self._rate = rate

    def any_player(self) -> str:
        """One of them."""
        return player_name(self._rng.randrange(len(self._scores)))

    def take(self, count: int) -> list[ScoreEvent]:
        """The next ones; a batch of Redis is what falls into one millisecond."""
        taken = []
        for number in range(self.made, self.made + count):
            ms = number * 1000 // self._rate
            first_of_ms = -(-ms * self._rate // 1000)
            player = self._rng.randrange(len(self._scores))
            self._scores[player] += 5
            taken.append(
                ScoreEvent(
                    f"{BEGAN_MS + ms}-0-{number - first_of_ms}", "main", player_name(player), 5, self._scores[player],
                    BEGAN_MS + ms,
                )
            )  # fmt: skip
        self.made += count
        return taken


def _grow(url: str, server: Service, events: Events, rows: int) -> Iterator[Figures]:
    """Persist batch after batch; a point for each twentieth of all rows."""
    store = Store(url)
    # One connection for all reads: CPU time of one that ends would be missing in what the server has used.
    with contextlib.closing(store), psycopg.connect(url, autocommit=True) as reader:
        for point in range(1, POINTS + 1):
            batches_s: list[float] = []
            stored, meter = 0, Meter({"PostgreSQL": server})
            while events.made < rows * point // POINTS:
                batch = events.take(min(BATCH_EVENTS, rows * point // POINTS - events.made))
                began_s = time.perf_counter()
                stored += store.persist(batch, TOPIC, "bench", {0: events.made}).new_events
                batches_s.append(time.perf_counter() - began_s)
            if batches_s:
                yield {
                    "rows": events.made,
                    "events_per_s": round(stored / sum(batches_s)),
                    "cpu_us_per_event": round(meter.used_us()["PostgreSQL"] / stored, 1),
                    "batch_p50_ms": round(statistics.median(batches_s) * 1000, 1),
                    "batch_max_ms": round(max(batches_s) * 1000, 1),
                    **_looked_up(reader, events),
                }


def _looked_up(connection: psycopg.Connection[Any], events: Events) -> Figures:
    """What one player's latest events take to read, and what a row takes on disk."""
    reads_s: list[float] = []
    while len(reads_s) < READS and sum(reads_s) < READ_FOR_S:
        began_s = time.perf_counter()
        connection.execute(_ONE_PLAYER, (events.any_player(),)).fetchall()
        reads_s.append(time.perf_counter() - began_s)
    size = connection.execute("SELECT pg_database_size(current_database())").fetchone()
    assert size is not None
    return {
        "player_p50_ms": round(statistics.median(reads_s) * 1000, 2),
        "bytes_per_event": round(size[0] / events.made),
    }


def _produce(settings: Settings, events: Events, count: int) -> None:
    """Put events into Kafka, as the relay does."""
    producer = Producer({"bootstrap.servers": settings.kafka_brokers, "acks": "all", "linger.ms": 5})
    while count:
        batch = events.take(min(BATCH_EVENTS, count))
        for event in batch:
            value, key = encode_event(event), event.player_id
            producer.produce(settings.kafka_topic, value, key, headers=[("v", FORMAT_VERSION)])
        count -= len(batch)
        assert producer.flush(60) == 0


def _catch_up(directory: Path, settings: Settings, count: int) -> Figures:
    """The persister's own pace, from the first batch that it has stored to the last."""
    variables = {
        "DATABASE_URL": settings.database_url,
        "KAFKA_BROKERS": settings.kafka_brokers,
        "KAFKA_TOPIC": settings.kafka_topic,
        "HISTORY_DAYS": "0",
    }
    topic_id = look_up(settings).topic_id
    persister = SyncProcess(directory, variables, "persister")
    with psycopg.connect(settings.database_url, autocommit=True) as connection, contextlib.ExitStack() as cleanup:

        def stored() -> int:
            query = "SELECT coalesce(sum(next_offset), 0) FROM consumer_offsets WHERE topic_id = %s"
            row = connection.execute(query, (topic_id,)).fetchone()
            return int(row[0]) if row else 0

        cleanup.callback(persister.stop)
        persister.start()
        first = wait_until(stored, CATCH_UP_WITHIN_S, "the persister stores nothing")
        began_s = time.monotonic()
        wait_until(lambda: stored() >= count, CATCH_UP_WITHIN_S, "the persister does not catch up")
        return {"events_per_s": round((count - first) / (time.monotonic() - began_s))}
