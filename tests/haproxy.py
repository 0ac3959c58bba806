"""Debian's haproxy with ops/haproxy.cfg, as a service for tests."""

from __future__ import annotations

import csv
import io
import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from server.embedded import ADDRESS, Service, free_port
from tests.services import ROOT, UnavailableError, listens

UNPACKED = ROOT / ".cache/haproxy/usr"


class HAProxy(Service):
    """ops/haproxy.cfg with only its addresses replaced, in front of two servers; `instead` replaces other lines."""

    def __init__(
        self, directory: Path, upstream_ports: Sequence[int], instead: Mapping[str, str] | None = None
    ) -> None:
        # Debian keeps it out of the PATH of ordinary users; scripts/setup.sh unpacks it into the cache.
        places = ["/usr/sbin", "/usr/local/sbin", str(UNPACKED / "sbin")]
        binary = shutil.which("haproxy", path=os.pathsep.join([os.environ.get("PATH", os.defpath), *places]))
        if binary is None:
            raise UnavailableError("there is no haproxy here: scripts/setup.sh fetches it where there is apt-get")
        self.port = free_port()
        self._config = directory / f"haproxy-{self.port}.cfg"
        self._socket = directory / f"haproxy-{self.port}.sock"
        self._upstream_ports = upstream_ports
        self._instead = instead or {}
        libraries = os.pathsep.join(map(str, UNPACKED.glob("lib/*-linux-gnu")))
        argv = ["env", f"LD_LIBRARY_PATH={libraries}", binary, "-db", "-f", str(self._config)]
        super().__init__("haproxy", argv, log=directory / f"haproxy-{self.port}.log")

    def prepare(self) -> None:
        """Write the configuration."""
        documented = (ROOT / "ops/haproxy.cfg").read_text()
        first, second = self._upstream_ports
        for written, here in {
            "127.0.0.1:8080": f"{ADDRESS}:{first}",
            "127.0.0.1:8081": f"{ADDRESS}:{second}",
            "bind 0.0.0.0:80": f"bind {ADDRESS}:{self.port}",
            **self._instead,
        }.items():
            assert written in documented
            documented = documented.replace(written, here)
        self._config.write_text(f"global\n    stats socket {self._socket}\n\n{documented}")

    def answers(self) -> bool:
        """Whether it listens."""
        return listens(self.port)

    def checks(self) -> dict[str, tuple[str, str, str]]:
        """(status, what the last check said, its HTTP status) of each server."""
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(5)
            control.connect(str(self._socket))
            control.sendall(b"show stat\n")
            text = b"".join(iter(lambda: control.recv(65_536), b"")).decode()
        rows = csv.DictReader(io.StringIO(text.removeprefix("# ")))
        servers = [row for row in rows if row["pxname"] == "scoreboard" and row["svname"] != "BACKEND"]
        return {row["svname"]: (row["status"], row["check_status"], row["check_code"]) for row in servers}
