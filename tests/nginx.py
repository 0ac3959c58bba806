"""Debian's nginx with ops/nginx.conf, or with a few lines of a test, as a service for tests."""

from __future__ import annotations

import datetime
import os
import shutil
import socket
import ssl
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from server.embedded import ADDRESS, Service, free_port
from tests.services import ROOT, UnavailableError, listens

HOST = "scoreboard.example.org"


class Nginx(Service):
    """ops/nginx.conf with only its addresses and the certificate's place replaced, in front of two servers."""

    def __init__(self, directory: Path, upstream_ports: Sequence[int]) -> None:
        # Debian keeps it out of the PATH of ordinary users; scripts/setup.sh unpacks it into the cache.
        places = ["/usr/sbin", "/usr/local/sbin", str(ROOT / ".cache/nginx/usr/sbin")]
        binary = shutil.which("nginx", path=os.pathsep.join([os.environ.get("PATH", os.defpath), *places]))
        if binary is None:
            raise UnavailableError("there is no nginx here: scripts/setup.sh fetches it where there is apt-get")
        self.port = free_port()
        self.directory = directory
        self._upstream_ports = upstream_ports
        argv = [binary, "-p", str(directory), "-e", str(directory / "error.log"), "-c", str(directory / "main.conf")]
        super().__init__("nginx", argv, log=directory / "nginx.log")

    def prepare(self) -> None:
        """Write the certificate and the configuration."""
        (self.directory / "scoreboard.conf").write_text(self.configuration())
        user = "user root;" if os.getuid() == 0 else ""  # else its workers could not write here
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        scratch = " ".join(f"{kind}_temp_path {self.directory}/{kind};" for kind in kinds)
        (self.directory / "main.conf").write_text(
            f"{user} daemon off; worker_processes 2; pid {self.directory}/nginx.pid;\n"
            f"error_log {self.directory}/error.log;\n"
            f"events {{ worker_connections 1024; }}\n"
            f"http {{ access_log {self.directory}/access.log; {scratch} include {self.directory}/scoreboard.conf; }}\n"
        )

    def configuration(self) -> str:
        """What stands within `http { }`."""
        _write_certificate(self.directory)
        documented = (ROOT / "ops/nginx.conf").read_text()
        first, second = self._upstream_ports
        for written, here in (
            ("127.0.0.1:8080", f"{ADDRESS}:{first}"),
            ("127.0.0.1:8081", f"{ADDRESS}:{second}"),
            ("listen 443 ", f"listen {ADDRESS}:{self.port} "),
            ("/etc/nginx/scoreboard.", f"{self.directory}/scoreboard."),
        ):
            assert written in documented
            documented = documented.replace(written, here)
        return documented

    def answers(self) -> bool:
        """Whether it takes TLS."""
        try:
            with socket.create_connection((ADDRESS, self.port), timeout=1) as plain:
                self.trust().wrap_socket(plain, server_hostname=HOST).close()
        except OSError:
            return False
        return True

    def trust(self) -> ssl.SSLContext:
        """What a client needs to believe its certificate."""
        return ssl.create_default_context(cafile=self.directory / "scoreboard.crt")

    @property
    def errors(self) -> str:
        """What its error log says."""
        return (self.directory / "error.log").read_text()


class PlainNginx(Nginx):
    """One server without TLS, of `lines` that stand within `server { }`."""

    def __init__(self, directory: Path, lines: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        super().__init__(directory, ())
        self._lines = lines

    def configuration(self) -> str:
        """The server and its lines."""
        return f"server {{ listen {ADDRESS}:{self.port}; {self._lines} }}"

    def answers(self) -> bool:
        """Whether it takes connections."""
        return listens(self.port)


def _write_certificate(directory: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, HOST)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (directory / "scoreboard.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    unencrypted = serialization.NoEncryption()
    pkcs8 = serialization.PrivateFormat.PKCS8
    (directory / "scoreboard.key").write_bytes(key.private_bytes(serialization.Encoding.PEM, pkcs8, unencrypted))
