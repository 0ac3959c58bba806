"""Settings: the one place that reads the environment.

Each setting has its variable, its parser, its default and the reason for that default. All of them are
checked before anything starts, and what is wrong is said for every variable at once.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Literal

import psycopg.conninfo

from server.errors import ConfigError

MIN_SECRET_BYTES: Final = 32
"""HS256 takes keys of at least its hash's size (RFC 7518, section 3.2)."""

OTHER_FILES: Final = 1100
"""Open files of a server that are no WebSocket: HTTP connections at the busiest, stores, libraries."""

_BOARD = re.compile(r"[a-z0-9_-]{1,64}")


def _text(raw: str) -> str:
    return raw


def _secret(raw: str) -> bytes:
    if len(raw.encode()) < MIN_SECRET_BYTES:
        raise ValueError(f"at least {MIN_SECRET_BYTES} bytes")
    return raw.encode()


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(raw: str) -> int:
        try:
            value = int(raw)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise ValueError(f"an integer from {low} to {high}")
        return value

    return parse


def _rate(raw: str) -> float:
    try:
        value = float(raw)
    except ValueError:
        value = -1
    if not 0 <= value <= 1_000_000:
        raise ValueError("a number from 0 (off) to 1000000")
    return value


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(raw: str) -> str:
        if raw not in choices:
            raise ValueError("one of " + ", ".join(choices))
        return raw

    return parse


def _words(raw: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in raw.split(",") if word.strip())


def _boards(raw: str) -> tuple[str, ...]:
    names = _words(raw)
    if not names or not all(_BOARD.fullmatch(name) for name in names):
        raise ValueError("names of [a-z0-9_-]{1,64}, separated by commas")
    return names


_ALGORITHMS: Final = ("HS256", "HS384", "HS512", "RS256", "RS384", "RS512", "ES256", "ES384", "ES512")


def _algorithms(raw: str) -> tuple[str, ...]:
    names = _words(raw)
    if not names or not set(names) <= set(_ALGORITHMS):
        raise ValueError("some of " + ", ".join(_ALGORITHMS))
    return names


def _origins(raw: str) -> tuple[str, ...]:
    origins = _words(raw)
    if not all(origin == "*" or re.fullmatch(r"https?://[^/\s]+", origin) for origin in origins):
        raise ValueError("* or origins such as https://example.org, separated by commas")
    return origins


def _networks(raw: str) -> tuple[str, ...]:
    networks = _words(raw)
    try:
        for network in networks:
            ipaddress.ip_network(network, strict=False)
    except ValueError:
        raise ValueError("addresses or networks such as 10.0.0.0/8, separated by commas") from None
    return networks


def _brokers(raw: str) -> str:
    # Names, IPv4 and [IPv6] addresses.
    if not all(re.fullmatch(r"([\w.-]+|\[[\da-fA-F:.]+\]):\d{1,5}", broker) for broker in _words(raw) or ("",)):
        raise ValueError("host:port, separated by commas")
    return raw


def _database_url(raw: str) -> str:
    # What cannot be read here would be repeated, password and all, by whoever tries to connect with it.
    try:
        psycopg.conninfo.conninfo_to_dict(raw)
    except psycopg.Error:
        raise ValueError("a URL such as postgresql://user:password@host:5432/name, with % as %25") from None
    return raw


def _setting(variable: str, parse: Callable[[str], Any], default: Any, why: str, *, secret: bool = False) -> Any:
    metadata = {"variable": variable, "parse": parse, "why": why, "secret": secret}
    return dataclasses.field(default=default, metadata=metadata, repr=not secret)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything the environment decides; see `describe` for the table that the README shows."""

    host: str = _setting("HOST", _text, "127.0.0.1", "address to listen on; the container image sets 0.0.0.0")
    port: int = _setting("PORT", _integer(0, 65535), 8080, "port to listen on; 0 takes a free one and logs it")
    workers: int = _setting("WORKERS", _integer(1, 256), 1, "server processes that share the port, each on a core")
    drain_delay_ms: int = _setting(
        "DRAIN_DELAY_MS",
        _integer(0, 600_000),
        0,
        "how long to serve on after SIGTERM, while /readyz says 503; longer than a proxy keeps idle connections",
    )
    boards: tuple[str, ...] = _setting("BOARDS", _boards, ("main",), "the boards there are; another is 404")
    cors_origins: tuple[str, ...] = _setting(
        "CORS_ORIGINS", _origins, ("*",), "who may call from a browser; tokens travel in a header, never in cookies"
    )
    request_deadline_ms: int = _setting(
        "REQUEST_DEADLINE_MS", _integer(50, 60_000), 2000, "longest a request waits for Redis before its 503"
    )

    jwt_secret: bytes | None = _setting("JWT_SECRET", _secret, None, "key of HS tokens, at least 32 bytes", secret=True)
    jwt_secret_file: str = _setting("JWT_SECRET_FILE", _text, "", "file that holds JWT_SECRET instead")
    jwt_secret_previous: bytes | None = _setting(
        "JWT_SECRET_PREVIOUS", _secret, None, "still accepted while tokens are rotated", secret=True
    )
    jwt_algorithms: tuple[str, ...] = _setting(
        "JWT_ALGORITHMS", _algorithms, ("HS256",), "allowed signatures; the token never chooses"
    )
    jwt_public_key: str = _setting("JWT_PUBLIC_KEY", _text, "", "PEM key of RS and ES tokens")
    jwt_jwks_file: str = _setting("JWT_JWKS_FILE", _text, "", "JWK set of RS and ES tokens, chosen by `kid`")
    jwt_audience: str = _setting("JWT_AUDIENCE", _text, "", "required `aud`; unset: not looked at")
    jwt_issuer: str = _setting("JWT_ISSUER", _text, "", "required `iss`; unset: not looked at")
    jwt_leeway_s: int = _setting(
        "JWT_LEEWAY_S", _integer(0, 3600), 30, "clock difference forgiven in `nbf` and `iat`; none in `exp`"
    )
    write_policy: Literal["own", "any"] = _setting(
        "WRITE_POLICY",
        _one_of("own", "any"),
        "own",
        "own: `sub` is the player, or scope scores:write; any: every token",
    )

    rate_limit_per_second: float = _setting(
        "RATE_LIMIT_PER_SECOND", _rate, 20.0, "updates a subject may make; 0 switches it off, for load tests"
    )
    rate_limit_burst: int = _setting(
        "RATE_LIMIT_BURST", _integer(1, 1_000_000), 40, "updates at once before the rate counts"
    )
    rate_limit_by: Literal["user", "ip"] = _setting(
        "RATE_LIMIT_BY", _one_of("user", "ip"), "user", "whom the limit counts: the token's subject or the address"
    )
    rate_limit_writers_per_second: float = _setting(
        "RATE_LIMIT_WRITERS_PER_SECOND", _rate, 0.0, "the same for tokens with scope scores:write (game servers)"
    )
    rate_limit_writers_burst: int = _setting(
        "RATE_LIMIT_WRITERS_BURST", _integer(1, 1_000_000), 1000, "the same for tokens with scope scores:write"
    )
    idempotency_ttl_s: int = _setting(
        "IDEMPOTENCY_TTL_S", _integer(60, 2_592_000), 86_400, "how long an answer is kept for its Idempotency-Key"
    )
    idempotency_max_per_subject: int = _setting(
        "IDEMPOTENCY_MAX_PER_SUBJECT",
        _integer(0, 1_000_000_000),
        100_000,
        "answers kept for one player's tokens, at 230 bytes each; game servers have no limit; 0: nobody has",
    )
    idempotency_restore_s: int = _setting(
        "IDEMPOTENCY_RESTORE_S",
        _integer(0, 2_592_000),
        900,
        "answers younger than this are known again after a rebuild: how long clients go on retrying",
    )
    auth_failures_per_minute: int = _setting(
        "AUTH_FAILURES_PER_MINUTE", _integer(0, 1_000_000), 60, "bad tokens an address may send before 429; 0: no limit"
    )
    trusted_proxies: tuple[str, ...] = _setting(
        "TRUSTED_PROXIES", _networks, (), "addresses or networks whose X-Forwarded-For counts"
    )

    redis_host: str = _setting("REDIS_HOST", _text, "127.0.0.1", "Redis 7.0 or newer, or Valkey")
    redis_port: int = _setting("REDIS_PORT", _integer(1, 65535), 6379, "")
    redis_password: str = _setting("REDIS_PASSWORD", _text, "", "", secret=True)
    redis_password_file: str = _setting("REDIS_PASSWORD_FILE", _text, "", "file that holds REDIS_PASSWORD instead")
    redis_username: str = _setting("REDIS_USERNAME", _text, "", "ACL user, see ops/redis-acl.conf; unset: `default`")
    redis_tls: int = _setting("REDIS_TLS", _integer(0, 1), 0, "1: encrypted, and the host name is verified")
    redis_tls_ca_file: str = _setting("REDIS_TLS_CA_FILE", _text, "", "PEM; unset: the authorities of the system")
    redis_tls_cert_file: str = _setting("REDIS_TLS_CERT_FILE", _text, "", "PEM, where Redis asks for a certificate")
    redis_tls_key_file: str = _setting("REDIS_TLS_KEY_FILE", _text, "", "PEM, its key, without a passphrase")
    redis_cluster: int = _setting(
        "REDIS_CLUSTER", _integer(0, 1), 0, "1: a Redis Cluster; REDIS_HOST then names some of its nodes, host:port,…"
    )
    redis_key_prefix: str = _setting("REDIS_KEY_PREFIX", _text, "", "put before every key, to share a Redis")
    outbox_max_bytes: int = _setting(
        "OUTBOX_MAX_BYTES", _integer(1_000_000, 2**40), 2**30, "outbox size above which updates get 503"
    )

    kafka_brokers: str = _setting("KAFKA_BROKERS", _brokers, "127.0.0.1:9092", "host:port, separated by commas")
    kafka_security_protocol: str = _setting(
        "KAFKA_SECURITY_PROTOCOL",
        _one_of("plaintext", "ssl", "sasl_plaintext", "sasl_ssl"),
        "plaintext",
        "ssl encrypts, and the host name is verified; sasl logs in",
    )
    kafka_sasl_mechanism: str = _setting(
        "KAFKA_SASL_MECHANISM",
        _one_of("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"),
        "SCRAM-SHA-512",
        "PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512",
    )
    kafka_sasl_username: str = _setting("KAFKA_SASL_USERNAME", _text, "", "")
    kafka_sasl_password: str = _setting("KAFKA_SASL_PASSWORD", _text, "", "", secret=True)
    kafka_ssl_ca_file: str = _setting("KAFKA_SSL_CA_FILE", _text, "", "PEM; unset: the authorities of the system")
    kafka_topic: str = _setting("KAFKA_TOPIC", _text, "score-updates", "dead letters go to {topic}.dead-letter")
    kafka_partitions: int = _setting("KAFKA_PARTITIONS", _integer(1, 1024), 8, "when the topic is created")
    kafka_replication: int = _setting("KAFKA_REPLICATION", _integer(1, 16), 1, "when the topic is created")
    kafka_retention_hours: int = _setting(
        "KAFKA_RETENTION_HOURS", _integer(1, 87_600), 168, "when the topic is created: what a rebuild can look back on"
    )
    relay_ahead_bytes: int = _setting(
        "RELAY_AHEAD_BYTES",
        _integer(0, 2**40),
        0,
        "how much the relay puts into Kafka before it is stored, for a broker that forgets; 0: no limit; `dev` sets it",
    )
    kafka_fetch_wait_ms: int = _setting(
        "KAFKA_FETCH_WAIT_MS",
        _integer(1, 10_000),
        100,
        "how long a broker holds an empty fetch; a record ends it, except in the broker of `dev`, which sets 10",
    )

    database_url: str = _setting(
        "DATABASE_URL",
        _database_url,
        "postgresql://127.0.0.1:5432/scoreboard",
        "PostgreSQL 14 or newer, or TimescaleDB; all of libpq's parameters count, such as sslmode",
        secret=True,
    )
    history_days: int = _setting(
        "HISTORY_DAYS", _integer(0, 36_500), 30, "how long the database keeps each event, at 200 bytes; 0: for ever"
    )

    live_interval_ms: int = _setting(
        "LIVE_INTERVAL_MS", _integer(1, 10_000), 16, "how long changes gather: one frame of a 60 Hz screen"
    )
    live_high_water_bytes: int = _setting(
        "LIVE_HIGH_WATER_BYTES", _integer(4096, 2**30), 65_536, "buffered bytes that make a connection lagging"
    )
    live_max_connections: int = _setting(
        "LIVE_MAX_CONNECTIONS",
        _integer(0, 10_000_000),
        20_000,
        "most WebSockets of one server, at about 6 KB each; each takes a file descriptor; 0: no limit",
    )
    live_max_per_ip: int = _setting(
        "LIVE_MAX_PER_IP",
        _integer(0, 10_000_000),
        1000,
        "most WebSockets from one address (IPv6: one /64) that bring no valid token; 0: no limit",
    )

    new_topic: Literal["refuse", "restart"] = _setting(
        "KAFKA_NEW_TOPIC",
        _one_of("refuse", "restart"),
        "refuse",
        "offsets of a topic that was made anew: refuse them, or start over (what `dev` does)",
    )

    metrics_host: str = _setting("METRICS_HOST", _text, "127.0.0.1", "address of the three ports of metrics below")
    metrics_port: int = _setting(
        "METRICS_PORT", _integer(0, 65535), 0, "the server's /metrics, worker n's on METRICS_PORT + n - 1; 0: on PORT"
    )
    relay_metrics_port: int = _setting("RELAY_METRICS_PORT", _integer(0, 65535), 0, "the relay's metrics; 0: none")
    persister_metrics_port: int = _setting(
        "PERSISTER_METRICS_PORT", _integer(0, 65535), 0, "the persister's metrics; 0: none"
    )
    log_format: Literal["auto", "json", "text"] = _setting(
        "LOG_FORMAT", _one_of("auto", "json", "text"), "auto", "auto: text on a terminal, else a JSON object a line"
    )
    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        "LOG_LEVEL", _one_of("debug", "info", "warning", "error"), "info", "the least that is logged"
    )
    slow_request_ms: int = _setting(
        "SLOW_REQUEST_MS",
        _integer(0, 3_600_000),
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
        return f"{self.kafka_topic}.dead-letter"


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
        variable, secret = field.metadata["variable"], field.metadata["secret"]
        raw = environ.get(variable, "")
        if not raw:
            continue
        try:
            values[field.name] = field.metadata["parse"](raw)
        except ValueError as error:
            shown = f"{len(raw)} characters" if secret else repr(raw)
            faults.append(f"{variable}: expected {error}, got {shown}")
    prefix = values.get("redis_key_prefix", "")
    if values.get("redis_cluster") and set(prefix) & set("{}"):
        faults.append(f"REDIS_KEY_PREFIX: expected no braces with REDIS_CLUSTER=1, got {prefix!r}")
    path = values.get("jwt_secret_file")
    if path:
        try:
            values["jwt_secret"] = _secret(Path(path).read_text().strip())
        except (OSError, ValueError) as error:
            faults.append(f"JWT_SECRET_FILE: expected a file with {MIN_SECRET_BYTES} bytes or more: {error}")
    path = values.get("redis_password_file")
    if path:
        try:
            values["redis_password"] = Path(path).read_text().strip()
        except (OSError, ValueError) as error:
            faults.append(f"REDIS_PASSWORD_FILE: expected a file with a password: {error}")
    settings = Settings(**values)
    faults += _insecure(settings)
    if faults:
        raise ConfigError("\n".join(faults))
    return settings


def _insecure(settings: Settings) -> list[str]:
    """What was meant to protect a connection, but would not: rather no connection than such a one."""
    tls_files = [f"redis_tls_{name}_file" for name in ("ca", "cert", "key")]
    files = [name for name in [*tls_files, "kafka_ssl_ca_file"] if getattr(settings, name)]
    encrypts = settings.kafka_security_protocol in ("ssl", "sasl_ssl")
    logs_in = settings.kafka_security_protocol in ("sasl_plaintext", "sasl_ssl")
    username, password = settings.kafka_sasl_username, settings.kafka_sasl_password
    faults = [
        f"{name.upper()}: expected a file that can be read, got {getattr(settings, name)!r}"
        for name in files
        if not os.access(getattr(settings, name), os.R_OK)
    ]
    if not settings.redis_tls:
        faults += [f"{name.upper()}: expected REDIS_TLS=1 beside it" for name in tls_files if name in files]
    if bool(settings.redis_tls_cert_file) != bool(settings.redis_tls_key_file):
        faults.append("REDIS_TLS_CERT_FILE, REDIS_TLS_KEY_FILE: expected both or none")
    if settings.redis_username and not settings.redis_password:
        faults.append("REDIS_USERNAME: expected REDIS_PASSWORD beside it")
    if settings.kafka_ssl_ca_file and not encrypts:
        faults.append("KAFKA_SSL_CA_FILE: expected KAFKA_SECURITY_PROTOCOL=ssl or sasl_ssl beside it")
    if logs_in and not (username and password):
        faults.append("KAFKA_SECURITY_PROTOCOL: expected KAFKA_SASL_USERNAME and KAFKA_SASL_PASSWORD beside sasl")
    if (username or password) and not logs_in:
        faults.append("KAFKA_SASL_USERNAME, KAFKA_SASL_PASSWORD: expected KAFKA_SECURITY_PROTOCOL=sasl_ssl beside them")
    return faults
