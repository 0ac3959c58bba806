"""Every endpoint answers what was promised, also when Redis does not: a status, its reason, never a hang."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis as redis_client

from server.auth import issue
from server.embedded import PostgresServer, RedisServer, free_port
from server.events import MAX_SCORE
from sync import store
from tests.client import (
    assert_problem,
    board,
    can_write,
    connect,
    get,
    new_player,
    post,
    post_body,
    store_scores,
    token,
    trust,
    wait_until_writable,
)
from tests.services import JWT_SECRET, KafkaBroker, ServerProcess, wait_until
from tests.wire import Answer, Wire, once, request_bytes

pytestmark = pytest.mark.redis
ORIGIN = "https://game.example"
READABLE = ["/leaderboard", "/healthz", "/readyz", "/metrics", "/", "/style.css"]
DEADLINE_MS = 500
LITTLE_S = 1.5
"""What a busy machine may add to the deadline."""


@pytest.fixture(scope="module")
def own_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis-of-routes"))
    server.start()
    with connect(server) as client:
        trust(client)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def server(own_redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server for all tests that harm nothing; each uses players of its own."""
    settings = {
        "REDIS_PORT": str(own_redis.port),
        "KAFKA_BROKERS": f"127.0.0.1:{free_port()}",
        "DATABASE_URL": f"postgresql://127.0.0.1:{free_port()}/none",
        "BOARDS": "main,weekly",
        "RATE_LIMIT_PER_SECOND": "2",
        "RATE_LIMIT_BURST": "5",
        "AUTH_FAILURES_PER_MINUTE": "30",
        "TRUSTED_PROXIES": "127.0.0.1",
    }
    process = ServerProcess(tmp_path_factory.mktemp("server"), settings)
    process.start()
    wait_until_writable(process)
    yield process
    process.stop()


# ---------------------------------------------------------------------- POST /update-score


def test_update_answers_with_the_new_score(server: ServerProcess) -> None:
    player = new_player()
    scores = [post(server, player, delta) for delta in (5, 0, -8)]
    assert [answer.status for answer in scores] == [200] * 3
    assert [answer.json() for answer in scores] == [{"playerId": player, "newScore": score} for score in (5, 5, -3)]
    assert scores[0].headers["content-type"] == "application/json"


@pytest.mark.parametrize("player", ["a:b", "100%", "Ada Lovelace", "玩家", "🎮" * 128, "'\"\\", "<script>"])
def test_any_text_without_control_characters_is_a_player(server: ServerProcess, player: str) -> None:
    assert post(server, player, 5).json() == {"playerId": player, "newScore": 5}
    assert board(server)[player] == 5


def test_boards_are_apart(server: ServerProcess) -> None:
    player = new_player()
    assert post(server, player, 5).json()["newScore"] == 5
    assert post(server, player, 7, board="weekly").json()["newScore"] == 7
    assert post(server, player, 1, board="main").json()["newScore"] == 6
    assert (board(server)[player], board(server, "limit=1000&board=weekly")[player]) == (6, 7)


def test_score_stops_at_what_a_double_can_count(server: ServerProcess) -> None:
    player = new_player()
    assert post(server, player, MAX_SCORE).json()["newScore"] == MAX_SCORE
    assert_problem(post(server, player, 1), 400, "invalid-request", f"the score is {MAX_SCORE}")
    assert board(server)[player] == MAX_SCORE


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b"", "body: expected JSON"),
        (b"{", "body: expected JSON"),
        (b"\xff", "body: expected JSON"),
        (b"[" * 10_000, "body: expected"),
        (b"5", "body: expected `object`, got `int`"),
        (b"[]", "body: expected `object`, got `array`"),
        (b"{}", "playerId"),
        (b'{"playerId":"a"}', "scoreDelta"),
        (b'{"scoreDelta":1}', "playerId"),
        (b'{"playerId":5,"scoreDelta":1}', "playerId: expected `str`, got `int`"),
        (b'{"playerId":null,"scoreDelta":1}', "playerId: expected `str`, got `null`"),
        (b'{"playerId":"","scoreDelta":1}', "playerId: expected 1 to 128 characters, got 0"),
        (b'{"playerId":"%s","scoreDelta":1}' % (b"x" * 129), "playerId: expected 1 to 128 characters, got 129"),
        (b'{"playerId":"a\\nb","scoreDelta":1}', r"playerId: expected no control characters, got 'a\nb'"),
        (b'{"playerId":"\\ud800","scoreDelta":1}', "body: expected JSON"),
        (b'{"playerId":"a","scoreDelta":"5"}', "scoreDelta: expected `int`, got `str`"),
        (b'{"playerId":"a","scoreDelta":1.5}', "scoreDelta: expected `int`, got `float`"),
        (b'{"playerId":"a","scoreDelta":true}', "scoreDelta: expected `int`, got `bool`"),
        (b'{"playerId":"a","scoreDelta":NaN}', "body: expected JSON"),
        (b'{"playerId":"a","scoreDelta":9007199254740992}', "got 9007199254740992"),
        (b'{"playerId":"a","scoreDelta":-9007199254740992}', "got -9007199254740992"),
        (
            b'{"playerId":"a","scoreDelta":1%s}' % (b"0" * 5000),
            "scoreDelta: expected an integer from -9007199254740991",
        ),
        (b'{"playerId":"a","scoreDelta":1,"board":5}', "board: expected `str`, got `int`"),
    ],
)
def test_body_that_is_no_change_is_400_and_says_what_was_expected(
    server: ServerProcess, body: bytes, detail: str
) -> None:
    answer = post_body(server, body, Authorization=f"Bearer {token('a')}")
    assert_problem(answer, 400, "invalid-request", detail)
    assert "expected" in answer.json()["detail"] or "missing" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("spelled", "delta"),
    [
        ("5.0", 5), ("5e0", 5), ("50e-1", 5), ("0.5e1", 5), ("-0", 0), ("-0.0", 0), ("0e99", 0), ("1E+2", 100),
        ("-5.00", -5), ("9007199254740991.0", MAX_SCORE), ("900719925474099.1e1", MAX_SCORE), ("5e00000000000", 5),
    ],
)  # fmt: skip
def test_integer_counts_in_every_spelling(server: ServerProcess, spelled: str, delta: int) -> None:
    player = new_player()
    body = b'{"scoreDelta":%b,"playerId":"%b"}' % (spelled.encode(), player.encode())
    answer = post_body(server, body, Authorization=f"Bearer {token(player)}")
    assert (answer.status, answer.json()) == (200, {"playerId": player, "newScore": delta})


def test_integer_spelled_otherwise_is_the_same_payload(server: ServerProcess) -> None:
    player = new_player()
    headers = {"Authorization": f"Bearer {token(player)}", "Idempotency_Key": "k"}
    answers = [
        post_body(server, b'{"playerId":"%b","scoreDelta":%b}' % (player.encode(), delta), **headers)
        for delta in (b"5", b"5.0", b"50e-1", b"6")
    ]
    assert [answer.status for answer in answers] == [200, 200, 200, 422]
    assert [answer.json()["newScore"] for answer in answers[:3]] == [5, 5, 5]


@pytest.mark.parametrize("coding", ["gzip", "GZIP", "br", "identity, gzip"])
def test_compressed_body_is_415(server: ServerProcess, coding: str) -> None:
    headers = {"Authorization": f"Bearer {token('a')}", "Content_Encoding": coding}
    with Wire(server.port) as wire:
        answer = wire.request("POST", "/update-score", b'{"playerId":"a","scoreDelta":1}', **headers)
        assert_problem(answer, 415, "encoding-not-supported", f"got '{coding}'")
        assert answer.headers["accept-encoding"] == "identity"
        assert wire.request("GET", "/healthz").status == 200


def test_body_that_is_said_to_be_plain_is_read(server: ServerProcess) -> None:
    player = new_player()
    body = json.dumps({"playerId": player, "scoreDelta": 1}).encode()
    answer = post_body(server, body, Authorization=f"Bearer {token(player)}", Content_Encoding="Identity")
    assert answer.status == 200


LONG_TARGETS = ["/leaderboard", "/update-score", "/live-updates", "/", "/nowhere", "/healthz", "/openapi.json"]


@pytest.mark.parametrize("path", LONG_TARGETS)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_long_target_is_414(server: ServerProcess, method: str, path: str) -> None:
    body = b'{"playerId":"a","scoreDelta":1}' if method == "POST" else None
    headers = {"Authorization": f"Bearer {token('a')}"}
    answer = once(server.port, method, f"{path}?{'a&' * 5_000}", body, **headers)
    assert_problem(answer, 414, "target-too-long", "at most 8192 bytes")
    assert answer.headers["access-control-allow-origin"] == "*"


def test_long_target_of_an_upgrade_is_414(server: ServerProcess) -> None:
    with Wire(server.port) as wire:
        assert_problem(wire.upgrade("/live-updates?players=" + "%C5%BD" * 1_400), 414, "target-too-long")


@pytest.mark.parametrize("path", ["/leaderboard", "/live-updates"])
def test_query_has_at_most_16_fields(server: ServerProcess, path: str) -> None:
    for count, status in ((15, {"/leaderboard": 200, "/live-updates": 101}[path]), (16, 400)):
        with Wire(server.port) as wire:
            query = "&".join(["limit=10", *[f"x{number}=1" for number in range(count)]])
            target = f"{path}?{query}"
            answer = wire.upgrade(target) if path == "/live-updates" else wire.request("GET", target)
            assert answer.status == status, answer.body


def test_unknown_board_is_404(server: ServerProcess) -> None:
    detail = "board: expected one of main, weekly, got 'daily'"
    assert_problem(post(server, new_player(), board="daily"), 404, "not-found", detail)
    assert_problem(get(server, "/leaderboard?board=daily"), 404, "not-found", detail)


def other_secret() -> str:
    return issue(b"another secret than the server's, 42 bytes.", "a")


@pytest.mark.parametrize(
    ("make_header", "challenge"),
    [
        (lambda: "", 'Bearer realm="scoreboard"'),
        (lambda: "Basic YTpi", 'Bearer realm="scoreboard"'),
        (lambda: f"Bearer {other_secret()}", "Signature verification failed"),
        (lambda: f"Bearer {token('a', ttl_s=-1)}", "the token has expired"),
        (lambda: f"Bearer {issue(b'x' * 48, 'a', algorithm='HS384')}", "algorithm is not allowed"),
        (lambda: f"Bearer {issue(JWT_SECRET.encode(), '')}", "expected a sub of 1 to 128 characters"),
        (lambda: "Bearer x", 'error="invalid_token"'),
    ],
)
def test_bad_token_is_401_with_a_challenge(
    server: ServerProcess, make_header: Callable[[], str], challenge: str
) -> None:
    answer = post_body(server, b'{"playerId":"a","scoreDelta":1}', Authorization=make_header())
    assert_problem(answer, 401, "unauthorized")
    assert challenge in answer.headers["www-authenticate"]


def test_another_player_is_403_without_the_scope(server: ServerProcess) -> None:
    ada, bob = new_player(), new_player()
    answer = post(server, bob, subject=ada)
    assert_problem(answer, 403, "forbidden", f"the token of '{ada}' may not write '{bob}'")
    assert 'error="insufficient_scope", scope="scores:write"' in answer.headers["www-authenticate"]
    assert post(server, bob, 3, subject=ada, scope="chat scores:write").json()["newScore"] == 3


def test_large_body_is_413_and_closed(server: ServerProcess) -> None:
    with Wire(server.port) as wire:
        answer = wire.request("POST", "/update-score", b" " * (16 * 1024 + 1), Authorization=f"Bearer {token('a')}")
        assert_problem(answer, 413, "body-too-large", "expected a body of at most 16384 bytes")
        assert wire.ended


def test_body_of_16_kib_is_read(server: ServerProcess) -> None:
    player = new_player()
    body = json.dumps({"playerId": player, "scoreDelta": 5}).encode()
    answer = post_body(server, body.ljust(16 * 1024), Authorization=f"Bearer {token(player)}")
    assert answer.json()["newScore"] == 5


def test_too_many_updates_are_429_and_say_when_to_come_back(server: ServerProcess) -> None:
    player = new_player()
    answers = [post(server, player) for _ in range(12)]
    refused = [answer for answer in answers if answer.status == 429]
    assert [answer.status for answer in answers[:5]] == [200] * 5
    assert refused, "expected the burst to be over"
    assert_problem(refused[0], 429, "rate-limited", "expected at most 2 updates a second, 5 at once")
    assert refused[0].headers["retry-after"] == "1"
    assert refused[0].headers["ratelimit-policy"] == '"updates";q=5;w=2'
    assert refused[0].headers["ratelimit"] == '"updates";r=0;t=1'
    assert board(server)[player] == len(answers) - len(refused), "a refused update counts nothing"
    assert post(server, new_player()).status == 200, "another player is another matter"
    wait_until(lambda: post(server, player).status == 200, 5)


def test_game_servers_have_no_limit_by_default(server: ServerProcess) -> None:
    player = new_player()
    assert [post(server, player, scope="scores:write").status for _ in range(15)] == [200] * 15


def test_limit_of_game_servers_says_its_own_rate_and_burst(own_redis: RedisServer, tmp_path: Path) -> None:
    settings = {
        "REDIS_PORT": str(own_redis.port),
        "KAFKA_BROKERS": f"127.0.0.1:{free_port()}",
        "RATE_LIMIT_PER_SECOND": "2",
        "RATE_LIMIT_BURST": "5",
        "RATE_LIMIT_WRITERS_PER_SECOND": "0.25",
        "RATE_LIMIT_WRITERS_BURST": "3",
    }
    server = ServerProcess(tmp_path, settings)
    try:
        server.start()
        wait_until_writable(server)
        game, player = f"game-{new_player()}", new_player()
        bearer = f"Bearer {token(game, 'scores:write')}"
        body = json.dumps({"playerId": player, "scoreDelta": 1}).encode()
        answers = [post(server, player, subject=game, scope="scores:write") for _ in range(4)]
        with Wire(server.port) as wire:  # one that does not come through C
            head = f"POST /update-score HTTP/1.1\r\nHost: x\r\nAuthorization: {bearer}\r\nTransfer-Encoding: chunked"
            wire.send(head.encode() + b"\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
            answers.append(wire.answer())
        assert [answer.status for answer in answers] == [200, 200, 200, 429, 429]
        for refused in answers[3:]:
            assert_problem(refused, 429, "rate-limited", "expected at most 0.25 updates a second, 3 at once")
            assert refused.headers["ratelimit-policy"] == '"updates";q=3;w=12'
            wait_s = int(refused.headers["retry-after"])
            assert 1 <= wait_s <= 4
            assert refused.headers["ratelimit"] == f'"updates";r=0;t={wait_s}'
        own = [post(server, player) for _ in range(6)]
        assert own[-1].headers["ratelimit-policy"] == '"updates";q=5;w=2'
    finally:
        server.stop()


def test_too_many_bad_tokens_are_429_for_that_address_alone(server: ServerProcess) -> None:
    def attempt(address: str, bearer: str) -> Answer:
        headers = {"Authorization": f"Bearer {bearer}", "X-Forwarded-For": f"8.8.8.8, {address}"}
        return post_body(server, json.dumps({"playerId": player, "scoreDelta": 1}).encode(), **headers)

    player = new_player()
    assert [attempt("203.0.113.1", "x").status for _ in range(30)] == [401] * 30
    refused = attempt("203.0.113.1", "x")
    assert_problem(refused, 429, "rate-limited", "too many bad tokens from this address")
    assert int(refused.headers["retry-after"]) >= 1
    assert attempt("203.0.113.2", "x").status == 401
    assert attempt("203.0.113.1", token(player)).status == 200, "a valid token is never turned away"
    assert post_body(server, b"{}", **{"X-Forwarded-For": "203.0.113.1"}).status == 401, "nor is none at all counted"


# ---------------------------------------------------------------------- GET /leaderboard


def test_leaderboard_is_highest_first_and_ties_by_id_descending(server: ServerProcess, own_redis: RedisServer) -> None:
    # Bytes decide, not letters: é is 0xC3 0xA9, behind z.
    for player, score in (("a", 3), ("z", 3), ("é", 3), ("B", 3), ("low", -5), ("high", 9)):
        assert post(server, player, score, board="weekly", subject="setter", scope="scores:write").status == 200
    shown = [player for player in board(server, "board=weekly&limit=1000") if not player.startswith("player")]
    assert shown == ["high", "é", "z", "a", "B", "low"]


def test_limit_goes_from_1_to_1000_and_is_10_by_default(server: ServerProcess, own_redis: RedisServer) -> None:
    with connect(own_redis) as client:
        client.zadd("leaderboard", {f"extra{number}": -1000 - number for number in range(1100)})
        try:
            sizes = {query: len(board(server, query)) for query in ("", "limit=1", "limit=10", "limit=1000")}
        finally:
            client.zrem("leaderboard", *(f"extra{number}" for number in range(1100)))
    assert sizes == {"": 10, "limit=1": 1, "limit=10": 10, "limit=1000": 1000}


@pytest.mark.parametrize(
    "limit", ["0", "1001", "-1", "ten", "", "1.0", "+5", "1e2", "%00", "٣", "99999999999999999999"]
)
def test_other_limit_is_400(server: ServerProcess, limit: str) -> None:
    path = f"/leaderboard?limit={limit.encode().decode('latin-1')}"
    assert_problem(get(server, path), 400, "invalid-request", "limit: expected an integer from 1 to 1000, got '")


def test_player_sees_what_was_answered(server: ServerProcess) -> None:
    player = new_player()
    for number in range(1, 31):
        assert post(server, player, scope="scores:write").json()["newScore"] == number
        assert board(server)[player] == number


# ---------------------------------------------------------------------- the others


@pytest.mark.parametrize("path", [*READABLE, "/leaderboard?limit=0", "/nowhere", "/update-score", "/live-updates"])
def test_head_answers_as_get_does_without_the_body(server: ServerProcess, path: str) -> None:
    with Wire(server.port) as wire:
        head, get = wire.request("HEAD", path), wire.request("GET", path)
        assert head.status == get.status
        assert head.headers["content-type"] == get.headers["content-type"]
        assert int(head.headers["content-length"]) > 0


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/update-score", "POST, OPTIONS"),
        ("PUT", "/update-score", "POST, OPTIONS"),
        ("DELETE", "/leaderboard", "GET, HEAD, OPTIONS"),
        ("POST", "/healthz", "GET, HEAD, OPTIONS"),
        ("POST", "/", "GET, HEAD, OPTIONS"),
    ],
)
def test_other_method_is_405_and_says_which(server: ServerProcess, method: str, path: str, allow: str) -> None:
    answer = once(server.port, method, path)
    assert_problem(answer, 405, "method-not-allowed", f"expected one of {allow}")
    assert answer.headers["allow"] == allow


@pytest.mark.parametrize("path", ["/nowhere", "/leaderboard/", "/update-score/x", "/../etc/passwd", "/index.html"])
def test_unknown_path_is_404(server: ServerProcess, path: str) -> None:
    assert_problem(get(server, path), 404, "not-found")


def test_plain_get_of_the_websocket_is_426(server: ServerProcess) -> None:
    answer = get(server, "/live-updates")
    assert_problem(answer, 426, "upgrade-required", "expected a WebSocket upgrade")
    assert answer.headers["upgrade"] == "websocket"


def test_health_readiness_and_metrics_speak_for_the_process(server: ServerProcess) -> None:
    assert get(server, "/healthz").json() == {"alive": True}
    ready = get(server, "/readyz").json()
    assert ready["ready"]
    assert ready["read"] == {"ok": True, "source": "redis"}
    assert ready["write"] == {"ok": True}
    nobody = {"ok": False, "detail": "Kafka does not answer"}
    wait_until(lambda: get(server, "/readyz").json()["live"] == nobody, message="there is no Kafka here")
    text = get(server, "/metrics").body.decode()
    assert re.search(r'^scoreboard_http_requests_total\{route="/update-score",status="200"\} \d+', text, re.MULTILINE)
    assert "scoreboard_write_ready 1.0" in text


def test_live_page_and_its_parts_are_served(server: ServerProcess) -> None:
    page = get(server, "/")
    assert (page.status, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    for part in re.findall(rb'(?:src|href)="(/?[\w.-]+)"', page.body):
        assert get(server, "/" + part.decode().lstrip("/")).status == 200


# ---------------------------------------------------------------------- CORS


@pytest.mark.parametrize("path", ["/leaderboard", "/nowhere", "/leaderboard?limit=0", "/"])
def test_any_origin_may_read_by_default(server: ServerProcess, path: str) -> None:
    headers = get(server, path, Origin=ORIGIN).headers
    assert headers["access-control-allow-origin"] == "*"
    exposed = set(headers["access-control-expose-headers"].split(", "))
    assert exposed >= {"Retry-After", "RateLimit", "Idempotent-Replayed", "X-Request-Id"}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(("GET", path) for path in ("/leaderboard", "/healthz", "/readyz", "/metrics", "/nowhere", "/live-updates")),
        ("GET", "/leaderboard?limit=0"),
        ("HEAD", "/leaderboard"),
        ("POST", "/leaderboard"),
        ("POST", "/update-score"),
        ("OPTIONS", "/update-score"),
    ],
)
def test_what_is_true_only_now_is_stored_by_no_cache(server: ServerProcess, method: str, path: str) -> None:
    with Wire(server.port) as wire:
        for _ in range(2):  # the second time from where it is remembered
            assert wire.request(method, path, b"" if method == "POST" else None).headers["cache-control"] == "no-store"


def test_update_is_stored_by_no_cache(server: ServerProcess, listed_server: ServerProcess) -> None:
    assert post(server, new_player()).headers["cache-control"] == "no-store"
    assert post(server, new_player(), subject="x").headers["cache-control"] == "no-store"
    assert get(listed_server, "/leaderboard", Origin=ORIGIN).headers["cache-control"] == "no-store"


@pytest.mark.parametrize("path", ["/", "/style.css", "/openapi.json"])
def test_file_is_kept_and_asked_for_each_time(server: ServerProcess, path: str) -> None:
    answer = get(server, path)
    assert answer.headers["cache-control"] == "no-cache"
    again = get(server, path, If_None_Match=answer.headers["etag"])
    assert (again.status, again.headers["cache-control"]) == (304, "no-cache")


@pytest.mark.parametrize("path", ["/update-score", "/leaderboard"])
def test_preflight_allows_what_a_game_sends(server: ServerProcess, path: str) -> None:
    wanted = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    with Wire(server.port) as wire:
        answer = wire.request("OPTIONS", path, Origin=ORIGIN, **wanted)
        assert (answer.status, answer.body) == (204, b"")
        assert answer.headers["access-control-allow-origin"] == "*"
        assert "POST" in answer.headers["access-control-allow-methods"]
        allowed = answer.headers["access-control-allow-headers"].lower()
        assert {"authorization", "content-type", "idempotency-key", "x-request-id"} <= set(allowed.split(", "))
        by_tools = {"traceparent", "tracestate", "baggage", "sentry-trace", "x-requested-with", "cache-control"}
        assert by_tools <= set(allowed.split(", "))
        assert wire.request("GET", "/healthz").status == 200


@pytest.mark.parametrize("path", ["/leaderboard", "/update-score", "/nowhere", "/healthz"])
def test_listed_origins_and_no_others_may_read(own_redis: RedisServer, listed_server: ServerProcess, path: str) -> None:
    mine, other, none = (get(listed_server, path, **origin).headers for origin in (
        {"Origin": ORIGIN}, {"Origin": "https://evil.example"}, {}
    ))  # fmt: skip
    assert mine["access-control-allow-origin"] == ORIGIN
    assert "access-control-allow-origin" not in other
    assert "access-control-allow-origin" not in none
    assert mine["vary"] == other["vary"] == none["vary"] == "Origin"
    preflight = once(listed_server.port, "OPTIONS", path, Origin=ORIGIN)
    assert preflight.headers["access-control-allow-origin"] == ORIGIN


@pytest.fixture(scope="module")
def listed_server(own_redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    settings = {"REDIS_PORT": str(own_redis.port), "CORS_ORIGINS": f"https://other.example,{ORIGIN}"}
    process = ServerProcess(tmp_path_factory.mktemp("listed"), settings)
    process.start()
    yield process
    process.stop()


# ---------------------------------------------------------------------- when Redis does not answer


class Site:
    """A server with a Redis, a database and a Kafka that a test may take away."""

    def __init__(self, server: ServerProcess, redis: RedisServer, database_url: str) -> None:
        self.server = server
        self.redis = redis
        self.database_url = database_url


@pytest.fixture
def site(
    tmp_path: Path, fresh_redis: Callable[..., RedisServer], database_url: str, kafka_broker: KafkaBroker
) -> Iterator[Site]:
    """Two players in the database, `ann` with 30 and `bob` with 20, and in Redis what was made of them."""
    store.migrate(database_url)
    store_scores(database_url, ("main", "ann", 30), ("main", "bob", 20))
    redis = fresh_redis(appendfsync="always")
    settings = {
        "REDIS_PORT": str(redis.port),
        "DATABASE_URL": database_url,
        "KAFKA_BROKERS": kafka_broker.brokers,
        "KAFKA_TOPIC": f"score-updates-{redis.port}",
        "REQUEST_DEADLINE_MS": str(DEADLINE_MS),
    }
    server = ServerProcess(tmp_path, settings)
    server.start()
    wait_until_writable(server)
    yield Site(server, redis, database_url)
    server.stop()


needs_everything = [pytest.mark.postgres, pytest.mark.kafka]


def timed(ask: Callable[[], Answer]) -> Answer:
    """An answer that came before its deadline, and a little."""
    started_s = time.monotonic()
    answer = ask()
    assert time.monotonic() - started_s < DEADLINE_MS / 1000 + LITTLE_S
    return answer


def assert_refused(answer: Answer, *kinds: str) -> None:
    assert answer.status == 503, answer.body
    assert answer.json()["type"].removeprefix("urn:scoreboard:") in kinds
    assert int(answer.headers["retry-after"]) >= 1


def assert_read_from_database(server: ServerProcess) -> None:
    answer = timed(lambda: get(server, "/leaderboard"))
    assert answer.status == 200
    assert answer.headers["scoreboard-source"] == "database"
    assert answer.json()[:2] == [{"playerId": "ann", "score": 30}, {"playerId": "bob", "score": 20}]
    ready = get(server, "/readyz")
    assert ready.status == 200, "it can still read"
    assert ready.json()["read"] == {"ok": True, "source": "database"}
    assert not ready.json()["write"]["ok"]
    assert ready.json()["write"]["detail"]


class TestWithoutRedis:
    pytestmark = needs_everything

    def test_empty_redis_is_filled_from_the_database_before_anything_counts(self, site: Site) -> None:
        assert board(site.server) == {"ann": 30, "bob": 20}
        assert post(site.server, "ann", 5).json()["newScore"] == 35

    def test_killed_redis_means_503_not_applied_and_reads_from_the_database(self, site: Site) -> None:
        assert post(site.server, "ann", 5).json()["newScore"] == 35
        site.redis.kill()
        for _ in range(3):
            assert_refused(timed(lambda: post(site.server, "ann", 1)), "not-applied")
        assert_read_from_database(site.server)
        site.redis.start()
        wait_until_writable(site.server)
        assert post(site.server, "ann", 1).json()["newScore"] == 36, "the refused ones did not count"
        assert "scoreboard-source" not in get(site.server, "/leaderboard").headers

    def test_stopped_redis_means_503_within_the_deadline_and_says_when_the_outcome_is_unknown(self, site: Site) -> None:
        assert post(site.server, "ann", 5).json()["newScore"] == 35
        site.redis.pause()
        try:
            first = timed(lambda: post(site.server, "ann", 1))
            assert_refused(first, "outcome-unknown")
            for _ in range(2):
                assert_refused(timed(lambda: post(site.server, "bob", 1)), "not-applied")
            assert_read_from_database(site.server)
        finally:
            site.redis.resume()
        wait_until_writable(site.server)
        assert post(site.server, "bob", 1).json()["newScore"] == 21
        assert post(site.server, "ann", 10).json()["newScore"] in (45, 46)

    def test_server_that_was_stopped_too_says_of_what_waited_that_its_outcome_is_unknown(self, site: Site) -> None:
        """It said 500, as of a fault of its own: it was the last resort that woke first."""
        player = new_player()
        body = json.dumps({"playerId": player, "scoreDelta": 1}).encode()
        posted = request_bytes("POST", "/update-score", body, Authorization=f"Bearer {token(player)}")
        site.redis.pause()
        try:
            with Wire(site.server.port) as wire:
                wire.send(posted)
                time.sleep(DEADLINE_MS / 2000)  # it is with Redis
                site.server.pause()
                try:
                    time.sleep(DEADLINE_MS / 1000 + 3.5)  # longer than any request may wait for its answer
                finally:
                    site.server.resume()
                assert_refused(wire.answer(), "outcome-unknown")
        finally:
            site.redis.resume()
        wait_until_writable(site.server)

    def test_many_updates_into_a_stopped_redis_are_all_answered_in_time(self, site: Site) -> None:
        site.redis.pause()
        answers: list[Answer] = []
        try:
            ask = [
                threading.Thread(target=lambda: answers.append(timed(lambda: post(site.server, new_player()))))
                for _ in range(30)
            ]
            for thread in ask:
                thread.start()
            for thread in ask:
                thread.join()
        finally:
            site.redis.resume()
        assert len(answers) == 30, "one took too long, or got no answer"
        for answer in answers:
            assert_refused(answer, "outcome-unknown", "not-applied")

    def test_flushed_redis_is_filled_again_before_an_update_is_accepted(self, site: Site) -> None:
        with connect(site.redis) as client:
            for _ in range(3):
                client.flushall()
                answer = timed(lambda: post(site.server, "ann", 0))
                assert answer.status == 503 or answer.json()["newScore"] == 30
                wait_until_writable(site.server)
                assert post(site.server, "ann", 0).json()["newScore"] == 30
        assert board(site.server) == {"ann": 30, "bob": 20}

    @pytest.mark.parametrize(
        "harm",
        [
            lambda client: client.delete("leaderboard"),
            lambda client: client.delete("player:ann:score"),
            lambda client: client.delete("player:ann:score") and client.hset("player:ann:score", "a", "b"),
            lambda client: client.set("player:ann:score", "nonsense"),
        ],
        ids=["no leaderboard", "no score", "score is a hash", "score is no number"],
    )
    def test_damage_is_noticed_and_mended_from_the_database(
        self, site: Site, harm: Callable[[redis_client.Redis], Any]
    ) -> None:
        with connect(site.redis) as client:
            harm(client)
            answer = timed(lambda: post(site.server, "ann", 0))
            assert_refused(answer, "not-applied")
            wait_until(lambda: post(site.server, "ann", 0).status == 200, 15, "the damage was not mended")
            assert post(site.server, "ann", 1).json()["newScore"] == 31
            assert client.zscore("leaderboard", "ann") == 31
            assert client.get("player:ann:score") == b"31"
        assert board(site.server) == {"ann": 31, "bob": 20}

    def test_leaderboard_of_another_type_is_replaced(self, site: Site) -> None:
        with connect(site.redis) as client:
            client.delete("leaderboard")
            client.set("leaderboard", "x")
            answer = timed(lambda: get(site.server, "/leaderboard"))
            assert (answer.status, answer.headers["scoreboard-source"]) == (200, "database")
            assert_refused(timed(lambda: post(site.server, "ann", 1)), "not-applied")
        wait_until(lambda: post(site.server, "ann", 0).status == 200, 15, "the damage was not mended")
        assert board(site.server) == {"ann": 30, "bob": 20}

    def test_redis_that_may_evict_is_refused_by_the_name_of_the_setting(self, site: Site) -> None:
        with connect(site.redis) as client:
            client.config_set("maxmemory-policy", "allkeys-lru")
            client.client_kill_filter(_type="normal", skipme=True)
            wait_until(lambda: not can_write(site.server))
            detail = "maxmemory-policy: expected noeviction, got allkeys-lru"
            wait_until(lambda: detail in get(site.server, "/readyz").json()["write"].get("detail", ""))
            answer = wait_until(
                lambda: (answer := post(site.server, "ann")) and detail in answer.body.decode() and answer
            )
            assert_problem(answer, 503, "not-applied", detail)
            assert_read_from_database(site.server)
            client.config_set("maxmemory-policy", "noeviction")
        wait_until_writable(site.server)
        assert post(site.server, "ann", 1).json()["newScore"] == 31


@pytest.mark.postgres
def test_without_redis_and_database_reads_are_503_in_time(
    tmp_path: Path, fresh_redis: Callable[..., RedisServer], tmp_path_factory: pytest.TempPathFactory
) -> None:
    redis = fresh_redis()
    with connect(redis) as client:
        trust(client)
    database = PostgresServer(tmp_path_factory.mktemp("own-postgres") / "data", options={"fsync": "off"})
    settings = {"REDIS_PORT": str(redis.port), "DATABASE_URL": database.url, "REQUEST_DEADLINE_MS": str(DEADLINE_MS)}
    server = ServerProcess(tmp_path, settings)
    with contextlib.ExitStack() as stack:
        stack.callback(server.stop)
        stack.callback(database.stop)
        database.start()
        store.migrate(database.url)
        store_scores(database.url, ("main", "ann", 30))
        server.start()
        wait_until_writable(server)
        redis.kill()
        assert wait_until(lambda: get(server, "/leaderboard").headers.get("scoreboard-source")) == "database"
        database.pause()
        time.sleep(1.1)  # what was read before serves for a second
        answers: list[Answer] = []
        readers = [threading.Thread(target=lambda: answers.append(get(server, "/leaderboard"))) for _ in range(8)]
        started_s = time.monotonic()
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        assert time.monotonic() - started_s < 1.5 + LITTLE_S, "expected no reader to wait for another's failure"
        for answer in answers:
            assert_refused(answer, "unavailable")
        assert get(server, "/readyz").status == 503
        assert get(server, "/healthz").status == 200
        database.resume()


@pytest.mark.postgres
@pytest.mark.parametrize("deadline_ms", [50, 100])
def test_shortest_deadline_leaves_time_for_the_database(
    tmp_path: Path, fresh_redis: Callable[..., RedisServer], database_url: str, deadline_ms: int
) -> None:
    store.migrate(database_url)
    store_scores(database_url, ("main", "ann", 30))
    redis = fresh_redis()
    with connect(redis) as client:
        trust(client)
    settings = {"REDIS_PORT": str(redis.port), "DATABASE_URL": database_url, "REQUEST_DEADLINE_MS": str(deadline_ms)}
    server = ServerProcess(tmp_path, settings)
    try:
        server.start()
        wait_until_writable(server)
        redis.pause()  # it accepts connections, and answers nothing
        try:
            answer = wait_until(
                lambda: (found := get(server, "/leaderboard")).headers.get("scoreboard-source") and found,
                10,
                "the database was never asked",
            )
            assert answer.json() == [{"playerId": "ann", "score": 30}]
        finally:
            redis.resume()
    finally:
        server.stop()


# ---------------------------------------------------------------------- the process


def test_stop_answers_what_is_in_flight_and_ends_quietly(tmp_path: Path, own_redis: RedisServer) -> None:
    server = ServerProcess(tmp_path, {"REDIS_PORT": str(own_redis.port)})
    server.start()
    wait_until_writable(server)
    player = new_player()
    body = json.dumps({"playerId": player, "scoreDelta": 5}).encode()
    with Wire(server.port) as wire:
        whole = f"POST /update-score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token(player)}\r\n"
        data = whole.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body
        wire.send(data[:-3])
        wait_until(lambda: get(server, "/healthz").status == 200)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        wait_until(lambda: server.status_of("/healthz") is None)
        wire.send(data[-3:])
        answer = wire.answer()
        assert (answer.status, answer.json()["newScore"], answer.headers["connection"]) == (200, 5, "close")
        stopping.join()
    assert server.status == 0
    assert not re.search("Traceback|never awaited|destroyed|Warning|Exception ignored", server.output_tail(1000))


def test_taken_port_is_said_in_one_line(tmp_path: Path, server: ServerProcess) -> None:
    second = ServerProcess(tmp_path, {}, port=server.port)
    second.launch()
    wait_until(lambda: not second.running)
    assert second.status == 2
    expected = f"scoreboard: PORT: expected a free port at HOST=127.0.0.1, got {server.port}: another"
    assert expected in second.output_tail()
    assert "Traceback" not in second.output_tail(1000)


def test_wrong_settings_are_all_said_and_nothing_starts(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path, {"BOARDS": "a b", "REDIS_PORT": "0", "JWT_SECRET": "sesame"})
    server.launch()
    wait_until(lambda: not server.running)
    assert server.status == 2
    said = server.output_tail()
    for variable in ("BOARDS", "REDIS_PORT", "JWT_SECRET"):
        assert f"{variable}: expected" in said
    assert "sesame" not in said
    assert "Traceback" not in said
