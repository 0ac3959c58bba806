"""`scoreboard token` prints what the server with the same settings takes, or says why it cannot."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest

from server import __main__ as command_line
from server.auth import MAX_TTL_S, Authenticator
from server.config import load
from tests.services import environment

SECRET = "0123456789abcdef" * 4


def run(monkeypatch: pytest.MonkeyPatch, *argv: str, **settings: str) -> tuple[int, str, str]:
    """(exit status, standard output, standard error) of `scoreboard token`."""
    for name in list(environment({})):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["scoreboard", "token", *argv])
    out, said = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(said):
        try:
            status = command_line.main()
        except SystemExit as end:
            status = int(str(end.code))
    return status, out.getvalue(), said.getvalue()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"JWT_AUDIENCE": "scores"},
        {"JWT_ISSUER": "https://login.example/"},
        {"JWT_AUDIENCE": "scores", "JWT_ISSUER": "login", "JWT_ALGORITHMS": "HS512"},
        {"JWT_ALGORITHMS": "HS384,HS256", "JWT_SECRET_PREVIOUS": SECRET[::-1]},
    ],
)
def test_token_is_one_that_the_server_takes(monkeypatch: pytest.MonkeyPatch, settings: dict[str, str]) -> None:
    settings = {"JWT_SECRET": SECRET, **settings}
    status, printed, said = run(monkeypatch, "--sub", "ada", "--scope", "scores:write", **settings)
    assert (status, said) == (0, "")
    caller = Authenticator(load(settings)).caller(b"Bearer " + printed.strip().encode())
    assert (caller.subject, caller.is_writer) == ("ada", True)


def test_tokens_of_a_count_are_for_numbered_players(monkeypatch: pytest.MonkeyPatch) -> None:
    _, printed, _ = run(monkeypatch, "--sub", "ada", "--count", "3", JWT_SECRET=SECRET, JWT_AUDIENCE="scores")
    one = Authenticator(load({"JWT_SECRET": SECRET, "JWT_AUDIENCE": "scores"}))
    subjects = [one.caller(b"Bearer " + line.encode()).subject for line in printed.splitlines()]
    assert subjects == ["ada1", "ada2", "ada3"]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--sub", ""], "expected a sub of 1 to 128 characters"),
        (["--sub", "x" * 129], "expected a sub of 1 to 128 characters"),
        (["--sub", "x" * 127, "--count", "10"], "expected a sub of 1 to 128 characters"),
        (["--sub", "a\nb"], "none of them control characters"),
        (["--sub", "a\udcff"], "none of them control characters"),
        (["--sub", "ada", "--ttl", "0"], f"--ttl: expected 1 to {MAX_TTL_S} seconds, got 0"),
        (["--sub", "ada", "--ttl", "-5"], f"--ttl: expected 1 to {MAX_TTL_S} seconds, got -5"),
        (["--sub", "ada", "--ttl", "9" * 30], f"--ttl: expected 1 to {MAX_TTL_S} seconds, got 999"),
        (["--sub", "ada", "--count", "0"], "--count: expected at least 1, got 0"),
        (["--sub", "ada", "--scope", "x" * 9000], "expected a token of at most 8192 bytes"),
    ],
)
def test_token_that_no_server_would_take_is_not_printed(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], expected: str
) -> None:
    status, printed, said = run(monkeypatch, *argv, JWT_SECRET=SECRET)
    assert (status, printed) == (2, "")
    assert expected in said
    assert SECRET not in said


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "JWT_SECRET: expected at least 32 bytes for HS256, got none"),
        (
            {"JWT_SECRET": SECRET, "JWT_ALGORITHMS": "RS256,ES256"},
            "JWT_ALGORITHMS: expected HS256, HS384 or HS512 to sign a token, got RS256,ES256: only public keys",
        ),
        (
            {"JWT_SECRET": SECRET[:40], "JWT_ALGORITHMS": "HS512"},
            "JWT_SECRET: expected at least 64 bytes for HS512, got 40",
        ),
    ],
)
def test_token_that_cannot_be_signed_is_said_with_its_variable(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], expected: str
) -> None:
    status, printed, said = run(monkeypatch, "--sub", "ada", **settings)
    assert (status, printed) == (2, "")
    assert said.startswith(f"scoreboard: {expected}")
    assert len(said.splitlines()) == 1
