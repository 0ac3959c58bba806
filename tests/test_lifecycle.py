"""The life of a server: what it checks at its start, and how it ends without losing a request."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis as redis_client

from server.embedded import ADDRESS, RedisServer, free_port
from tests.client import get, token, trust, wait_until_writable
from tests.services import ROOT, ServerProcess, environment, wait_until
from tests.wire import Wire, request_bytes

pytestmark = pytest.mark.redis

MANY = 1000
"""WebSockets."""


@pytest.fixture
def new_server(
    tmp_path: Path, redis_server: RedisServer, redis: redis_client.Redis
) -> Iterator[Callable[..., ServerProcess]]:
    """Makes servers that take updates."""
    trust(redis)
    started: list[ServerProcess] = []

    def start(**more: str) -> ServerProcess:
        settings = {
            "REDIS_HOST": redis_server.host,
            "REDIS_PORT": str(redis_server.port),
            "KAFKA_BROKERS": f"{ADDRESS}:{free_port()}",
            "DATABASE_URL": f"postgresql://{ADDRESS}:{free_port()}/none",
            "RATE_LIMIT_PER_SECOND": "0",
            **more,
        }
        process = ServerProcess(tmp_path, settings)
        started.append(process)
        process.start()
        wait_until_writable(process)
        return process

    yield start
    for process in started:
        process.kill()


def terminate(server: ServerProcess) -> None:
    os.kill(server.pid, signal.SIGTERM)


def refuses(port: int) -> bool:
    try:
        Wire(port).close()
    except ConnectionRefusedError:
        return True
    return False


def update(player: str) -> bytes:
    body = b'{"playerId":"%s","scoreDelta":1}' % player.encode()
    return request_bytes("POST", "/update-score", body, Authorization=f"Bearer {token(player)}")


def test_while_it_drains_it_serves_as_ever_but_keeps_no_connection(new_server: Callable[..., ServerProcess]) -> None:
    server = new_server(DRAIN_DELAY_MS="600000")
    with Wire(server.port) as before, Wire(server.port) as idle:
        assert "connection" not in before.request("GET", "/healthz").headers
        terminate(server)
        wait_until(lambda: server.status_of("/readyz") == 503)
        assert get(server, "/readyz").json()["draining"] is True
        before.send(update("ann"))
        answer = before.answer()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert before.ended
        assert get(server, "/healthz").headers["connection"] == "close"
        assert idle.request("GET", "/healthz").status == 200
    with Wire(server.port) as watcher:
        assert watcher.upgrade("/live-updates").status == 101
    assert server.running
    terminate(server)  # a second signal does not wait for the delay
    assert server.wait(10) == 128 + signal.SIGTERM


def test_connection_made_before_the_port_closed_gets_its_answer(new_server: Callable[..., ServerProcess]) -> None:
    """Clients with one connection for each request: each is refused, or answered; none is reset."""
    server = new_server()
    broken: list[str] = []
    answered: list[int] = []
    under_way = threading.Barrier(5)

    def play(player: str) -> None:
        posted = update(player)
        count = 0
        under_way.wait()
        while True:
            try:
                wire = Wire(server.port)
            except ConnectionRefusedError:
                break
            try:
                with wire:
                    wire.send(posted)
                    count += wire.answer().status == 200
            except (OSError, EOFError) as error:
                broken.append(repr(error))
        answered.append(count)

    threads = [threading.Thread(target=play, args=(f"player{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    under_way.wait()
    wait_until(lambda: get(server, "/leaderboard").body != b"[]")
    terminate(server)
    for thread in threads:
        thread.join(30)
    assert server.wait(10) == 0
    assert broken == []
    assert all(answered)


def test_connection_that_waits_to_be_accepted_gets_its_answer(new_server: Callable[..., ServerProcess]) -> None:
    server = new_server()
    server.pause()
    wires = [Wire(server.port) for _ in range(50)]
    try:
        for number, wire in enumerate(wires):
            wire.send(update(f"player{number}"))
        terminate(server)
        server.resume()
        assert {wire.answer().status for wire in wires} == {200}
    finally:
        for wire in wires:
            wire.close()
    assert server.wait(10) == 0


def test_request_that_follows_on_an_open_connection_is_answered(new_server: Callable[..., ServerProcess]) -> None:
    server = new_server()
    with Wire(server.port) as open_connection, Wire(server.port) as slow:
        open_connection.request("GET", "/healthz")
        posted = update("ann")
        slow.send(posted[:-1])  # in flight: holds up the end
        terminate(server)
        wait_until(lambda: refuses(server.port))
        open_connection.send(update("bob"))
        answer = open_connection.answer()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        slow.send(posted[-1:])
        assert slow.answer().status == 200
    assert server.wait(10) == 0


def test_many_watchers_are_told_to_go_and_the_process_ends(new_server: Callable[..., ServerProcess]) -> None:
    server = new_server(LIVE_MAX_PER_IP="0")
    wires: list[Wire] = []
    try:
        for _ in range(MANY):
            wires.append(Wire(server.port))
            assert wires[-1].upgrade("/live-updates").status == 101
        terminate(server)
        assert server.wait(10) == 0
        for wire in wires:
            opcode, payload = wire.frame()
            while opcode == 1:
                opcode, payload = wire.frame()
            assert (opcode, payload[:2]) == (8, (1001).to_bytes(2, "big"))
    finally:
        for wire in wires:
            wire.close()


def test_idle_connections_do_not_hold_up_the_end(new_server: Callable[..., ServerProcess]) -> None:
    server = new_server()
    with Wire(server.port) as used, Wire(server.port) as unused:
        used.request("GET", "/healthz")
        terminate(server)
        assert server.wait(9) == 0  # uWebSockets would keep them for longer
        assert used.ended
        assert unused.ended


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("KAFKA_BROKERS", "kafka", "expected host:port, separated by commas, got 'kafka'"),
        ("JWT_JWKS_FILE", "/no/such/file", "expected a file with a JWK set"),
        ("HOST", "no.such.host.invalid", "HOST: expected an address of this machine, got 'no.such.host.invalid'"),
        ("WORKERS", "0", "expected an integer from 1 to 256, got '0'"),
    ],
)
def test_start_is_refused_in_a_sentence_with_the_variable(variable: str, value: str, expected: str) -> None:
    more = {"JWT_ALGORITHMS": "RS256"} if variable == "JWT_JWKS_FILE" else {}
    status, said = serve(**{"PORT": str(free_port()), variable: value, **more})
    assert status == 2
    assert len(said.splitlines()) == 1
    assert said.startswith("scoreboard: ")
    assert variable in said
    assert expected in said


def serve(**settings: str) -> tuple[int, str]:
    """Run a server that should not start; its exit status, and what it said beside its log."""
    argv = [sys.executable, "-m", "server", "serve"]
    env = environment({"HOST": ADDRESS, **settings})
    done = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    return done.returncode, "\n".join(line for line in done.stderr.splitlines() if not line.startswith("{"))
