"""A wrong environment is refused before anything starts, in words that say what to change."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from server import config
from server.config import Settings, load
from server.errors import ConfigError
from tests.tls import Authority

ROOT = Path(__file__).resolve().parent.parent
SECRET = "0123456789abcdef0123456789abcdef"

RATE = "0 (off), or a number from 0.001 to 1000000"
OWN_HOST = "an address of this machine such as 127.0.0.1, 0.0.0.0 or ::, or its name"
REDIS_HOST = "a host name or address, without scheme, password and port (REDIS_PASSWORD, REDIS_PORT)"
TOPIC = "1 to 237 letters, digits, dots, _ or -"
ORIGINS = "* or origins such as https://example.org, separated by commas"

WRONG = [
    ("PORT", "80 80", "an integer from 0 to 65535"),
    ("PORT", "65536", "an integer from 0 to 65535"),
    ("PORT", "-1", "an integer from 0 to 65535"),
    ("PORT", "8080.0", "an integer from 0 to 65535"),
    ("REDIS_PORT", "0", "an integer from 1 to 65535"),
    ("BOARDS", "main,Weekly", "names of [a-z0-9_-]{1,64}, separated by commas"),
    ("BOARDS", "main,a:b", "names of [a-z0-9_-]{1,64}, separated by commas"),
    ("BOARDS", "x" * 65, "names of [a-z0-9_-]{1,64}, separated by commas"),
    ("BOARDS", ",,", "names of [a-z0-9_-]{1,64}, separated by commas"),
    ("CORS_ORIGINS", "example.org", "* or origins such as https://example.org, separated by commas"),
    ("CORS_ORIGINS", "https://example.org/", "* or origins such as https://example.org, separated by commas"),
    ("CORS_ORIGINS", "https://a\tX: y", "* or origins such as https://example.org, separated by commas"),
    ("REQUEST_DEADLINE_MS", "49", "an integer from 50 to 60000"),
    ("JWT_ALGORITHMS", "none", "some of HS256"),
    ("JWT_ALGORITHMS", "HS256,none", "some of HS256"),
    ("JWT_ALGORITHMS", ",", "some of HS256"),
    ("WRITE_POLICY", "ANY", "one of own, any"),
    ("RATE_LIMIT_PER_SECOND", "many", RATE),
    ("RATE_LIMIT_PER_SECOND", "nan", RATE),
    ("RATE_LIMIT_PER_SECOND", "inf", RATE),
    ("RATE_LIMIT_PER_SECOND", "-1", RATE),
    ("RATE_LIMIT_PER_SECOND", "1e-20", RATE),
    ("RATE_LIMIT_PER_SECOND", "-inf", RATE),
    ("RATE_LIMIT_WRITERS_PER_SECOND", "1e-20", RATE),
    ("RATE_LIMIT_WRITERS_PER_SECOND", "0.0009", RATE),
    ("PORT", "8_080", "an integer from 0 to 65535"),
    ("PORT", "٨٠٨٠", "an integer from 0 to 65535"),
    ("PORT", "9" * 100, "an integer from 0 to 65535"),
    ("HOST", "0.0.0.0:8080", OWN_HOST),
    ("HOST", "*", OWN_HOST),
    ("HOST", "[::]", OWN_HOST),
    ("HOST", "10.0.0.256", OWN_HOST),
    ("HOST", "my host", OWN_HOST),
    ("METRICS_HOST", "*", OWN_HOST),
    ("REDIS_HOST", "/run/redis.sock", REDIS_HOST),
    ("REDIS_HOST", "cache,", "one host without a port (REDIS_PORT) or brackets, unless REDIS_CLUSTER=1"),
    ("REDIS_HOST", "cache:6379", "one host without a port (REDIS_PORT) or brackets, unless REDIS_CLUSTER=1"),
    ("REDIS_HOST", "[::1]", "one host without a port (REDIS_PORT) or brackets, unless REDIS_CLUSTER=1"),
    ("REDIS_HOST", "a:1,b:2", "one host without a port (REDIS_PORT) or brackets, unless REDIS_CLUSTER=1"),
    ("REDIS_HOST", "a:99999", REDIS_HOST),
    ("KAFKA_BROKERS", "kafka", "host:port, separated by commas"),
    ("KAFKA_BROKERS", "kafka:0", "host:port, separated by commas"),
    ("KAFKA_BROKERS", "kafka:65536", "host:port, separated by commas"),
    ("KAFKA_BROKERS", "::1:9092", "host:port, separated by commas"),
    ("KAFKA_TOPIC", "score updates", TOPIC),
    ("KAFKA_TOPIC", "scores/updates", TOPIC),
    ("KAFKA_TOPIC", "spiele-für-alle", TOPIC),
    ("KAFKA_TOPIC", "..", TOPIC),
    ("REDIS_KEY_PREFIX", "a\tb", "text without control characters"),
    ("TRUSTED_PROXIES", "::ffff:10.0.0.0/104", "addresses or networks such as 10.0.0.0/8, separated by commas; those"),
    ("CORS_ORIGINS", "https://*.b.example", f"{ORIGINS}, without path, pattern or password"),
    ("CORS_ORIGINS", "https://b.example/scores", f"{ORIGINS}, without path, pattern or password"),
    ("CORS_ORIGINS", "null", f"{ORIGINS}, without path, pattern or password"),
    ("CORS_ORIGINS", "https://b.example:70000", f"{ORIGINS}, without path, pattern or password"),
    ("CORS_ORIGINS", "https://b.example:443", f"{ORIGINS}, as browsers send them: https://b.example"),
    ("CORS_ORIGINS", "http://b.example:80", f"{ORIGINS}, as browsers send them: http://b.example"),
    ("CORS_ORIGINS", "https://B.example", f"{ORIGINS}, as browsers send them: https://b.example"),
    ("CORS_ORIGINS", "HTTPS://b.example", f"{ORIGINS}, as browsers send them: https://b.example"),
    ("CORS_ORIGINS", "https://bücher.example", f"{ORIGINS}, as browsers send them: https://xn--bcher-kva.example"),
    ("CORS_ORIGINS", "http://[::0001]:3000", f"{ORIGINS}, as browsers send them: http://[::1]:3000"),
    ("CORS_ORIGINS", "*,https://b.example", f"{ORIGINS}; * alone"),
    ("RATE_LIMIT_BURST", "0", "an integer from 1 to 1000000"),
    ("RATE_LIMIT_BY", "sub", "one of user, ip"),
    ("TRUSTED_PROXIES", "10.0.0.0/8,proxy", "addresses or networks such as 10.0.0.0/8, separated by commas"),
    ("TRUSTED_PROXIES", "10.0.0.0/33", "addresses or networks such as 10.0.0.0/8, separated by commas"),
    ("LIVE_INTERVAL_MS", "0", "an integer from 1 to 10000"),
    ("KAFKA_NEW_TOPIC", "ignore", "one of refuse, restart"),
]


def faults(**environ: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(environ)
    return str(caught.value).split("\n")


@pytest.mark.parametrize(("variable", "value", "expected"), WRONG)
def test_wrong_value_is_named_with_variable_value_and_expectation(variable: str, value: str, expected: str) -> None:
    (fault,) = faults(**{variable: value})
    assert fault.startswith(f"{variable}: expected {expected}")
    assert fault.endswith(f", got {value!r}")


def test_all_wrong_values_are_named_at_once() -> None:
    wrong = {variable: value for variable, value, _ in WRONG} | {"JWT_SECRET": "short", "JWT_SECRET_PREVIOUS": "short"}
    said = faults(**wrong, JWT_ISSUER="fine")
    assert sorted(line.partition(":")[0] for line in said) == sorted(wrong)


@pytest.mark.parametrize("variable", ["JWT_SECRET", "JWT_SECRET_PREVIOUS"])
def test_short_secret_is_not_shown(variable: str) -> None:
    assert faults(**{variable: "sesame"}) == [f"{variable}: expected at least 32 bytes, got 6 characters"]


@pytest.mark.parametrize("value", ["tcp://10.0.0.1:6379", "tcp://[fd00::1]:6379"])
@pytest.mark.parametrize("variable", ["REDIS_PORT", "METRICS_PORT", "RELAY_METRICS_PORT", "KAFKA_PARTITIONS"])
def test_value_of_a_kubernetes_service_link_is_called_one(variable: str, value: str) -> None:
    (fault,) = faults(**{variable: value})
    assert f"got {value!r} (Kubernetes sets it for a Service of that name: set `enableServiceLinks: false`" in fault


@pytest.mark.parametrize("value", ["x86_64-conda-linux-gnu", "x86_64-conda_cos6-linux-gnu", "arm64-apple-darwin20.0.0"])
def test_host_that_conda_sets_is_called_so(value: str) -> None:
    (fault,) = faults(HOST=value)
    assert fault.startswith(f"HOST: expected {OWN_HOST}, got {value!r} (conda's compilers set it")


AROUND = [
    ("{} ", "blank at its end"),
    (" {}", "blank at its start"),
    ("{}\u00a0", "blank at its end"),
    ("\t{}", "blank at its start"),
    ("{}\r", "line end at its end"),
    ("{}\n", "line end at its end"),
    ("{}\r\n", "line end at its end"),
    ("\n{}", "line end at its start"),
    ("\ufeff{}", "invisible character (such as a byte order mark) at its start"),
    ("{}\u200b", "invisible character (such as a byte order mark) at its end"),
    ('"{}"', "quotes around it"),
    ("'{}'", "quotes around it"),
]
RIGHT = {
    "JWT_SECRET": SECRET,
    "JWT_AUDIENCE": "scores",
    "REDIS_HOST": "cache",
    "REDIS_PASSWORD": "sesame",
    "KAFKA_TOPIC": "score-updates",
    "KAFKA_BROKERS": "kafka:9092",
    "DATABASE_URL": "postgresql://ann:sesame@db/scores",
    "PORT": "8080",
    "RATE_LIMIT_PER_SECOND": "20",
    "CORS_ORIGINS": "https://example.org",
    "BOARDS": "main,weekly",
    "WRITE_POLICY": "own",
    "JWT_JWKS_FILE": "/nowhere",
}


@pytest.mark.parametrize(("spelling", "unmeant"), AROUND)
@pytest.mark.parametrize("variable", RIGHT)
def test_what_stands_around_a_value_is_refused_by_name(variable: str, spelling: str, unmeant: str) -> None:
    (fault,) = faults(**{variable: spelling.format(RIGHT[variable])})
    assert fault.startswith(f"{variable}: expected no {unmeant}, got ")
    assert "sesame" not in fault
    assert SECRET not in fault


def test_quote_at_one_end_of_a_password_is_part_of_it() -> None:
    assert load({"REDIS_PASSWORD": "\"sesame'"}).redis_password == "\"sesame'"
    assert faults(JWT_AUDIENCE='scores"') == ["JWT_AUDIENCE: expected no quote at its end, got 'scores\"'"]


def test_bytes_that_are_no_text_are_refused() -> None:
    assert faults(REDIS_PASSWORD="sesame\udcff") == ["REDIS_PASSWORD: expected text in UTF-8, got 7 characters"]


@pytest.mark.parametrize(
    "host", ["cache", "cache_1.net", "10.0.0.5", "::1", "fe80::1%eth0", "a-b.c.example.", "münchen"]
)
def test_any_host_is_one(host: str) -> None:
    settings = load({"HOST": host, "REDIS_HOST": host, "METRICS_HOST": host})
    assert (settings.host, settings.redis_host, settings.metrics_host) == (host, host, host)


@pytest.mark.parametrize("hosts", ["a,b", "a:7000, b:7001", "[::1]:7000,10.0.0.1", "::1"])
def test_nodes_of_a_cluster_may_bring_their_ports(hosts: str) -> None:
    assert load({"REDIS_HOST": hosts, "REDIS_CLUSTER": "1"}).redis_host == hosts


def test_topic_leaves_room_for_the_suffix_of_dead_letters() -> None:
    assert len(load({"KAFKA_TOPIC": "x" * 237}).dead_letter_topic) == 249
    (fault,) = faults(KAFKA_TOPIC="x" * 238)
    assert fault.startswith(f"KAFKA_TOPIC: expected {TOPIC}")


@pytest.mark.parametrize("rate", ["0", "0.0", "0.001", "1e-3", "1000000", "2.5"])
def test_rate_in_any_spelling_is_one(rate: str) -> None:
    assert load({"RATE_LIMIT_PER_SECOND": rate}).rate_limit_per_second == float(rate)


# ---------------------------------------------------------------------- DATABASE_URL


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://ann:ses@me@db/scores",
        "postgresql://ann:ses@me@db:5432/scores",
        "postgresql://ann:sesame@@db/scores",
        "postgresql://ann:ses/me@db/scores",
        "postgresql://ann:12/me@db/scores",
        "postgresql://ann:ses/m@e@db/scores",
        "postgresql://ann@tenant:sesame@db/scores",
        "postgres://ann:ses#/me@db",
        "postgresql://ann:ses%me@db/scores",
        "postgresql://db:sesame/scores",
        "postgresql://ann:sesame@db:5432sesame/scores",
        "postgresql://ann:sesame@d b/scores",
        "postgresql:/ann:sesame@db/scores",
        "https://ann:sesame@db/scores",
        "ann:sesame@db/scores",
        "host=db password=ses ame",
        "host=ses@me dbname=scores",
        "host=db port=sesame",
        "host=db pasword=sesame",
    ],
)
def test_address_that_libpq_takes_for_another_is_refused_and_not_shown(url: str) -> None:
    (fault,) = faults(DATABASE_URL=url)
    assert fault.startswith("DATABASE_URL: expected a URL such as postgresql://user:password@host:5432/name, with @ in")
    assert fault.endswith(f", got {len(url)} characters")


@pytest.mark.parametrize("parameter", ["sslmode", "target_session_attrs", "channel_binding", "load_balance_hosts"])
def test_parameter_that_libpq_would_refuse_later_is_named(parameter: str) -> None:
    url = f"postgresql://ann:sesame@a,b:5432/scores?{parameter}=none"
    (fault,) = faults(DATABASE_URL=url)
    assert fault == f"DATABASE_URL: expected a value of {parameter} that libpq knows, got {len(url)} characters"


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://ann:ses%40me@db/scores",
        "postgresql://ann:ses?me@db/scores",
        "postgresql://ann:ses:me@db:5432/scores?sslmode=require",
        "postgresql:///scores?host=/var/run/postgresql",
        "postgresql://%2Fvar%2Frun%2Fpostgresql/scores",
        "postgresql://a:5432,b:5433/scores?target_session_attrs=read-write",
        "postgresql://[::1]:5432/scores",
        "postgresql://db/scores?user=ann@tenant&password=ses@me/",
        "host=db password='ses@me/ ' user=ann@tenant dbname=scores",
        "host=@abstract dbname=scores",
        "host=/var/run/postgresql",
        "dbname=scores",
        "service=scores",
    ],
)
def test_address_that_libpq_takes_for_what_it_is_is_taken(url: str) -> None:
    assert load({"DATABASE_URL": url}).database_url == url


# ---------------------------------------------------------------------- settings that do not fit together


@pytest.mark.parametrize(
    ("environ", "fault"),
    [
        (
            {"METRICS_PORT": "65535", "WORKERS": "2"},
            "METRICS_PORT: expected at most 65534 with WORKERS=2, for each has one of its own, got 65535",
        ),
        ({"METRICS_PORT": "8080"}, "PORT, METRICS_PORT: expected different ports, got 8080 for both"),
        (
            {"METRICS_PORT": "8079", "WORKERS": "2"},
            "PORT, METRICS_PORT: expected different ports, got 8080 for both (WORKERS=2 take 8079 to 8080)",
        ),
        (
            {"METRICS_PORT": "9100", "WORKERS": "4", "RELAY_METRICS_PORT": "9102"},
            "METRICS_PORT, RELAY_METRICS_PORT: expected different ports, got 9102 for both "
            "(WORKERS=4 take 9100 to 9103)",
        ),
        (
            {"RELAY_METRICS_PORT": "9101", "PERSISTER_METRICS_PORT": "9101"},
            "RELAY_METRICS_PORT, PERSISTER_METRICS_PORT: expected different ports, got 9101 for both",
        ),
        (
            {"PORT": "9101", "RELAY_METRICS_PORT": "9101"},
            "PORT, RELAY_METRICS_PORT: expected different ports, got 9101 for both",
        ),
        (
            {"HOST": "0.0.0.0", "METRICS_HOST": "10.0.0.1", "METRICS_PORT": "8080"},
            "PORT, METRICS_PORT: expected different ports, got 8080 for both",
        ),
        (
            {"RATE_LIMIT_PER_SECOND": "0.001", "RATE_LIMIT_BURST": "1000000"},
            "RATE_LIMIT_BURST: expected at most 2592, 30 days of RATE_LIMIT_PER_SECOND=0.001, got 1000000",
        ),
        (
            {"RATE_LIMIT_WRITERS_PER_SECOND": "0.001", "RATE_LIMIT_WRITERS_BURST": "5000"},
            "RATE_LIMIT_WRITERS_BURST: expected at most 2592, 30 days of RATE_LIMIT_WRITERS_PER_SECOND=0.001, got 5000",
        ),
        ({"JWT_SECRET_PREVIOUS": SECRET}, "JWT_SECRET_PREVIOUS: expected JWT_SECRET beside it"),
        (
            {"JWT_JWKS_FILE": "/nowhere"},
            "JWT_JWKS_FILE: expected an RS or ES algorithm in JWT_ALGORITHMS beside it, got HS256",
        ),
        (
            {"JWT_PUBLIC_KEY": "anything", "JWT_ALGORITHMS": "HS512"},
            "JWT_PUBLIC_KEY: expected an RS or ES algorithm in JWT_ALGORITHMS beside it, got HS512",
        ),
        (
            {"JWT_PUBLIC_KEY_FILE": str(ROOT / "Makefile")},
            "JWT_PUBLIC_KEY_FILE: expected an RS or ES algorithm in JWT_ALGORITHMS beside it, got HS256",
        ),
        (
            {"KAFKA_SASL_MECHANISM": "PLAIN"},
            "KAFKA_SASL_MECHANISM: expected KAFKA_SECURITY_PROTOCOL=sasl_ssl beside it",
        ),
        (
            {"REDIS_TLS": "1", "REDIS_TLS_CA_FILE": __file__},
            f"REDIS_TLS_CA_FILE: expected a PEM file with certificates, got {__file__!r}, which has none",
        ),
        (
            {"REDIS_TLS": "1", "REDIS_TLS_CERT_FILE": __file__, "REDIS_TLS_KEY_FILE": __file__},
            "REDIS_TLS_CERT_FILE, REDIS_TLS_KEY_FILE: expected a certificate and its key, both PEM, the key without a "
            f"passphrase, got {__file__!r} and {__file__!r}",
        ),
        (
            {"REDIS_TLS": "1", "REDIS_TLS_CA_FILE": str(ROOT)},
            f"REDIS_TLS_CA_FILE: expected a file that can be read, got {str(ROOT)!r}",
        ),
        (
            {"KAFKA_SECURITY_PROTOCOL": "ssl", "KAFKA_SSL_CA_FILE": __file__},
            f"KAFKA_SSL_CA_FILE: expected a PEM file with certificates, got {__file__!r}, which has none",
        ),
        (
            {"DATABASE_URL": "postgresql://db/scores?sslmode=verify-full&sslrootcert=/no/such.pem"},
            "DATABASE_URL: expected sslrootcert to be a file that can be read, got '/no/such.pem'",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused_in_one_sentence(environ: dict[str, str], fault: str) -> None:
    assert faults(**environ) == [fault]


def test_key_with_a_passphrase_is_refused_and_asks_no_terminal(tmp_path: Path) -> None:
    ours, other = (Authority(tmp_path, name).issue("localhost") for name in ("one", "other"))
    private = serialization.load_pem_private_key(ours.key.read_bytes(), None)
    locked = tmp_path / "locked.key"
    locked.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"sesame"),
        )
    )
    files = {"REDIS_TLS": "1", "REDIS_TLS_CA_FILE": str(ours.cert), "REDIS_TLS_CERT_FILE": str(ours.cert)}
    load({**files, "REDIS_TLS_KEY_FILE": str(ours.key)})
    for key in (locked, other.key):
        (fault,) = faults(**files, REDIS_TLS_KEY_FILE=str(key))
        assert fault.startswith("REDIS_TLS_CERT_FILE, REDIS_TLS_KEY_FILE: expected a certificate and its key")


@pytest.mark.parametrize(
    "environ",
    [
        {"HOST": "10.0.0.1", "METRICS_HOST": "127.0.0.1", "METRICS_PORT": "8080"},
        {"METRICS_PORT": "9100", "WORKERS": "2", "RELAY_METRICS_PORT": "9102"},
        {"RELAY_METRICS_PORT": "8080"},  # a relay alone, with PORT left as it is
        {"PORT": "0", "METRICS_PORT": "9100"},
        {"METRICS_PORT": "65535"},
        {"DATABASE_URL": "postgresql://db/scores?sslmode=verify-full&sslrootcert=system"},
    ],
)
def test_settings_that_only_look_alike_are_taken(environ: dict[str, str]) -> None:
    load(environ)


def test_length_of_a_secret_counts_in_bytes() -> None:
    assert load({"JWT_SECRET": "é" * 16}).jwt_secret == ("é" * 16).encode()
    assert faults(JWT_SECRET="é" * 15 + "e") == ["JWT_SECRET: expected at least 32 bytes, got 16 characters"]


def test_empty_environment_gives_the_defaults() -> None:
    assert load({}) == Settings()
    assert load({"PORT": "", "BOARDS": "", "JWT_SECRET": ""}) == Settings()


def test_values_are_read_as_what_they_mean() -> None:
    settings = load(
        {
            "PORT": "0",
            "BOARDS": "weekly, main,",
            "CORS_ORIGINS": "https://example.org,http://localhost:3000",
            "RATE_LIMIT_PER_SECOND": "0.5",
            "TRUSTED_PROXIES": "10.0.0.1/8, ::1",
            "JWT_ALGORITHMS": "RS256,ES256",
        }
    )
    assert settings.port == 0
    assert settings.boards == ("weekly", "main")
    assert settings.cors_origins == ("https://example.org", "http://localhost:3000")
    assert settings.rate_limit_per_second == 0.5
    assert settings.trusted_proxies == ("10.0.0.1/8", "::1")
    assert settings.jwt_algorithms == ("RS256", "ES256")


def test_secret_may_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text(SECRET + "\n")
    assert load({"JWT_SECRET_FILE": str(path)}).jwt_secret == SECRET.encode()


@pytest.mark.parametrize("content", [None, b"", b"sesame", b"\xff" * 40])
def test_file_without_a_secret_is_refused_and_not_shown(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
    (fault,) = faults(JWT_SECRET_FILE=str(path))
    assert fault.startswith("JWT_SECRET_FILE: expected a file with 32 bytes or more: ")
    assert "sesame" not in fault


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n"])
def test_line_end_of_a_file_is_not_part_of_its_secret(tmp_path: Path, end: str) -> None:
    path = tmp_path / "secret"
    path.write_bytes((SECRET + end).encode())
    settings = load({"JWT_SECRET_FILE": str(path), "REDIS_PASSWORD_FILE": str(path)})
    assert (settings.jwt_secret, settings.redis_password) == (SECRET.encode(), SECRET)


@pytest.mark.parametrize(("spelling", "unmeant"), AROUND)
def test_what_stands_around_the_secret_in_a_file_is_refused(tmp_path: Path, spelling: str, unmeant: str) -> None:
    path = tmp_path / "secret"
    path.write_bytes((spelling.format(SECRET) + ("" if "line end" in unmeant else "\r\n")).encode())
    if spelling in ("{}\r", "{}\n", "{}\r\n"):
        return  # the line end that a file has
    for variable in ("JWT_SECRET_FILE", "REDIS_PASSWORD_FILE"):
        (fault,) = faults(**{variable: str(path)})
        assert fault.startswith(f"{variable}: expected a file with ")
        assert f": expected no {unmeant}, got " in fault
        assert SECRET not in fault


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "expected one that is not empty, got none"),
        (b"\r\n", "expected one that is not empty, got none"),
        ("sesame".encode("utf-16"), "expected text in UTF-8, got none"),
        (b"sesame\nsesame\n", "expected text without control characters, got 13 characters"),
        (b"x" * 100_000, "expected at most 65536 bytes, got none"),
    ],
)
def test_file_without_a_password_is_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "password"
    path.write_bytes(content)
    assert faults(REDIS_PASSWORD_FILE=str(path)) == [
        f"REDIS_PASSWORD_FILE: expected a file with a password: {expected}"
    ]


def test_secret_in_place_of_its_file_is_not_shown(tmp_path: Path) -> None:
    for value in ("sesame", "/sesame", "sesame/sesame", "x" * 300):
        (fault,) = faults(JWT_SECRET_FILE=value)
        assert fault.endswith(f", got {len(value)} characters")
    (fault,) = faults(JWT_SECRET_FILE=str(tmp_path / "mistyped"))
    assert fault.endswith(f": No such file or directory, got {str(tmp_path / 'mistyped')!r}")


def test_secret_and_its_file_may_not_differ(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text(SECRET)
    assert load({"JWT_SECRET": SECRET, "JWT_SECRET_FILE": str(path)}).jwt_secret == SECRET.encode()
    assert faults(JWT_SECRET=SECRET[::-1], JWT_SECRET_FILE=str(path)) == [
        "JWT_SECRET, JWT_SECRET_FILE: expected one of them, got two that differ"
    ]


def test_secrets_never_show_in_what_describes_the_settings() -> None:
    secrets = {field.metadata["variable"] for field in dataclasses.fields(Settings) if field.metadata["secret"]}
    assert secrets == {
        "JWT_SECRET", "JWT_SECRET_PREVIOUS", "REDIS_PASSWORD", "KAFKA_SASL_PASSWORD", "DATABASE_URL"
    }  # fmt: skip
    settings = load({"JWT_SECRET": SECRET, "REDIS_PASSWORD": "sesame1", "DATABASE_URL": "postgresql://u:sesame2@h/d"})
    assert not re.search(f"{SECRET}|sesame", repr(settings) + str(settings))


def test_description_has_one_row_per_setting() -> None:
    rows = config.describe()
    assert len(rows) == len(dataclasses.fields(Settings))
    assert len({variable for variable, _, _ in rows}) == len(rows)
    assert all(re.fullmatch("[A-Z][A-Z_]+", variable) for variable, _, _ in rows)
    for variable, default, _ in rows:
        if default:
            assert load({variable: default}) == Settings(), f"the default shown for {variable} is not the default"


def test_readme_lists_exactly_the_settings_there_are() -> None:
    readme = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| `([A-Z][A-Z_]+)` \|(.*)\|(.*)\|$", readme, re.MULTILINE)
    assert [(name, default.strip().strip("`"), why.strip()) for name, default, why in rows] == config.describe()


def test_key_prefix_with_braces_would_take_the_hash_tag_away() -> None:
    load({"REDIS_KEY_PREFIX": "{game}"})
    with pytest.raises(ConfigError, match="expected no braces with REDIS_CLUSTER=1"):
        load({"REDIS_KEY_PREFIX": "{game}", "REDIS_CLUSTER": "1"})
