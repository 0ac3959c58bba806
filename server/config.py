"""Settings: the one place that reads the environment.

Each setting has its variable, its parser, its default and the reason for that default. All of them are
checked before anything starts, and what is wrong is said for every variable at once.
"""

from __future__ import annotations

import base64
import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Literal

from server.contradictions import contradictions
from server.errors import ConfigError
from server.parsers import (
    DEAD_LETTER_SUFFIX,
    MIN_SECRET_BYTES,
    algorithms,
    around,
    boards,
    brokers,
    database_url,
    integer,
    networks,
    one_of,
    origin_of,
    origins,
    own_host,
    public_key,
    rate,
    redis_hosts,
    secret,
    shown,
    text,
    topic,
)

OTHER_FILES: Final = 1100
"""Open files of a server that are no WebSocket: HTTP connections at the busiest, stores, libraries."""


def _setting(
    variable: str,
    parse: Callable[[str], Any],
    default: Any,
    why: str,
    *,
    secret: bool = False,
    beside_secret: bool = False,
    lines: bool = False,
) -> Any:
    """`beside_secret`: see `server.parsers.shown`. `lines`: the value may have several, and ends with a line end."""
    metadata = {
        "variable": variable,
        "parse": parse,
        "why": why,
        "secret": secret,
        "beside_secret": beside_secret,
        "lines": lines,
    }
    return dataclasses.field(default=default, metadata=metadata, repr=not secret)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything the environment decides; see `describe` for the table that the README shows."""

    host: str = _setting("HOST", own_host, "127.0.0.1", "address to listen on; the container image sets 0.0.0.0")
    port: int = _setting("PORT", integer(0, 65535), 8080, "port to listen on; 0 takes a free one and logs it")
    workers: int = _setting("WORKERS", integer(1, 256), 1, "server processes that share the port, each on a core")
    drain_delay_ms: int = _setting(
        "DRAIN_DELAY_MS",
        integer(0, 600_000),
        0,
        "how long to serve on after SIGTERM, while /readyz says 503; longer than a proxy keeps idle connections",
    )
    boards: tuple[str, ...] = _setting("BOARDS", boards, ("main",), "the boards there are; another is 404")
    cors_origins: tuple[str, ...] = _setting(
        "CORS_ORIGINS", origins, ("*",), "who may call from a browser; tokens travel in a header, never in cookies"
    )
    request_deadline_ms: int = _setting(
        "REQUEST_DEADLINE_MS", integer(50, 60_000), 2000, "longest a request waits for Redis before its 503"
    )

    jwt_secret: bytes | None = _setting("JWT_SECRET", secret, None, "key of HS tokens, at least 32 bytes", secret=True)
    jwt_secret_file: str = _setting("JWT_SECRET_FILE", text, "", "file that holds JWT_SECRET instead")
    jwt_secret_previous: bytes | None = _setting(
        "JWT_SECRET_PREVIOUS", secret, None, "still accepted while tokens are rotated", secret=True
    )
    jwt_algorithms: tuple[str, ...] = _setting(
        "JWT_ALGORITHMS", algorithms, ("HS256",), "allowed signatures; the token never chooses"
    )
    jwt_public_key: str = _setting(
        "JWT_PUBLIC_KEY", public_key, "", "key of RS and ES tokens, or its certificate: PEM or base64", lines=True
    )
    jwt_public_key_file: str = _setting("JWT_PUBLIC_KEY_FILE", text, "", "file that holds JWT_PUBLIC_KEY instead")
    jwt_jwks_file: str = _setting(
        "JWT_JWKS_FILE", text, "", "JWK set of RS and ES tokens, chosen by `kid`; read again when it changes"
    )
    jwt_audience: str = _setting("JWT_AUDIENCE", text, "", "required `aud`; unset: not looked at")
    jwt_issuer: str = _setting("JWT_ISSUER", text, "", "required `iss`; unset: not looked at")
    jwt_leeway_s: int = _setting(
        "JWT_LEEWAY_S", integer(0, 3600), 30, "clock difference forgiven in `nbf` and `iat`; none in `exp`"
    )
    write_policy: Literal["own", "any"] = _setting(
        "WRITE_POLICY",
        one_of("own", "any"),
        "own",
        "own: `sub` is the player, or scope scores:write; any: every token",
    )

    rate_limit_per_second: float = _setting(
        "RATE_LIMIT_PER_SECOND", rate, 20.0, "updates a subject may make; 0 switches it off, for load tests"
    )
    rate_limit_burst: int = _setting(
        "RATE_LIMIT_BURST", integer(1, 1_000_000), 40, "updates at once before the rate counts"
    )
    rate_limit_by: Literal["user", "ip"] = _setting(
        "RATE_LIMIT_BY", one_of("user", "ip"), "user", "whom the limit counts: the token's subject or the address"
    )
    rate_limit_writers_per_second: float = _setting(
        "RATE_LIMIT_WRITERS_PER_SECOND", rate, 0.0, "the same for tokens with scope scores:write (game servers)"
    )
    rate_limit_writers_burst: int = _setting(
        "RATE_LIMIT_WRITERS_BURST", integer(1, 1_000_000), 1000, "the same for tokens with scope scores:write"
    )
    idempotency_ttl_s: int = _setting(
        "IDEMPOTENCY_TTL_S", integer(60, 2_592_000), 86_400, "how long an answer is kept for its Idempotency-Key"
    )
    idempotency_max_per_subject: int = _setting(
        "IDEMPOTENCY_MAX_PER_SUBJECT",
        integer(0, 1_000_000_000),
        100_000,
        "answers kept for one player's tokens, at 230 bytes each; game servers have no limit; 0: nobody has",
    )
    idempotency_restore_s: int = _setting(
        "IDEMPOTENCY_RESTORE_S",
        integer(0, 2_592_000),
        900,
        "answers younger than this are known again after a rebuild: how long clients go on retrying",
    )
    auth_failures_per_minute: int = _setting(
        "AUTH_FAILURES_PER_MINUTE", integer(0, 1_000_000), 60, "bad tokens an address may send before 429; 0: no limit"
    )
    trusted_proxies: tuple[str, ...] = _setting(
        "TRUSTED_PROXIES", networks, (), "addresses or networks whose X-Forwarded-For counts"
    )

    redis_host: str = _setting(
        "REDIS_HOST", redis_hosts, "127.0.0.1", "Redis 7.0 or newer, or Valkey", beside_secret=True
    )
    redis_port: int = _setting("REDIS_PORT", integer(1, 65535), 6379, "", beside_secret=True)
    redis_password: str = _setting("REDIS_PASSWORD", text, "", "", secret=True)
    redis_password_file: str = _setting("REDIS_PASSWORD_FILE", text, "", "file that holds REDIS_PASSWORD instead")
    redis_username: str = _setting(
        "REDIS_USERNAME", text, "", "ACL user, see ops/redis-acl.conf; unset: `default`", beside_secret=True
    )
    redis_tls: int = _setting("REDIS_TLS", integer(0, 1), 0, "1: encrypted, and the host name is verified")
    redis_tls_ca_file: str = _setting("REDIS_TLS_CA_FILE", text, "", "PEM; unset: the authorities of the system")
    redis_tls_cert_file: str = _setting("REDIS_TLS_CERT_FILE", text, "", "PEM, where Redis asks for a certificate")
    redis_tls_key_file: str = _setting("REDIS_TLS_KEY_FILE", text, "", "PEM, its key, without a passphrase")
    redis_cluster: int = _setting(
        "REDIS_CLUSTER", integer(0, 1), 0, "1: a Redis Cluster; REDIS_HOST then names some of its nodes, host:port,…"
    )
    redis_key_prefix: str = _setting("REDIS_KEY_PREFIX", text, "", "put before every key, to share a Redis")
    outbox_max_bytes: int = _setting(
        "OUTBOX_MAX_BYTES", integer(1_000_000, 2**40), 2**30, "outbox size above which updates get 503"
    )

    kafka_brokers: str = _setting(
        "KAFKA_BROKERS", brokers, "127.0.0.1:9092", "host:port, separated by commas", beside_secret=True
    )
    kafka_security_protocol: str = _setting(
        "KAFKA_SECURITY_PROTOCOL",
        one_of("plaintext", "ssl", "sasl_plaintext", "sasl_ssl"),
        "plaintext",
        "ssl encrypts, and the host name is verified; sasl logs in",
    )
    kafka_sasl_mechanism: str = _setting(
        "KAFKA_SASL_MECHANISM",
        one_of("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"),
        "SCRAM-SHA-512",
        "PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512",
    )
    kafka_sasl_username: str = _setting("KAFKA_SASL_USERNAME", text, "", "", beside_secret=True)
    kafka_sasl_password: str = _setting("KAFKA_SASL_PASSWORD", text, "", "", secret=True)
    kafka_ssl_ca_file: str = _setting("KAFKA_SSL_CA_FILE", text, "", "PEM; unset: the authorities of the system")
    kafka_topic: str = _setting("KAFKA_TOPIC", topic, "score-updates", "dead letters go to {topic}.dead-letter")
    kafka_partitions: int = _setting("KAFKA_PARTITIONS", integer(1, 1024), 8, "when the topic is created")
    kafka_replication: int = _setting("KAFKA_REPLICATION", integer(1, 16), 1, "when the topic is created")
    kafka_retention_hours: int = _setting(
        "KAFKA_RETENTION_HOURS", integer(1, 87_600), 168, "when the topic is created: what a rebuild can look back on"
    )
    relay_ahead_bytes: int = _setting(
        "RELAY_AHEAD_BYTES",
        integer(0, 2**40),
        0,
        "how much the relay puts into Kafka before it is stored, for a broker that forgets; 0: no limit; `dev` sets it",
    )
    kafka_fetch_wait_ms: int = _setting(
        "KAFKA_FETCH_WAIT_MS",
        integer(1, 10_000),
        100,
        "how long a broker holds an empty fetch; a record ends it, except in the broker of `dev`, which sets 10",
    )

    database_url: str = _setting(
        "DATABASE_URL",
        database_url,
        "postgresql://127.0.0.1:5432/scoreboard",
        "PostgreSQL 14 or newer, or TimescaleDB; all of libpq's parameters count, such as sslmode",
        secret=True,
    )
    history_days: int = _setting(
        "HISTORY_DAYS", integer(0, 36_500), 30, "how long the database keeps each event, at 200 bytes; 0: for ever"
    )

    live_interval_ms: int = _setting(
        "LIVE_INTERVAL_MS", integer(1, 10_000), 16, "how long changes gather: one frame of a 60 Hz screen"
    )
    live_high_water_bytes: int = _setting(
        "LIVE_HIGH_WATER_BYTES", integer(4096, 2**30), 65_536, "buffered bytes that make a connection lagging"
    )
    live_max_connections: int = _setting(
        "LIVE_MAX_CONNECTIONS",
        integer(0, 10_000_000),
        20_000,
        "most WebSockets of one server, at about 6 KB each; each takes a file descriptor; 0: no limit",
    )
    live_max_per_ip: int = _setting(
        "LIVE_MAX_PER_IP",
        integer(0, 10_000_000),
        1000,
        "most WebSockets from one address (IPv6: one /64) that bring no valid token; 0: no limit",
    )

    new_topic: Literal["refuse", "restart"] = _setting(
        "KAFKA_NEW_TOPIC",
        one_of("refuse", "restart"),
        "refuse",
        "offsets of a topic that was made anew: refuse them, or start over (what `dev` does)",
    )

    metrics_host: str = _setting("METRICS_HOST", own_host, "127.0.0.1", "address of the three ports of metrics below")
    metrics_port: int = _setting(
        "METRICS_PORT", integer(0, 65535), 0, "the server's /metrics, worker n's on METRICS_PORT + n - 1; 0: on PORT"
    )
    relay_metrics_port: int = _setting("RELAY_METRICS_PORT", integer(0, 65535), 0, "the relay's metrics; 0: none")
    persister_metrics_port: int = _setting(
        "PERSISTER_METRICS_PORT", integer(0, 65535), 0, "the persister's metrics; 0: none"
    )
    log_format: Literal["auto", "json", "text"] = _setting(
        "LOG_FORMAT", one_of("auto", "json", "text"), "auto", "auto: text on a terminal, else a JSON object a line"
    )
    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        "LOG_LEVEL", one_of("debug", "info", "warning", "error"), "info", "the least that is logged"
    )
    slow_request_ms: int = _setting(
        "SLOW_REQUEST_MS",
        integer(0, 3_600_000),
        500,
        "an answer that took longer is logged, with its parts; 0: none",
    )

    @property
    def slow_request_s(self) -> float:
        """What an answer may take before it is logged."""
        return self.slow_request_ms / 1000 or math.inf

    @property
    def dead_letter_topic(self) -> str:
        """Where records go that cannot be stored."""
        return self.kafka_topic + DEAD_LETTER_SUFFIX


def describe() -> list[tuple[str, str, str]]:
    """(variable, default, why) of every setting; no default is a secret."""
    rows = []
    for field in dataclasses.fields(Settings):
        default = field.default
        if isinstance(default, tuple):
            default = ",".join(default)
        elif isinstance(default, float):
            default = f"{default:g}"
        rows.append((field.metadata["variable"], "" if default is None else str(default), field.metadata["why"]))
    return rows


def load(environ: Mapping[str, str] = os.environ) -> Settings:
    """Settings from the environment; an empty variable counts as unset.

    Raises ConfigError, which names each wrong variable, its value (unless secret) and what was expected.
    """
    values: dict[str, Any] = {}
    faults: list[str] = []
    for field in dataclasses.fields(Settings):
        variable, about = field.metadata["variable"], field.metadata
        raw = environ.get(variable, "")
        if not raw:
            continue
        try:
            values[field.name] = _parse(raw, about)
        except ValueError as error:
            value = shown(raw, secret=about["secret"], beside_secret=about["beside_secret"])
            faults.append(f"{variable}: expected {error}, got {value}{origin_of(raw)}")
    for name in _IN_FILES:
        faults += _take_from_file(name, values)
    settings = Settings(**values)
    # Only what is right by itself can be compared: a wrong password is not a missing one.
    faults = faults or contradictions(settings, frozenset(values))
    if faults:
        raise ConfigError("\n".join(faults))
    return settings


def _parse(raw: str, about: Mapping[str, Any]) -> Any:
    if about["lines"]:
        raw = raw.strip()
    unmeant = around(raw, secret=about["secret"])
    if unmeant:
        raise ValueError(f"no {unmeant}")
    if not raw.isascii() and any("\ud800" <= character <= "\udfff" for character in raw):
        raise ValueError("text in UTF-8")  # what os.environ makes of other bytes
    return about["parse"](raw)


_IN_FILES: Final = {
    "jwt_secret": f"{MIN_SECRET_BYTES} bytes or more",
    "jwt_public_key": "a public key or a certificate",
    "redis_password": "a password",
}
"""What the file that `{name}_file` names has to hold, in words."""

_LONGEST_FILE: Final = 65_536


def _take_from_file(name: str, values: dict[str, Any]) -> list[str]:
    """Put what the file holds into `values`; returns the faults, which repeat nothing of it."""
    path, variable = values.get(f"{name}_file"), f"{name.upper()}_FILE"
    if not path:
        return []
    about = Settings.__dataclass_fields__[name].metadata
    content = ""
    try:
        content = _read(Path(path), binary=about["lines"])
        found = _parse(content, about)
    except OSError as error:
        # People put the secret itself where its file's name belongs: only what looks like a file's name is shown.
        value = shown(path, secret=not _is_in_directory(Path(path)))
        return [f"{variable}: expected a file with {_IN_FILES[name]}: {error.strerror}, got {value}"]
    except ValueError as error:
        size = f"{len(content)} characters" if content else "none"
        return [f"{variable}: expected a file with {_IN_FILES[name]}: expected {error}, got {size}"]
    if values.get(name, found) != found:
        return [f"{name.upper()}, {variable}: expected one of them, got two that differ"]
    values[name] = found
    return []


def _is_in_directory(path: Path) -> bool:
    try:
        return path.parent not in (Path(), Path("/")) and path.parent.is_dir()
    except OSError:  # a name that is too long
        return False


def _read(path: Path, *, binary: bool) -> str:
    """The file's text without the line ends behind it; base64 of what is no text, if it may be `binary`.

    Raises OSError, or ValueError.
    """
    with path.open("rb") as file:
        content = file.read(_LONGEST_FILE + 1)
    if len(content) > _LONGEST_FILE:
        raise ValueError(f"at most {_LONGEST_FILE} bytes")
    try:
        found = content.decode().rstrip("\r\n")
    except UnicodeDecodeError:
        if not binary:
            raise ValueError("text in UTF-8") from None
        found = base64.b64encode(content).decode()
    if not found:
        raise ValueError("one that is not empty")
    return found
