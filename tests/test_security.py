"""What an attacker tries with nothing but a connection, and what came of it; docs/security.md is the list.

What belongs to one module is tried in that module's tests; here is what takes a whole server.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from server.auth import CACHE_SIZE, MAX_TOKEN_BYTES, Authenticator
from server.config import Settings, describe, load
from server.dev_screen import without_password
from server.embedded import ADDRESS, RedisServer, free_port
from server.errors import ConfigError, Problem
from tests.alone import server_alone
from tests.client import (
    assert_problem,
    board,
    get,
    new_player,
    post,
    post_body,
    token,
)
from tests.services import JWT_SECRET, ROOT, ServerProcess, SyncProcess, environment, wait_until
from tests.wire import Wire, request_bytes

SLOW = 300
"""Slow clients; docs/security.md has the figures for 5,000."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server for all; Kafka and the database are away."""
    with server_alone(tmp_path_factory.mktemp("security")) as process:
        yield process


# ---------------------------------------------------------------------- memory


def remembered(authorizations: list[bytes]) -> list[bytes]:
    """Which of these valid headers are kept in memory."""
    one = Authenticator(Settings(jwt_secret=JWT_SECRET.encode()))
    for each in authorizations:
        assert one.caller(each).subject == "ada"
    return list(one._callers)


def test_one_token_takes_one_place_in_memory_however_it_is_spelled() -> None:
    valid = token("ada").encode()
    spellings = [b"Bearer " + b" " * blanks + valid for blanks in range(1, 200)]
    spellings += [b"bearer " + valid, b"BEARER " + valid]
    assert remembered([*spellings, b"Bearer " + valid]) == [b"Bearer " + valid]


def test_token_longer_than_headers_commonly_are_is_refused_unread() -> None:
    one = Authenticator(Settings(jwt_secret=JWT_SECRET.encode()))
    long = b"Bearer " + token("ada", scope="x" * MAX_TOKEN_BYTES).encode()
    with pytest.raises(Problem, match=f"at most {MAX_TOKEN_BYTES} bytes"):
        one.caller(long)
    assert CACHE_SIZE * MAX_TOKEN_BYTES <= 2**29, "the worst that signed tokens can take"


def resident_kb(server: ServerProcess) -> int:
    text = get(server, "/metrics").body.decode()
    found = re.search(r"^process_resident_memory_bytes (\S+)$", text, re.MULTILINE)
    assert found
    return int(float(found[1])) // 1024


def test_long_queries_and_tokens_leave_nothing_behind(server: ServerProcess) -> None:
    """They were kept, 60 KB each: 1,000 of them cost 38 MB."""

    def ask(number: int) -> None:
        with contextlib.suppress(OSError, EOFError), Wire(server.port) as wire:  # in two pieces it is a 431 or 505
            wire.request("GET", f"/leaderboard?limit=1&x={number}{'a' * 60_000}")
        with contextlib.suppress(OSError, EOFError), Wire(server.port) as wire:
            wire.request("POST", "/update-score", b"{}", Authorization=f"Bearer {' ' * (60_000 + number)}{valid}")

    valid = token("ada")
    for number in range(50):
        ask(number)
    before_kb = resident_kb(server)
    for number in range(50, 450):
        ask(number)
    assert resident_kb(server) - before_kb < 400 * 60 / 4


# ---------------------------------------------------------------------- slow clients


def test_slow_headers_and_bodies_keep_nobody_else_waiting(server: ServerProcess) -> None:
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(Wire(server.port)) for _ in range(SLOW)]
        head = request_bytes("POST", "/update-score", b'{"playerId":', Authorization=f"Bearer {token('slow')}")
        for number, wire in enumerate(slow):
            wire.send((head[:40], head[:-5], b"")[number % 3])
        for turn in range(20):
            for wire in slow[1::3] if turn == 10 else ():  # bodies that go on trickling
                wire.send(b" ")
            player = new_player()
            assert post(server, player, 5).json() == {"playerId": player, "newScore": 5}
            assert board(server)[player] == 5


# ---------------------------------------------------------------------- lines that somebody else writes

FORGED = "2026-01-01 00:00:00,000 CRITICAL forged"
HOSTILE = ["a\r\nX-Injected: 1", "a\nX-Injected: 1", "a\rX-Injected: 1", "a\r\n\r\nHTTP/1.1 200 OK", "\x1b[31ma"]


@pytest.mark.parametrize("name", ["Idempotency-Key", "X-Request-Id", "Origin", "X-Forwarded-For", "Authorization"])
@pytest.mark.parametrize("value", HOSTILE)
def test_line_ends_in_a_header_come_out_nowhere(server: ServerProcess, name: str, value: str) -> None:
    with Wire(server.port) as wire:
        wire.send(request_bytes("GET", "/healthz", **{name: value}) + request_bytes("GET", "/healthz"))
        if wire.is_silent(0.05):  # the parser takes neither a bare CR nor a bare LF, and says nothing
            return
    with Wire(server.port) as wire, contextlib.suppress(EOFError):
        answer = wire.request("POST", "/update-score", b"{}", **{"Authorization": f"Bearer {token('a')}", name: value})
        assert "x-injected" not in answer.headers
        assert not any("\x1b" in text for text in answer.headers.values())


@pytest.mark.parametrize("player", [f"a\n{FORGED}", f"a\r\n{FORGED}", "a\x00", "\x1b[2J", "\x7f", "\x85", "\x9b31m"])
def test_control_characters_make_no_player(server: ServerProcess, player: str) -> None:
    answer = post(server, player, subject="game", scope="scores:write")
    assert_problem(answer, 400, "invalid-request", "playerId: expected no control characters")
    assert player not in answer.body.decode(), "shown escaped"


def test_million_characters_make_no_player(server: ServerProcess) -> None:
    with Wire(server.port) as wire:
        body = json.dumps({"playerId": "x" * 1_000_000, "scoreDelta": 1}).encode()
        answer = wire.request("POST", "/update-score", body, Authorization=f"Bearer {token('game', 'scores:write')}")
        assert_problem(answer, 413, "body-too-large")


def test_players_that_look_alike_are_others(server: ServerProcess) -> None:
    latin, cyrillic, composed, decomposed = "ada", "\u0430d\u0430", "\u00e9", "e\u0301"
    for score, player in enumerate((latin, cyrillic, composed, decomposed), 1):
        assert post(server, player, score).json()["newScore"] == score
        assert_problem(post(server, player, subject="mallory"), 403, "forbidden")
    assert_problem(post(server, latin, subject=cyrillic), 403, "forbidden")


@pytest.mark.parametrize(
    "path",
    [
        "/../server/config.py",
        "/..%2fconfig.py",
        "/%2e%2e/config.py",
        "/..\\config.py",
        "//style.css",
        "/./style.css",
        "/style.css%00",
        "/style.css/",
        "/web/style.css",
        "/.git/config",
        "/%73tyle.css",
        "/STYLE.CSS",
    ],
)
def test_only_the_exact_path_of_a_file_is_served(server: ServerProcess, path: str) -> None:
    assert_problem(get(server, path), 404, "not-found")


def test_nul_in_a_path_is_not_served(server: ServerProcess) -> None:
    with Wire(server.port) as wire:
        wire.send(b"GET /style.css\0.html HTTP/1.1\r\nHost: test\r\n\r\n")
        assert wire.answer().status == 400


@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"Content-Length: -5\r\n\r\n",
        b"Content-Length: +5\r\n\r\n12345",
        b"Content-Length: 5, 5\r\n\r\n12345",
        b"Content-Length: 99999999999999999999999\r\n\r\n",
        b"Transfer-Encoding: gzip\r\nContent-Length: 5\r\n\r\n12345",
    ],
)
def test_request_of_two_lengths_smuggles_no_other(server: ServerProcess, framing: bytes) -> None:
    with Wire(server.port) as wire:
        head = b"POST /update-score HTTP/1.1\r\nHost: test\r\n"
        wire.send(head + framing + b"GET /healthz HTTP/1.1\r\nHost: test\r\n\r\n")
        assert wire.answer(has_body=False).status == 400
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                assert wire.answer().status != 200, "the second request was answered"


def test_log_holds_no_line_of_an_attacker(server: ServerProcess) -> None:
    """Behind the tests above; it drives its own too, so that it can stand alone."""
    for value in (FORGED, f"a\r\n{FORGED}", "\x1b[31m"):
        with contextlib.suppress(OSError, EOFError, TimeoutError), Wire(server.port) as wire:
            wire.send(request_bytes("GET", f"/leaderboard?board={value}", X_Request_Id=value, Idempotency_Key=value))
            wire.is_silent(0.1)
        post_body(server, json.dumps({"playerId": value, "scoreDelta": 1}).encode(), Authorization="Bearer x.y.z")
        get(server, "/live-updates", Origin="https://evil.example")
    log = server.output_tail(100_000)
    assert "listening on" in log
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", log)
    assert FORGED not in [line.strip() for line in log.splitlines()]
    assert "Traceback" not in log


# ---------------------------------------------------------------------- secrets


SECRETS = {
    "JWT_SECRET": "sesame-one-0123456789-0123456789-0123456789",
    "JWT_SECRET_PREVIOUS": "sesame-two-0123456789-0123456789-0123456789",
    "REDIS_PASSWORD": "sesame-three",
    "KAFKA_SECURITY_PROTOCOL": "sasl_plaintext",
    "KAFKA_SASL_USERNAME": "ann",
    "KAFKA_SASL_PASSWORD": "sesame-five",
}

CANARY = "zx81canary0123456789abcdefghijkl"
PASSWORDS = [CANARY, *(f"{CANARY}{mark}{CANARY}" for mark in "@/?#%:,;& '\"[]=\\\n\r")]
WRITTEN_AS = [
    "redis://:{}@cache",
    "redis://:{}@cache:6379/0",
    "rediss://default:{}@cache",
    "redis://cache?password={}",
    "postgresql://ann:{}@db/scores",
    "postgresql://ann:{}@db:5432/scores?sslmode=require",
    "postgresql://db/scores?password={}",
    "postgresql:/ann:{}@db/scores",
    "http://ann:{}@cache",
    "https://cache/?secret={}",
    "tcp://ann:{}@cache:6379",
    "sasl_ssl://ann:{}@kafka:9092",
    "//ann:{}@cache",
    ":{}@cache:6379",
    "ann:{}@cache",
    "{}@cache",
    "cache,ann:{}@cache",
    "host=db password={}",
    "host=db password='{}' dbname=scores",
    "cache password={}",
    " {}@cache",
    '"ann:{}@cache"',
    "-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----",
    '{{"keys":[{{"kty":"oct","k":"{}"}}]}}',
    "{}@cache" + "x" * 4000,
]
PUBLIC: set[str] = {
    "JWT_AUDIENCE", "JWT_ISSUER", "REDIS_USERNAME", "KAFKA_SASL_USERNAME", "REDIS_KEY_PREFIX"
}  # fmt: skip
"""Any text is right for these, and they are no secrets."""


@pytest.mark.parametrize("variable", sorted(variable for variable, _, _ in describe()))
def test_secret_in_any_setting_is_kept_to_itself_or_refused_unseen(variable: str) -> None:
    for written in WRITTEN_AS:
        for password in PASSWORDS:
            value = written.format(password)
            more = {"JWT_ALGORITHMS": "RS256"} if variable == "JWT_JWKS_FILE" else {}
            assert CANARY not in told_of({**more, variable: value}, shown=variable not in PUBLIC), value


def told_of(environ: dict[str, str], *, shown: bool) -> str:
    """What is said of these settings: why they are refused, or what may be shown of them."""
    try:
        settings = load(environ)
        Authenticator(dataclasses.replace(settings, jwt_secret=JWT_SECRET.encode()))
    except ConfigError as error:
        return str(error)
    return without_password(settings.database_url) + (repr(settings) if shown else "")


@pytest.mark.parametrize("variable", ["REDIS_HOST", "REDIS_PORT", "KAFKA_BROKERS", "HOST", "PORT", "METRICS_HOST"])
def test_url_where_a_host_or_port_belongs_is_refused(variable: str) -> None:
    for written in ("redis://:{}@cache", "redis://cache", "ann:{}@cache", "{}@cache", "//cache", "cache/0"):
        with pytest.raises(ConfigError, match=f"^{variable}: expected "):
            load({variable: written.format(CANARY)})


@pytest.mark.parametrize("written", [written for written in WRITTEN_AS if "db" in written])
def test_database_address_that_is_taken_leads_to_no_message_with_its_password(written: str) -> None:
    port = free_port()
    for password in PASSWORDS:
        try:
            url = load({"DATABASE_URL": written.format(password)}).database_url
        except ConfigError:
            continue
        with pytest.raises(psycopg.Error) as caught:
            psycopg.connect(make_conninfo(url, host=ADDRESS, port=port, connect_timeout=2))
        assert CANARY not in str(caught.value)


def test_no_command_shows_a_secret_that_stands_in_a_wrong_place(tmp_path: Path) -> None:
    """Every setting that takes no text is wrong at once, each in one of three ways."""
    shapes = ("ann:{}@cache", "redis://:{}@cache:6379", "-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----")
    commands = [[name] for name in ("serve", "all", "check", "sync", "migrate", "reconcile", "dead-letters", "health")]
    commands += [["token", "--sub", "ann"], ["dev", "--data", str(tmp_path / "data")]]
    names = [variable for variable, _, _ in describe() if variable not in PUBLIC]
    env = environment({name: shapes[number % 3].format(CANARY) for number, name in enumerate(names)})
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "server", *command],
            env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for command in commands
    ]  # fmt: skip
    for command, process in zip(commands, running, strict=True):
        said, _ = process.communicate(timeout=60)
        assert process.returncode == (1 if command == ["check"] else 2), (command, said)
        assert "REDIS_HOST: expected " in said
        assert "Traceback" not in said
        assert CANARY not in said


def test_no_secret_is_ever_written_whatever_fails(tmp_path: Path) -> None:
    redis = RedisServer(tmp_path / "redis", options={"requirepass": "another password"})
    url = f"postgresql://ann:sesame%40four%2F@127.0.0.1:{free_port()}/none"
    settings = {
        **SECRETS,
        "REDIS_PORT": str(redis.port),
        "KAFKA_BROKERS": f"127.0.0.1:{free_port()}",
        "DATABASE_URL": url,
    }
    server, sync = ServerProcess(tmp_path, settings), SyncProcess(tmp_path, settings)
    with contextlib.ExitStack() as stack:
        for end in (redis.stop, server.stop, sync.kill):  # sync would wait for Kafka for ten more seconds
            stack.callback(end)
        redis.launch()
        server.start()
        sync.launch()
        wait_until(lambda: "WRONGPASS" in server.output_tail(1000))
        wait_until(lambda: "does not answer" in sync.output_tail(1000), 30)
        said = [get(server, path).body for path in ("/readyz", "/leaderboard", "/metrics", "/nowhere")]
        said += [post(server, "ann").body, post_body(server, b"{", Authorization=f"Bearer {url}").body]
        logs = server.output_tail(10_000) + sync.output_tail(10_000)
    assert token("ann") not in logs
    assert "sesame" not in logs
    assert not any(b"sesame" in each for each in said)


@pytest.mark.parametrize(
    "url", ["postgresql://ann:sesame%zz@127.0.0.1/none", "host=127.0.0.1 password='sesame", "postgresql//sesame"]
)
@pytest.mark.parametrize("command", ["server", "sync"])
def test_database_url_that_cannot_be_read_is_not_shown(tmp_path: Path, url: str, command: str) -> None:
    settings = {"DATABASE_URL": url}
    process = ServerProcess(tmp_path, settings) if command == "server" else SyncProcess(tmp_path, settings)
    process.launch()
    try:
        wait_until(lambda: not process.running)
    finally:
        process.stop()
    assert process.status in (1, 2)
    assert "DATABASE_URL: expected a URL such as postgresql://" in process.output_tail(1000)
    assert "sesame" not in process.output_tail(1000)


# ---------------------------------------------------------------------- clients that leave in the middle


@pytest.mark.parametrize("path", ["/style.css", "/openapi.json", "/leaderboard?limit=0", "/nowhere"])
@pytest.mark.parametrize("count", [2, 5, 300])
def test_client_that_leaves_behind_pipelined_requests_harms_nobody(
    server: ServerProcess, path: str, count: int
) -> None:
    """It ended the process: uWebSockets takes an answer that it cannot write for none, and aborts."""
    for _ in range(10):
        server.pause()
        try:
            with Wire(server.port) as wire:
                wire.send(request_bytes("GET", path) * count)
        finally:
            server.resume()
        assert wait_until(lambda: server.status_of("/healthz") == 200 or not server.running)
        assert server.running, server.output_tail()
