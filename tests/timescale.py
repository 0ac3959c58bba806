"""A real TimescaleDB: Debian 13's PostgreSQL 17 with its extension (Apache edition), in a chroot of its own.

The chroot is made once and kept in `.cache/timescale`; it needs root, and a Debian whose apt reaches a mirror.
Nothing is installed outside of it. Knows no test.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import psycopg

from server.embedded import ADDRESS, Service, ServiceError, free_port
from tests.services import ROOT, UnavailableError

BUILD_WITHIN_S = 170
"""It takes 70 s here; where the network is slow, the other tests should not wait."""

_CACHE = ROOT / ".cache/timescale"
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_SUITE, _PACKAGE = "trixie", "postgresql-17-timescaledb"
_BIN = "/usr/lib/postgresql/17/bin"
_numbers = itertools.count(1)


class TimescaleServer(Service):
    """PostgreSQL with TimescaleDB loaded: TCP on 127.0.0.1, no password; its data is gone with `remove`."""

    def __init__(self, log: Path, options: Mapping[str, str] | None = None) -> None:
        """`options` are settings of PostgreSQL, for which the tests have others."""
        self.port = free_port()
        self._root = chroot()
        self._inside = f"/srv/cluster-{os.getpid()}-{next(_numbers)}"
        settings = {
            "listen_addresses": ADDRESS,
            "port": str(self.port),
            "unix_socket_directories": "",
            "dynamic_shared_memory_type": "mmap",  # there is no /dev/shm in the chroot
            "shared_preload_libraries": "timescaledb",
            "timescaledb.telemetry_level": "off",
            "max_connections": "200",
            "fsync": "off",
        } | dict(options or {})
        argv = [*self._as_postgres(), f"{_BIN}/postgres", "-D", self._inside]
        for name, value in settings.items():
            argv += ["-c", f"{name}={value}"]
        super().__init__("TimescaleDB", argv, log=log)
        self.stop_signal = signal.SIGINT  # "fast": does not wait for clients to leave, as SIGTERM does

    def url_of(self, database: str) -> str:
        """Where to connect, as a superuser."""
        return f"postgresql://postgres@{ADDRESS}:{self.port}/{database}"

    def prepare(self) -> None:
        """Make the cluster at the first start."""
        data = Path(f"{self._root}{self._inside}")
        if data.exists():
            return
        data.mkdir(mode=0o700)
        passwd = Path(self._root, "etc/passwd").read_text().splitlines()
        _, _, uid, gid, *_ = next(line for line in passwd if line.startswith("postgres:")).split(":")
        os.chown(data, int(uid), int(gid))
        initdb = [f"{_BIN}/initdb", "-D", self._inside, "--username=postgres", "--auth=trust", "--encoding=UTF8"]
        # Debian's build has ICU, and the chroot no locale of libc: any but C will do.
        argv = [*self._as_postgres(), *initdb, "--locale-provider=icu", "--icu-locale=en-US", "--no-sync"]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ServiceError(f"initdb failed in the chroot:\n{(done.stdout + done.stderr)[-2000:]}")

    def answers(self) -> bool:
        """Whether it accepts connections."""
        try:
            psycopg.connect(self.url_of("postgres"), connect_timeout=1).close()
        except psycopg.OperationalError:
            return False
        return True

    def remove(self) -> None:
        """Stop it and delete its data."""
        self.stop()
        shutil.rmtree(f"{self._root}{self._inside}", ignore_errors=True)

    def _as_postgres(self) -> list[str]:
        # The kernel forgets whose end ends the process when it changes its user, so it is told once more behind that.
        user = ["--reuid=postgres", "--regid=postgres", "--clear-groups", "--pdeathsig=INT"]
        return ["chroot", str(self._root), "setpriv", *user]


def chroot() -> Path:
    """The root of a Debian with TimescaleDB in it, made the first time.

    Raises UnavailableError where that cannot be done, saying why.
    """
    root = _CACHE / "root"
    if os.geteuid() != 0:
        raise UnavailableError("TimescaleDB runs in a chroot, and only root can make one")
    _CACHE.mkdir(parents=True, exist_ok=True)
    with (_CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs in one tree make it once
        if not root.exists():
            with tempfile.TemporaryDirectory(dir=_CACHE, ignore_cleanup_errors=True) as scratch:
                _build(Path(scratch))
                Path(scratch, "root").rename(root)
    return root


def _build(scratch: Path) -> None:
    if not shutil.which("apt-get") or not _KEYRING.exists():
        raise UnavailableError("TimescaleDB comes from Debian's packages, and this is no Debian")
    mirror = _mirror()
    debootstrap, env = _debootstrap(scratch)
    argv = [debootstrap, "--variant=minbase", f"--include={_PACKAGE}", _SUITE, str(scratch / "root"), mirror]
    _run(argv, "a Debian with TimescaleDB could not be installed", env)


def _mirror() -> str:
    """Where this machine's apt gets Debian from."""
    for attempt in range(2):
        listed = _run(["apt-get", "indextargets", "--format", "$(LABEL)|$(REPO_URI)"], "apt names no mirror")
        for line in listed.splitlines():
            label, _, uri = line.partition("|")
            if label == "Debian":
                return uri
        if attempt == 0:  # a fresh machine's apt knows of no mirror what it has
            _run(["apt-get", "update", "-qq"], "apt reaches no mirror")
    raise UnavailableError("TimescaleDB comes from Debian's packages, and apt has no mirror of Debian here")


def _debootstrap(scratch: Path) -> tuple[str, Mapping[str, str]]:
    """The program, unpacked here where it is not installed, and the environment that it runs in."""
    proxy = _run(["apt-config", "shell", "http_proxy", "Acquire::http::Proxy"], "apt-config fails")
    env = {**os.environ, **({"http_proxy": proxy.split("'")[1]} if "'" in proxy else {})}
    found = shutil.which("debootstrap")
    if found:
        return found, env
    _run(["apt-get", "download", "debootstrap"], "there is no debootstrap, and apt cannot get it", cwd=scratch)
    (package,) = scratch.glob("debootstrap_*.deb")
    _run(["dpkg", "-x", str(package), str(scratch / "tool")], "debootstrap cannot be unpacked")
    return str(scratch / "tool/usr/sbin/debootstrap"), {
        **env,
        "DEBOOTSTRAP_DIR": f"{scratch}/tool/usr/share/debootstrap",
    }


def _run(argv: Sequence[str], failed: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    # A session of its own, so that what a program has started ends with it.
    process = subprocess.Popen(
        argv, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        said, _ = process.communicate(timeout=BUILD_WITHIN_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise UnavailableError(f"{failed}: it took longer than {BUILD_WITHIN_S} s") from None
    if process.returncode != 0:
        raise UnavailableError(f"{failed}: {said.strip()[-300:]}")
    return said
