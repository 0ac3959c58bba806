"""Settings that are each right and do not fit together: rather no start than one that was not meant so.

A fault is one sentence: the variables, what was expected and what came. Files are opened only to see whether they can
be used.
"""

from __future__ import annotations

import ipaddress
import itertools
import os
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psycopg.conninfo

from server.parsers import shown, words

if TYPE_CHECKING:
    from server.config import Settings

LONGEST_WINDOW_S: Final = 30 * 24 * 3600
"""Longest memory of a rate limit: Redis keeps a subject for as long."""

_ANY_ADDRESS: Final = ("0.0.0.0", "::")  # noqa: S104 (compared with, not listened on)
_REDIS_FILES: Final = ("redis_tls_ca_file", "redis_tls_cert_file", "redis_tls_key_file")


def contradictions(settings: Settings, given: frozenset[str]) -> list[str]:
    """Every fault of settings that were parsed; `given` names those that the environment has."""
    return [
        *_unreadable(settings),
        *_of_tokens(settings, given),
        *_of_limits(settings),
        *_of_redis(settings),
        *_of_kafka(settings),
        *_of_database(settings),
        *_of_ports(settings, given),
    ]


def _unreadable(settings: Settings) -> list[str]:
    names = [name for name in (*_REDIS_FILES, "kafka_ssl_ca_file") if getattr(settings, name)]
    return [
        f"{name.upper()}: expected a file that can be read, got {shown(getattr(settings, name))}"
        for name in names
        if not _is_readable(getattr(settings, name))
    ]


def _is_readable(path: str) -> bool:
    try:
        return Path(path).is_file() and os.access(path, os.R_OK)
    except OSError:  # a name that is too long, such as the file's content in its place
        return False


def _of_tokens(settings: Settings, given: frozenset[str]) -> list[str]:
    faults = []
    if settings.jwt_secret_previous and not settings.jwt_secret:
        faults.append("JWT_SECRET_PREVIOUS: expected JWT_SECRET beside it")
    if all(name.startswith("HS") for name in settings.jwt_algorithms):
        faults += [
            f"{name.upper()}: expected an RS or ES algorithm in JWT_ALGORITHMS beside it, got "
            + ",".join(settings.jwt_algorithms)
            for name in ("jwt_public_key", "jwt_public_key_file", "jwt_jwks_file")
            if name in given and not (name == "jwt_public_key" and "jwt_public_key_file" in given)
        ]
    return faults


def _of_limits(settings: Settings) -> list[str]:
    faults = []
    for kind in ("", "WRITERS_"):
        rate = getattr(settings, f"rate_limit_{kind.lower()}per_second")
        burst = getattr(settings, f"rate_limit_{kind.lower()}burst")
        if rate and burst / rate > LONGEST_WINDOW_S:
            most = int(rate * LONGEST_WINDOW_S)
            faults.append(
                f"RATE_LIMIT_{kind}BURST: expected at most {most}, 30 days of RATE_LIMIT_{kind}PER_SECOND={rate:g}, "
                f"got {burst}"
            )
    return faults


def _of_redis(settings: Settings) -> list[str]:
    """What was meant to protect the connection, and would not, is a fault too."""
    files = [name for name in _REDIS_FILES if getattr(settings, name)]
    ca, cert, key = (getattr(settings, name) for name in _REDIS_FILES)
    faults = []
    if not settings.redis_tls:
        faults += [f"{name.upper()}: expected REDIS_TLS=1 beside it" for name in files]
    if bool(cert) != bool(key):
        faults.append("REDIS_TLS_CERT_FILE, REDIS_TLS_KEY_FILE: expected both or none")
    elif settings.redis_tls:
        faults += _not_certificates("REDIS_TLS_CA_FILE", ca)
        faults += _no_pair(cert, key)
    if settings.redis_username and not settings.redis_password:
        faults.append("REDIS_USERNAME: expected REDIS_PASSWORD beside it")
    if settings.redis_cluster and set(settings.redis_key_prefix) & set("{}"):
        prefix = settings.redis_key_prefix
        faults.append(f"REDIS_KEY_PREFIX: expected no braces with REDIS_CLUSTER=1, got {prefix!r}")
    if not settings.redis_cluster and not _is_one_host(settings.redis_host):
        faults.append(
            f"REDIS_HOST: expected one host without a port (REDIS_PORT) or brackets, unless REDIS_CLUSTER=1, "
            f"got {shown(settings.redis_host)}"
        )
    return faults


def _is_one_host(host: str) -> bool:
    return len(words(host)) == 1 and "," not in host and "[" not in host and host.count(":") != 1


def _not_certificates(variable: str, path: str) -> list[str]:
    if path and _is_readable(path):
        try:
            ssl.create_default_context(cafile=path)
        except (ssl.SSLError, ValueError):
            return [f"{variable}: expected a PEM file with certificates, got {path!r}, which has none"]
    return []


def _no_pair(cert: str, key: str) -> list[str]:
    if not cert or not _is_readable(cert) or not _is_readable(key):
        return []
    try:
        # Without a password given, OpenSSL would ask the terminal for that of an encrypted key.
        ssl.create_default_context().load_cert_chain(cert, key, password="")
    except (ssl.SSLError, ValueError):
        expected = "expected a certificate and its key, both PEM, the key without a passphrase"
        return [f"REDIS_TLS_CERT_FILE, REDIS_TLS_KEY_FILE: {expected}, got {cert!r} and {key!r}"]
    return []


def _of_kafka(settings: Settings) -> list[str]:
    faults = []
    encrypts = settings.kafka_security_protocol in ("ssl", "sasl_ssl")
    logs_in = settings.kafka_security_protocol in ("sasl_plaintext", "sasl_ssl")
    username, password = settings.kafka_sasl_username, settings.kafka_sasl_password
    if settings.kafka_ssl_ca_file and not encrypts:
        faults.append("KAFKA_SSL_CA_FILE: expected KAFKA_SECURITY_PROTOCOL=ssl or sasl_ssl beside it")
    if encrypts:
        faults += _not_certificates("KAFKA_SSL_CA_FILE", settings.kafka_ssl_ca_file)
    if logs_in and not (username and password):
        faults.append("KAFKA_SECURITY_PROTOCOL: expected KAFKA_SASL_USERNAME and KAFKA_SASL_PASSWORD beside sasl")
    if (username or password) and not logs_in:
        faults.append("KAFKA_SASL_USERNAME, KAFKA_SASL_PASSWORD: expected KAFKA_SECURITY_PROTOCOL=sasl_ssl beside them")
    elif settings.kafka_sasl_mechanism != type(settings)().kafka_sasl_mechanism and not logs_in:
        faults.append("KAFKA_SASL_MECHANISM: expected KAFKA_SECURITY_PROTOCOL=sasl_ssl beside it")
    return faults


def _of_database(settings: Settings) -> list[str]:
    parts = psycopg.conninfo.conninfo_to_dict(settings.database_url)
    files = {name: str(parts[name]) for name in ("sslrootcert", "sslcert", "sslkey") if parts.get(name)}
    if files.get("sslrootcert") == "system":  # libpq: the authorities that the system trusts
        del files["sslrootcert"]
    return [
        f"DATABASE_URL: expected {name} to be a file that can be read, got {shown(path)}"
        for name, path in files.items()
        if not _is_readable(path)
    ]


def _of_ports(settings: Settings, given: frozenset[str]) -> list[str]:
    """Ports that do not exist, or that two parts would listen on."""
    faults = []
    last = settings.metrics_port + settings.workers - 1
    if settings.metrics_port and last > 65535:
        faults.append(
            f"METRICS_PORT: expected at most {65536 - settings.workers} with WORKERS={settings.workers}, "
            f"for each has one of its own, got {settings.metrics_port}"
        )
    listeners = [
        ("PORT", settings.host, range(settings.port, settings.port + 1)),
        ("METRICS_PORT", settings.metrics_host, range(settings.metrics_port, last + 1)),
        *(
            (f"{part}_METRICS_PORT", settings.metrics_host, range(port, port + 1))
            for part, port in (("RELAY", settings.relay_metrics_port), ("PERSISTER", settings.persister_metrics_port))
        ),
    ]
    used = [listener for listener in listeners if listener[2].start]
    for (one, host, ports), (other, other_host, other_ports) in itertools.combinations(used, 2):
        if one == "PORT" and other != "METRICS_PORT" and "port" not in given:
            continue  # relay and persister may run without a server, whose port nobody has chosen then
        shared = range(max(ports.start, other_ports.start), min(ports.stop, other_ports.stop))
        if shared and _meet(host, other_host):
            several = f" (WORKERS={settings.workers} take {settings.metrics_port} to {last})"
            among = several if settings.workers > 1 and "METRICS_PORT" in (one, other) else ""
            faults.append(f"{one}, {other}: expected different ports, got {shared.start} for both{among}")
    return faults


def _meet(host: str, other: str) -> bool:
    """Whether the same port of both may be one and the same; names are taken to be."""
    try:
        addresses = {ipaddress.ip_address(host), ipaddress.ip_address(other)}
    except ValueError:
        return True
    return len(addresses) == 1 or not {host, other}.isdisjoint(_ANY_ADDRESS)
