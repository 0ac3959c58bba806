"""`scoreboard dev`: everything on this machine, one screen that says what runs where, and one Ctrl-C that ends it.

Whatever the environment does not name is embedded (server/embedded.py), with its data in a directory that the next
start takes up again. Knows the scoreboard's own processes by their command lines and by what they tell from outside.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import functools
import http.client
import json
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import confluent_kafka
import psycopg
import redis

from server import config, dev_screen, postgres
from server.config import Settings
from server.demo import PLAYERS, DemoPlayers
from server.dev_screen import signing_algorithm, token
from server.embedded import ADDRESS, MockKafka, PostgresServer, RedisServer, Service, ServiceError, free_port
from server.errors import ScoreboardError
from server.supervisor import Child, Supervisor, alive, ended
from sync.topology import connect_to, keys_in_use

READY_WITHIN_S: Final = 60.0
DRAIN_WITHIN_S: Final = 12.0
"""A consumer group takes 3 s to form on the in-memory broker, so a stop right after a start needs at least that."""

LOCK_WITHIN_S: Final = 15.0
"""How long the stores of a `dev` that was killed may take to close their data."""

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class DevError(ScoreboardError):
    """Why `dev` cannot start, in a sentence."""


class _StoppedEarlyError(ScoreboardError):
    """Stopped before everything was up."""


class _Impatient(BaseException):
    """Asked twice to stop."""


def dev(argv: list[str]) -> int:
    """Run everything until SIGINT or SIGTERM; 1 when something could not be started."""
    parser = argparse.ArgumentParser(prog="scoreboard dev", description="Run everything on this machine.")
    parser.add_argument("--no-demo", action="store_true", help="no demo players")
    parser.add_argument("--data", type=Path, default=Path(".scoreboard"), metavar="DIR", help="default: .scoreboard")
    parser.add_argument("--port", metavar="PORT", help="instead of the variable PORT")
    arguments = parser.parse_args(argv)
    environ = dict(os.environ)
    if arguments.port:
        environ["PORT"] = arguments.port
    signals = _StopSignals()
    development = Development(environ, arguments.data, signals)
    try:
        with _locked(arguments.data) as lock:
            development.start(lock, demo=not arguments.no_demo)
            while not signals.came:
                development.supervisor.tend(0.1)
            development.stop()
    except (DevError, ServiceError) as error:
        if not signals.came:  # otherwise a child took the Ctrl-C for its own
            sys.stderr.write(f"scoreboard dev: {error}\n")
            return 1
    except _StoppedEarlyError:
        pass
    except _Impatient:
        _say("Stopped at once.")
        return 130
    finally:
        development.kill()
    return 0


class _StopSignals:
    """The first SIGINT, SIGTERM or SIGHUP asks for an orderly stop, the second for one at once."""

    def __init__(self) -> None:
        self.came = False
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, *_: object) -> None:
        if not self.came:
            self.came = True
            return
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # the end is under way
        raise _Impatient


class Development:
    """The stores that the environment `environ` does not name, server, sync and demo players."""

    def __init__(self, environ: dict[str, str], data: Path, signals: _StopSignals) -> None:
        """Raises ConfigError."""
        self.settings = config.load(environ)
        self.supervisor = Supervisor([])
        self._environ = environ
        self._data = data
        self._signals = signals
        self._redis: RedisServer | None = None
        self._postgres: PostgresServer | None = None
        self._kafka: MockKafka | None = None
        self._demo: DemoPlayers | None = None
        self._reconcile: Child | None = None

    # ------------------------------------------------------------------ start

    def start(self, lock: int, *, demo: bool) -> None:
        """Start everything and say so; the stores hold the descriptor `lock` open as long as they live.

        Raises DevError or ServiceError.
        """
        self._choose_port()
        self._choose_secret()
        self._start_stores(lock)
        self.settings = config.load(self._environ)
        self._sync = self._child("sync")
        self._server = self._child("serve")
        self.supervisor.children += [self._server, self._sync]
        self.supervisor.start()
        self._wait_until_ready()
        if self._kafka:
            # The broker's memory went with the last stop, and perhaps events in it.
            self._reconcile = self._child("reconcile", "--repair")
            self._reconcile.launch()
        if demo and signing_algorithm(self.settings):
            self._demo = DemoPlayers(self._host, self.settings.port, functools.partial(token, self.settings))
            self._demo.start()
        _say(self._screen())

    def _choose_port(self) -> None:
        host, port = self.settings.host, self.settings.port or free_port()
        self._environ["PORT"] = str(port)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            socket.create_server((host, port), family=family).close()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise DevError(f"port {port} is taken: choose another, as in make run PORT={port + 1}") from error
            raise DevError(f"cannot listen on {host}, port {port}: {error.strerror}") from error

    def _choose_secret(self) -> None:
        if self.settings.jwt_secret is None and signing_algorithm(self.settings):
            self._environ["JWT_SECRET"] = _kept_secret(self._data / "jwt-secret")

    def _start_stores(self, lock: int) -> None:
        named, settings = self._environ, self.settings
        if not named.get("REDIS_HOST") and not named.get("REDIS_PORT"):
            self._redis = RedisServer(self._data.absolute() / "redis")
            self._start_store(self._redis, lock)
            named |= {"REDIS_HOST": self._redis.host, "REDIS_PORT": str(self._redis.port), "REDIS_PASSWORD": ""}
        if not named.get("DATABASE_URL"):
            self._postgres = PostgresServer(self._data.absolute() / "postgres")
            self._start_store(self._postgres, lock)
            named["DATABASE_URL"] = self._postgres.url
        if not named.get("KAFKA_BROKERS"):
            self._kafka = MockKafka((settings.kafka_topic, settings.dead_letter_topic))
            self._kafka.start()
            # In memory: every start makes the topic anew.
            named |= {"KAFKA_BROKERS": self._kafka.brokers, "KAFKA_NEW_TOPIC": "restart", "KAFKA_FETCH_WAIT_MS": "10"}

    def _start_store(self, store: Service, lock: int) -> None:
        if self._signals.came:
            raise _StoppedEarlyError
        store.inherits = (lock,)
        store.log = self._new_log(store.name)
        self.supervisor.children.append(store)
        store.start()

    def _child(self, command: str, *arguments: str) -> Child:
        name = "server" if command == "serve" else command
        argv = [sys.executable, "-m", "server", command, *arguments]
        return Child(name, argv, self._environ, log=self._new_log(name))

    def _new_log(self, name: str) -> Path:
        log = self._data.absolute() / f"{name.lower()}.log"
        log.unlink(missing_ok=True)
        return log

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_WITHIN_S
        while waits_for := self._waits_for():
            if self._signals.came:
                self.stop()
                raise _StoppedEarlyError
            for child in self.supervisor.children:
                if not child.running:
                    raise DevError(f"{child.name} {ended(child.status)} at its start:\n{child.output_tail()}")
            if time.monotonic() > deadline:
                said = "\n".join(f"{child.name}:\n{child.output_tail(8)}" for child in (self._server, self._sync))
                raise DevError(f"not ready within {READY_WITHIN_S:.0f} s: {waits_for}\n{said}")
            time.sleep(0.05)

    def _waits_for(self) -> str:
        """Why updates are not taken yet; empty once they are."""
        connection = http.client.HTTPConnection(self._host, self.settings.port, timeout=2)
        try:
            connection.request("GET", "/readyz")
            state: dict[str, Any] = json.loads(connection.getresponse().read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            return f"the server does not answer: {error}"
        finally:
            connection.close()
        parts = {name: part for name, part in state.items() if isinstance(part, dict) and not part["ok"]}
        return ", ".join(f"{name}: {part.get('detail', 'not yet')}" for name, part in parts.items())

    # ------------------------------------------------------------------ stop

    def stop(self) -> None:
        """End everything, in the order in which changes move, so that nothing stays on its way."""
        _say(
            "\nStopping: the server first, then what it has accepted moves on to the database. (Ctrl-C again: at once.)"
        )
        if self._demo:
            self._demo.stop()
        if self._reconcile:
            self._reconcile.stop()
        self.supervisor.stop_one(self._server)
        if self._kafka:
            self._drain()
        self.supervisor.stop_one(self._sync)
        self.supervisor.stop()
        if self._kafka:
            self._kafka.stop()
        _say(f"Stopped. The board is kept in {self._data}.")

    def kill(self) -> None:
        """End at once whatever still runs."""
        if self._demo:
            self._demo.leave()
        for child in (*self.supervisor.children, *([self._reconcile] if self._reconcile else [])):
            if child.running:
                child.kill()

    def _drain(self) -> None:
        """Wait until all that Redis owes the in-memory broker, and that owes the database, is in the database."""
        deadline = time.monotonic() + DRAIN_WITHIN_S
        while owed := self._owed():
            if time.monotonic() > deadline:
                _say(f"After {DRAIN_WITHIN_S:.0f} s still on its way: {owed}. The next start puts it right from Redis.")
                return
            self.supervisor.tend(0.05)

    def _owed(self) -> str:
        settings = self.settings
        try:
            entries = 0
            for keys in keys_in_use(settings):
                with connect_to(settings, keys) as client:
                    entries += client.xlen(keys.outbox)
            if entries:
                return f"{entries} entries of the outbox"
            behind = _unpersisted(settings)
        except (redis.RedisError, psycopg.Error, confluent_kafka.KafkaException) as error:
            return str(error).strip()
        return f"{behind} events in Kafka" if behind else ""

    @property
    def _host(self) -> str:
        """Where to reach a server that may listen on every address."""
        return {"0.0.0.0": ADDRESS, "::": "::1"}.get(self.settings.host, self.settings.host)  # noqa: S104

    def _screen(self) -> str:
        settings = self.settings
        rows = [
            ("sync", "relay and persister", self._log_of(self._sync)),
            ("Redis", f"{settings.redis_host}:{settings.redis_port}", self._log_of(self._redis)),
            ("Kafka", settings.kafka_brokers, "embedded, in memory" if self._kafka else "yours"),
            ("PostgreSQL", dev_screen.without_password(settings.database_url), self._log_of(self._postgres)),
            ("players", f"{len(PLAYERS)}, for demonstration" if self._demo else "none", "--no-demo: none"),
        ]
        host = f"[{self._host}]" if ":" in self._host else self._host
        url = f"http://{host}:{settings.port}"
        return dev_screen.screen(url, [("server", url, self._log_of(self._server)), *rows], settings, self._data)

    def _log_of(self, child: Child | None) -> str:
        return f"log {self._data / child.log.name}" if child and child.log else "yours"


@contextlib.contextmanager
def _locked(data: Path) -> Iterator[int]:
    """The data directory is ours, and no process of an earlier `dev` has it open; yields the lock's descriptor."""
    data.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = data / "lock"
    with path.open("a+") as lock:
        deadline = time.monotonic() + LOCK_WITHIN_S
        while not _lock(lock.fileno()):
            holder = path.read_text().strip()
            if holder.isdigit() and alive(int(holder)):
                raise DevError(f"another one (process {holder}) runs with {data}: stop it, or choose another --data")
            # It was killed, and its stores are about to end.
            if time.monotonic() > deadline:
                raise DevError(f"what an earlier one started still uses {data}: see `fuser {path}`")
            time.sleep(0.05)
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield lock.fileno()


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _kept_secret(path: Path) -> str:
    """The secret in the file, made at the first start: tokens stay valid from one start to the next."""
    if not path.exists():
        unfinished = path.with_suffix(".unfinished")
        unfinished.unlink(missing_ok=True)
        with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(48))
        unfinished.rename(path)
    return path.read_text()


def _unpersisted(settings: Settings) -> int:
    """How many events of the in-memory broker's topic are not in the database."""
    topic = settings.kafka_topic
    consumer = confluent_kafka.Consumer({"bootstrap.servers": settings.kafka_brokers, "group.id": "dev"})
    try:
        answer = consumer.list_topics(topic, timeout=2)
        where = [confluent_kafka.TopicPartition(topic, partition) for partition in answer.topics[topic].partitions]
        ends = [consumer.get_watermark_offsets(each, timeout=2)[1] for each in where]
    finally:
        consumer.close()
    # Offsets of an earlier broker mean nothing here; the persister tells them apart by the cluster's id.
    query = "SELECT coalesce(sum(next_offset), 0)::bigint FROM consumer_offsets WHERE topic = %s AND topic_id = %s"
    with postgres.connect(settings.database_url, "scoreboard-dev", within_s=2) as connection:
        row = connection.execute(query, [topic, answer.cluster_id]).fetchone()
    return sum(ends) - (row[0] if row else 0)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
