"""Debian's PgBouncer with its defaults but for transaction pooling, as a service for tests."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import psycopg

from server.embedded import ADDRESS, PostgresServer, Service, free_port
from tests.services import ROOT, UnavailableError

_UNPACKED = ROOT / ".cache/pgbouncer"


class PgBouncer(Service):
    """In front of one server: whoever connects is its superuser, and every database is there by its name."""

    def __init__(self, directory: Path, server: PostgresServer) -> None:
        # Debian keeps it out of the PATH of ordinary users; scripts/setup.sh unpacks it into the cache.
        places = [os.environ.get("PATH", os.defpath), "/usr/sbin", str(_UNPACKED / "usr/sbin")]
        binary = shutil.which("pgbouncer", path=os.pathsep.join(places))
        if binary is None:
            raise UnavailableError("there is no PgBouncer here: scripts/setup.sh fetches it where there is apt-get")
        self.port = free_port()
        self._server = server
        self._settings = directory / "pgbouncer.ini"
        libraries = os.pathsep.join(map(str, _UNPACKED.glob("usr/lib/*-linux-gnu")))
        env = {**os.environ, "LD_LIBRARY_PATH": libraries}
        super().__init__("PgBouncer", [binary, str(self._settings)], env, log=directory / "pgbouncer.log")

    def prepare(self) -> None:
        """Write the configuration."""
        user = "user = nobody\n" if os.getuid() == 0 else ""  # it refuses to be root
        self._settings.write_text(
            f"[databases]\n* = host={ADDRESS} port={self._server.port} user=postgres\n[pgbouncer]\n{user}"
            f"listen_addr = {ADDRESS}\nlisten_port = {self.port}\nunix_socket_dir =\nauth_type = any\n"
            "pool_mode = transaction\n"
        )

    def answers(self) -> bool:
        """Whether it leads to the server."""
        try:
            psycopg.connect(self.url_of("postgres"), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def url_of(self, database: str) -> str:
        """Where to connect, as a superuser."""
        return f"postgresql://postgres@{ADDRESS}:{self.port}/{database}"
