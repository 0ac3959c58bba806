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
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import redis

from server import config, dev_screen, listening
from server.auth import signing_algorithm
from server.demo import PLAYERS, DemoPlayers
from server.dev_screen import token
from server.dev_watch import Watch
from server.embedded import (
    ADDRESS,
    MockKafka,
    PostgresServer,
    RedisServer,
    Service,
    ServiceError,
    free_port,
    without_libpq,
)
from server.errors import ConfigError, ScoreboardError
from server.signals import Impatient, StopSignals
from server.supervisor import Child, Supervisor, alive, ended
from sync.topology import connect_to, keys_in_use

READY_WITHIN_S: Final = 60.0
DRAIN_WITHIN_S: Final = 12.0
"""A consumer group takes 3 s to form on the in-memory broker, so a stop right after a start needs at least that."""

LOCK_WITHIN_S: Final = 15.0
"""How long the stores of a `dev` that was killed may take to close their data."""

LOOK_EVERY_S: Final = 2.0
"""How often it is looked whether something is behind."""

AHEAD_BYTES: Final = 4_000_000
"""What the relay may have in the broker that is not stored: it keeps 5 MiB a partition, and may get all in one."""


class DevError(ScoreboardError):
    """Why `dev` cannot start, in a sentence."""


class _StoppedEarlyError(ScoreboardError):
    """Stopped before everything was up."""


def dev(argv: list[str]) -> int:
    """Run everything until a signal to stop; 1 when something could not be started."""
    parser = argparse.ArgumentParser(prog="scoreboard dev", description="Run everything on this machine.")
    parser.add_argument("--no-demo", action="store_true", help="no demo players")
    parser.add_argument("--data", type=Path, default=Path(".scoreboard"), metavar="DIR", help="default: .scoreboard")
    parser.add_argument("--port", metavar="PORT", help="instead of the variable PORT")
    arguments = parser.parse_args(argv)
    environ = dict(os.environ)
    if arguments.port:
        environ["PORT"] = arguments.port
    signals = StopSignals()
    development = Development(environ, arguments.data, signals)
    try:
        with _locked(arguments.data) as lock:
            development.start(lock, demo=not arguments.no_demo)
            while not signals.came:
                development.supervisor.tend(0.1)
                development.watch()
            development.stop()
    except (DevError, ServiceError) as error:
        if not signals.came:  # otherwise a child took the Ctrl-C for its own
            sys.stderr.write(f"scoreboard dev: {error}\n")
            return 1
    except _StoppedEarlyError:
        pass
    except Impatient:
        signals.ignore()  # the end is under way
        _say("Stopped at once.")
        return 130
    finally:
        development.kill()
    return 0


class Development:
    """The stores that the environment `environ` does not name, server, sync and demo players."""

    def __init__(self, environ: dict[str, str], data: Path, signals: StopSignals) -> None:
        """Raises ConfigError."""
        _forget_other_servers(environ)
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
        self._watch = Watch()
        self._look_at = 0.0

    # ------------------------------------------------------------------ start

    def start(self, lock: int, *, demo: bool) -> None:
        """Start everything and say so; the stores hold the descriptor `lock` open as long as they live.

        Raises DevError or ServiceError.
        """
        self._choose_port()
        with _named_data(self._data):
            self._choose_secret()
            self._start_stores(lock)
        self._say_what_was_put_aside()
        self.settings = config.load(self._environ)
        self._server = self._child("server", "serve")
        self._relay = self._child("relay", "sync", "relay")
        self._persister = self._child("persister", "sync", "persister")
        parts = [self._server, self._relay, self._persister]
        self.supervisor.children += parts
        self._restarts = self.supervisor.publish_restarts(parts)
        self.supervisor.start()
        self._wait_until_ready()
        if self._kafka:
            # The broker's memory went with the last stop, and perhaps events in it.
            self._reconcile = self._child("reconcile", "reconcile", "--repair")
            self._reconcile.launch()
        if demo and signing_algorithm(self.settings):
            self._demo = DemoPlayers(self._host, self.settings.port, functools.partial(token, self.settings))
            self._demo.start()
        _say(self._screen())

    def _choose_port(self) -> None:
        host, port = self.settings.host, self.settings.port or free_port()
        self._environ["PORT"] = str(port)
        try:
            listening.bound(host, port).close()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise DevError(f"port {port} is taken: choose another, as in make run PORT={port + 1}") from error
            raise ConfigError(listening.why_not(error, host, port)) from error

    def _choose_secret(self) -> None:
        if self.settings.jwt_secret is None and signing_algorithm(self.settings):
            self._environ["JWT_SECRET"] = _kept_secret(self._data / "jwt-secret")

    def _start_stores(self, lock: int) -> None:
        named, settings = self._environ, self.settings
        if not named.get("REDIS_HOST") and not named.get("REDIS_PORT"):
            self._redis = RedisServer(self._data.absolute() / "redis")
            self._start_store(self._redis, lock)
            named |= {"REDIS_HOST": self._redis.host, "REDIS_PORT": str(self._redis.port)}
        if not named.get("DATABASE_URL"):
            self._postgres = PostgresServer(self._data.absolute() / "postgres")
            self._start_store(self._postgres, lock)
            named["DATABASE_URL"] = self._postgres.url
        if not named.get("KAFKA_BROKERS"):
            self._kafka = MockKafka((settings.kafka_topic, settings.dead_letter_topic))
            self._kafka.start()
            # In memory: every start makes the topic anew.
            named |= {"KAFKA_BROKERS": self._kafka.brokers, "KAFKA_NEW_TOPIC": "restart", "KAFKA_FETCH_WAIT_MS": "10"}
            named["RELAY_AHEAD_BYTES"] = str(AHEAD_BYTES)

    def _start_store(self, store: Service, lock: int) -> None:
        if self._signals.came:
            raise _StoppedEarlyError
        store.inherits = (lock,)
        store.log = self._new_log(store.name)
        self.supervisor.children.append(store)
        store.start()

    def _say_what_was_put_aside(self) -> None:
        redis_aside = self._redis.put_aside if self._redis else ""
        postgres_aside = self._postgres.put_aside if self._postgres else ""
        if redis_aside:
            then = "all begins anew" if postgres_aside else "the board is rebuilt from the database"
            _say(f"{redis_aside}, and {then}")
        if postgres_aside:
            then = "" if redis_aside else ", with the scores of Redis"
            _say(f"{postgres_aside}, and the history begins anew{then}")

    def _child(self, name: str, *arguments: str) -> Child:
        argv = [sys.executable, "-m", "server", *arguments]
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
            parts = (self._server, self._relay, self._persister)
            for child in self.supervisor.children:
                if not child.running and child not in parts[1:]:  # without those updates are taken all the same
                    raise DevError(f"{child.name} {ended(child.status)} at its start:\n{child.output_tail()}")
            if time.monotonic() > deadline:
                said = "\n".join(f"{child.name}:\n{child.output_tail(8)}" for child in parts)
                raise DevError(f"not ready within {READY_WITHIN_S:.0f} s: {waits_for}\n{said}")
            self.supervisor.tend(0.05)

    def _waits_for(self) -> str:
        """Why updates are not taken yet; empty once they are."""
        return ", ".join(f"{name}: {detail}" for name, detail in self._not_ready().items())

    def _not_ready(self) -> dict[str, str]:
        """What /readyz says of parts that do not work, by their names."""
        connection = http.client.HTTPConnection(self._host, self.settings.port, timeout=2)
        try:
            connection.request("GET", "/readyz")
            state: dict[str, Any] = json.loads(connection.getresponse().read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            return {"server": f"the server does not answer: {error}"}
        finally:
            connection.close()
        parts = {name: part for name, part in state.items() if isinstance(part, dict) and not part["ok"]}
        return {name: part.get("detail", "not yet") for name, part in parts.items()}

    # ------------------------------------------------------------------ while it runs

    def watch(self) -> None:
        """Say what is behind or refused, when that begins and when it is over."""
        now_s = time.monotonic()
        if now_s < self._look_at or self._signals.came:
            return
        self._look_at = now_s + LOOK_EVERY_S
        self._restarts.write(self.supervisor.restarts)
        with contextlib.suppress(redis.RedisError):  # a Redis that died is started again, and that is said
            entries, oldest_s = self._outbox()
            missing = self._not_ready()
            for line in self._watch.look(now_s, entries, oldest_s, missing.get("write") or missing.get("server", "")):
                _say(line)

    def _outbox(self) -> tuple[int, float]:
        """How many entries wait in Redis for Kafka or the database, and for how long the oldest has.

        Raises RedisError.
        """
        entries, oldest_s = 0, 0.0
        for keys in keys_in_use(self.settings):
            with connect_to(self.settings, keys) as client:
                seconds, microseconds = client.time()
                first = client.xrange(keys.outbox, count=1)
                entries += client.xlen(keys.outbox)
            if first:
                oldest_s = max(oldest_s, seconds + microseconds / 1e6 - int(first[0][0].split(b"-")[0]) / 1000)
        return entries, oldest_s

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
        self.supervisor.stop_one(self._relay)
        self.supervisor.stop_one(self._persister)
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
        """Wait until all that Redis owes the database, by way of the in-memory broker, is in the database."""
        deadline = time.monotonic() + DRAIN_WITHIN_S
        while owed := self._owed():
            if time.monotonic() > deadline:
                _say(f"After {DRAIN_WITHIN_S:.0f} s still on its way: {owed}. The next start goes on with that.")
                return
            self.supervisor.tend(0.05)

    def _owed(self) -> str:
        try:
            entries, _ = self._outbox()
        except redis.RedisError as error:
            return str(error).strip()
        return f"{entries} entries of the outbox" if entries else ""

    @property
    def _host(self) -> str:
        """Where to reach a server that may listen on every address."""
        return {"0.0.0.0": ADDRESS, "::": "::1"}.get(self.settings.host, self.settings.host)  # noqa: S104

    def _screen(self) -> str:
        settings = self.settings
        rows = [
            ("relay", "Redis to Kafka", self._log_of(self._relay)),
            ("persister", "Kafka to PostgreSQL", self._log_of(self._persister)),
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
    path = data / "lock"
    with _named_data(data):
        data.mkdir(parents=True, exist_ok=True, mode=0o700)
        opened = path.open("a+")
    with opened as lock:
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


@contextlib.contextmanager
def _named_data(data: Path) -> Iterator[None]:
    """What goes wrong with files in it is said with the option that names the directory.

    Raises ConfigError.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        why = f"{error.filename}: {error.strerror}"
        raise ConfigError(
            f"--data: expected a directory that can be made and written, got {str(data)!r}: {why}"
        ) from None


def _forget_other_servers(environ: dict[str, str]) -> None:
    """Take out what the shell says of how to reach servers that it does not name: the embedded ones need none of it."""
    ours = [variable for variable, _, _ in config.describe()]
    forgotten: list[str] = []
    if not environ.get("REDIS_HOST") and not environ.get("REDIS_PORT"):
        forgotten += [name for name in ours if name.startswith("REDIS_") and name != "REDIS_KEY_PREFIX"]
    if not environ.get("KAFKA_BROKERS"):
        forgotten += [name for name in ours if name.startswith(("KAFKA_SECURITY_", "KAFKA_SASL_", "KAFKA_SSL_"))]
    if not environ.get("DATABASE_URL"):
        forgotten += set(environ) - set(without_libpq(environ))
    for name in forgotten:
        environ.pop(name, None)


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


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # a terminal that closed while all goes on to its orderly end
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
