"""A wrong environment is refused before anything starts, in words that say what to change."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from server import config
from server.config import Settings, load
from server.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
SECRET = "0123456789abcdef0123456789abcdef"

WRONG = [
    ("PORT", "80 80", "an integer from 0 to 65535"),
    ("PORT", "65536", "an integer from 0 to 65535"),
    ("PORT", "-1", "an integer from 0 to 65535"),
    ("PORT", "8080.0", "an integer from 0 to 65535"),
    ("REDIS_PORT", "0", "an integer from 1 to 65535"),
    ("BOARDS", "main,Weekly", "names of [a-z0-9_-]{1,64}, separated by commas"),
    ("BOARDS", "main,a:b", "names of [a-z0-9_-]{1,64}, separated by commas"),
    ("BOARDS", "x" * 65, "names of [a-z0-9_-]{1,64}, separated by commas"),
    ("BOARDS", " , ", "names of [a-z0-9_-]{1,64}, separated by commas"),
    ("CORS_ORIGINS", "example.org", "* or origins such as https://example.org, separated by commas"),
    ("CORS_ORIGINS", "https://example.org/", "* or origins such as https://example.org, separated by commas"),
    ("CORS_ORIGINS", "https://a\r\nX: y", "* or origins such as https://example.org, separated by commas"),
    ("REQUEST_DEADLINE_MS", "49", "an integer from 50 to 60000"),
    ("JWT_ALGORITHMS", "none", "some of HS256"),
    ("JWT_ALGORITHMS", "HS256,none", "some of HS256"),
    ("JWT_ALGORITHMS", ",", "some of HS256"),
    ("WRITE_POLICY", "ANY", "one of own, any"),
    ("RATE_LIMIT_PER_SECOND", "many", "a number from 0 (off) to 1000000"),
    ("RATE_LIMIT_PER_SECOND", "nan", "a number from 0 (off) to 1000000"),
    ("RATE_LIMIT_PER_SECOND", "inf", "a number from 0 (off) to 1000000"),
    ("RATE_LIMIT_PER_SECOND", "-1", "a number from 0 (off) to 1000000"),
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
    said = faults(**wrong, HOST="0.0.0.0", JWT_ISSUER="fine")
    assert sorted(line.partition(":")[0] for line in said) == sorted(wrong)


@pytest.mark.parametrize("variable", ["JWT_SECRET", "JWT_SECRET_PREVIOUS"])
def test_short_secret_is_not_shown(variable: str) -> None:
    assert faults(**{variable: "sesame"}) == [f"{variable}: expected at least 32 bytes, got 6 characters"]


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
