"""Behind HAProxy, with ops/haproxy.cfg as it is documented, and with the check that it makes when told no more."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis as redis_client
from websockets.sync.client import connect

from server.embedded import ADDRESS, RedisServer, free_port
from tests.client import token, trust, wait_until_writable
from tests.haproxy import HAProxy
from tests.services import ServerProcess, UnavailableError, wait_until
from tests.wire import Wire, request_bytes

pytestmark = pytest.mark.redis
CHECK = "option httpchk GET /readyz"
PLAIN_CHECK = {CHECK: "option httpchk"}


@pytest.fixture
def servers(tmp_path: Path, redis_server: RedisServer, redis: redis_client.Redis) -> Iterator[list[ServerProcess]]:
    trust(redis)
    settings = {
        "REDIS_HOST": redis_server.host,
        "REDIS_PORT": str(redis_server.port),
        "KAFKA_BROKERS": f"{ADDRESS}:{free_port()}",
        "DATABASE_URL": f"postgresql://{ADDRESS}:{free_port()}/none",
        "TRUSTED_PROXIES": ADDRESS,
        "DRAIN_DELAY_MS": "3000",
    }
    servers = [ServerProcess(tmp_path, settings) for _ in range(2)]
    for server in servers:
        server.start()
    for server in servers:
        wait_until_writable(server)
    yield servers
    for server in servers:
        server.kill()


@pytest.fixture
def proxied(tmp_path: Path, servers: list[ServerProcess]) -> Iterator[Callable[..., HAProxy]]:
    started: list[HAProxy] = []

    def start(instead: dict[str, str] | None = None) -> HAProxy:
        try:
            haproxy = HAProxy(tmp_path, [server.port for server in servers], instead)
        except UnavailableError as error:
            pytest.skip(str(error))
        started.append(haproxy)
        haproxy.start()
        return haproxy

    yield start
    for haproxy in started:
        haproxy.stop()


@pytest.mark.parametrize(("instead", "code"), [({}, "200"), (PLAIN_CHECK, "204")])
def test_check_is_answered_at_once(proxied: Callable[..., HAProxy], instead: dict[str, str], code: str) -> None:
    haproxy = proxied(instead)
    passed = {"one": ("UP", "L7OK", code), "two": ("UP", "L7OK", code)}
    wait_until(lambda: haproxy.checks() == passed, 10, str(haproxy.checks()))


def test_draining_server_is_taken_out(proxied: Callable[..., HAProxy], servers: list[ServerProcess]) -> None:
    haproxy = proxied()
    wait_until(lambda: haproxy.checks()["one"][0] == "UP", 10)
    os.kill(servers[0].pid, signal.SIGTERM)
    wait_until(lambda: haproxy.checks()["one"] == ("DOWN", "L7STS", "503"), 10)
    with Wire(haproxy.port) as wire:
        assert [wire.request("GET", "/healthz").status for _ in range(6)] == [200] * 6


def test_requests_and_watchers_pass(proxied: Callable[..., HAProxy]) -> None:
    haproxy = proxied()
    body = json.dumps({"playerId": "ann", "scoreDelta": 5}).encode()
    bearer = f"Authorization: Bearer {token('ann')}\r\n".encode()
    head = b"POST /update-score HTTP/1.1\r\nHost: x\r\n" + bearer
    with Wire(haproxy.port) as wire:
        wire.send(head + b"Transfer-Encoding: chunked\r\n\r\n%x;a=b\r\n%b\r\n0\r\nX-Sum: 1\r\n\r\n" % (len(body), body))
        assert wire.answer().json() == {"playerId": "ann", "newScore": 5}
    with Wire(haproxy.port) as wire:
        wire.send(request_bytes("POST", "/update-score", body, Authorization=f"Bearer {token('ann')}"))
        wire._socket.shutdown(socket.SHUT_WR)
        assert wire.answer().json() == {"playerId": "ann", "newScore": 10}
    with connect(f"ws://{ADDRESS}:{haproxy.port}/live-updates") as watcher:
        assert json.loads(watcher.recv(10))["type"] in ("status", "leaderboardUpdate")
