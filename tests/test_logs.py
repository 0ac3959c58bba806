"""The log, the names of requests, and where the server tells its figures."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from server.embedded import ADDRESS, RedisServer, free_port, free_ports
from tests.client import can_write, connect, get, post, post_body, token, trust
from tests.services import ROOT, ServerProcess, wait_until
from tests.wire import Wire, once

OUR_ID: Final = r"[0-9a-f]{8}-[0-9a-f]+"
SAY: Final = (
    "import logging, sys; from server import logs; logs.configure(*sys.argv[1:2]);"
    "logging.getLogger('tests').warning('two\\nlines, a \"quote\", a \\x1b and %s', 'half of \\ud83d');"
    "logging.getLogger('tests').error('whole', extra={'request_id': 'r-1'})"
)


@pytest.fixture(scope="module")
def redis_of_ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """Not the shared one, which is emptied for each test: the servers here live for several."""
    server = RedisServer(tmp_path_factory.mktemp("logs") / "redis")
    try:
        server.start()
        with connect(server) as client:
            trust(client)
        yield server
    finally:
        server.stop()


def settings_with(redis: RedisServer, **more: str) -> dict[str, str]:
    nowhere = f"{ADDRESS}:{free_port()}"
    stores = {"KAFKA_BROKERS": nowhere, "DATABASE_URL": f"postgresql://{nowhere}/none"}
    return {"REDIS_HOST": redis.host, "REDIS_PORT": str(redis.port), **stores, **more}


@pytest.fixture(scope="module")
def metrics_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, redis_of_ours: RedisServer, metrics_port: int
) -> Iterator[ServerProcess]:
    """It tells its figures on a port of their own, and calls 20 ms slow."""
    settings = settings_with(redis_of_ours, METRICS_PORT=str(metrics_port), SLOW_REQUEST_MS="20")
    process = ServerProcess(tmp_path_factory.mktemp("logs"), settings)
    try:
        process.start()
        wait_until(lambda: can_write(process), 20, "it takes no updates")
        yield process
    finally:
        process.stop()


def log_of(server: ServerProcess) -> list[dict[str, Any]]:
    return [json.loads(line) for line in server.output_tail(1000).splitlines()]


# ---------------------------------------------------------------------- requests have names


@pytest.mark.redis
def test_request_id_that_was_given_is_echoed(server: ServerProcess) -> None:
    for given in ("a", "f47ac10b-58cc-4372-a567-0e02b2c3d479", "!~" * 64):
        assert get(server, "/healthz", X_Request_Id=given).headers["x-request-id"] == given
        assert post_body(server, b"{", X_Request_Id=given).headers["x-request-id"] == given


@pytest.mark.redis
def test_request_id_that_is_made_is_no_other_requests(server: ServerProcess) -> None:
    with Wire(server.port) as wire:
        answers = [wire.request(method, path) for method in ("GET", "HEAD") for path in ("/healthz", "/no", "/")]
    answers += [post(server, "ann"), post_body(server, b"{"), get(server, "/healthz")]
    made = [answer.headers["x-request-id"] for answer in answers]
    assert all(re.fullmatch(OUR_ID, each) for each in made), made
    assert len(set(made)) == len(answers)


@pytest.mark.redis
@pytest.mark.parametrize("bad", ["x" * 129, "two words", "tab\there", "del\x7f", "é", "\xff"], ids=ascii)
def test_request_id_that_could_do_harm_is_replaced(server: ServerProcess, bad: str) -> None:
    # Other control characters do not get this far: uWebSockets takes no header that has one.
    assert re.fullmatch(OUR_ID, get(server, "/healthz", X_Request_Id=bad).headers["x-request-id"])


# ---------------------------------------------------------------------- where figures are told


@pytest.mark.redis
def test_metrics_port_takes_the_figures_away_from_the_public_one(server: ServerProcess, metrics_port: int) -> None:
    assert get(server, "/healthz").status == 200
    assert get(server, "/metrics").status == 404
    told = once(metrics_port, "GET", "/metrics").body.decode()
    assert re.search(r'^scoreboard_http_requests_total\{route="/healthz",status="200"\} \d', told, re.MULTILINE)


@pytest.mark.redis
def test_port_of_the_figures_that_is_taken_is_said_with_its_variable(server: ServerProcess, tmp_path: Path) -> None:
    second = ServerProcess(tmp_path, {"METRICS_PORT": str(server.port), "REDIS_PORT": str(free_port())})
    second.launch()
    try:
        wait_until(lambda: not second.running, 20)
    finally:
        second.kill()
    assert second.status == 2
    assert "METRICS_PORT: expected a free port" in second.output_tail()


@pytest.mark.redis
def test_each_worker_has_a_port_of_its_own_for_its_figures(redis_of_ours: RedisServer, tmp_path: Path) -> None:
    first, second = free_ports(2)
    workers = ServerProcess(tmp_path, settings_with(redis_of_ours, WORKERS="2", METRICS_PORT=str(first)))
    try:
        workers.start()
        for port in (first, second):
            wait_until(lambda port=port: owner_of(port), 20)  # type: ignore[misc]
            assert b"\nscoreboard_write_ready " in once(port, "GET", "/metrics").body
        assert owner_of(first) != owner_of(second)
    finally:
        workers.stop()


def owner_of(port: int) -> str | None:
    """The process id of who listens there."""
    done = subprocess.run(["ss", "-Hltnp", f"sport = :{port}"], capture_output=True, text=True, check=True)
    found = re.search(r"pid=(\d+)", done.stdout)
    return found[1] if found else None


# ---------------------------------------------------------------------- lines


def test_whatever_is_said_is_one_json_object_a_line() -> None:
    done = subprocess.run([sys.executable, "-c", SAY], cwd=ROOT, capture_output=True, check=True)
    first, second = [json.loads(line) for line in done.stderr.splitlines()]
    assert first["message"] == 'two\nlines, a "quote", a \x1b and half of \\ud83d'
    assert (first["level"], first["logger"]) == ("warning", "tests")
    assert second["requestId"] == "r-1"
    assert second["message"] == "whole"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", second["time"])


def test_terminal_gets_text_that_can_be_read() -> None:
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, "-c", SAY], cwd=ROOT, stderr=theirs, check=True)
    os.close(theirs)
    said = os.read(ours, 10_000).decode()
    os.close(ours)
    assert re.search(r"^\d{4}-\S+ \S+ ERROR tests: whole\r$", said, re.MULTILINE)


@pytest.mark.redis
def test_log_format_text_is_text_wherever_it_goes(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path, {"LOG_FORMAT": "text", "REDIS_PORT": str(free_port())})
    try:
        server.start()
    finally:
        server.stop()
    lines = server.output_tail(1000).splitlines()
    assert any(re.fullmatch(r"\S+ \S+ INFO __main__: listening on \S+", line) for line in lines), lines
    assert not any(line.startswith("{") for line in lines)


@pytest.mark.redis
def test_slow_request_is_logged_with_its_name_and_its_parts_and_no_token(
    server: ServerProcess, redis_of_ours: RedisServer
) -> None:
    secret = token("ann")
    with connect(redis_of_ours) as client:
        client.client_pause(150)
    headers = {"Authorization": f"Bearer {secret}", "X-Request-Id": "slow-1"}
    assert post_body(server, b'{"playerId":"ann","scoreDelta":1}', **headers).status == 200
    (line,) = wait_until(lambda: [it for it in log_of(server) if it.get("requestId") == "slow-1"])
    assert line["level"] == "warning"
    said = re.fullmatch(
        r"request slow-1 took (\d+) ms \((\d+) ms until its batch was sent, (\d+) ms in Redis with 0 others\)"
        r" until it was answered with 200",
        line["message"],
    )
    assert said, line["message"]
    took, waited, in_redis = map(int, said.groups())
    assert took > 20
    assert waited + in_redis <= took + 2  # each is rounded
    for secret_part in (secret, *secret.split(".")[1:]):
        assert secret_part not in server.output_tail(1000)


@pytest.mark.redis
def test_server_that_is_not_on_a_terminal_logs_json(server: ServerProcess, redis_of_ours: RedisServer) -> None:
    with connect(redis_of_ours) as client:
        client.set("leaderboard", 'no\n"list"')  # the last of these tests: the board is damaged from here on
    assert post(server, "bob").status == 503
    wait_until(lambda: any("WRONGTYPE" in it["message"] or "another type" in it["message"] for it in log_of(server)))
    for line in log_of(server):
        assert {"time", "level", "logger", "pid", "message"} <= set(line)
