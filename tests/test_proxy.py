"""Behind nginx, with ops/nginx.conf and ops/nginx-subpath.conf as they are documented."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis as redis_client
from websockets.sync.client import ClientConnection, connect

from server.embedded import ADDRESS, RedisServer, Service, free_port
from server.keys import Keys
from sync.store import migrate
from tests.alone import server_alone
from tests.browser import Chromium
from tests.client import can_write, post, token, trust, wait_until_writable
from tests.nginx import HOST, Nginx, PlainNginx
from tests.services import ROOT, ServerProcess, UnavailableError, wait_until
from tests.test_uws import UwsApp
from tests.wire import PING, PONG, TEXT, Answer, Wire, frame_bytes, once

pytestmark = [pytest.mark.redis, pytest.mark.postgres]
LITTLE_S = 2.0
"""For a busy machine."""

DRAIN_DELAY_MS = "3000"
"""As ops/nginx.conf says."""


class Proxied:
    """Two servers, and nginx in front of them."""

    def __init__(self, servers: list[ServerProcess], nginx: Nginx) -> None:
        self.servers = servers
        self.nginx = nginx

    def connection(self, source: str = ADDRESS) -> http.client.HTTPSConnection:
        """A keep-alive connection to nginx from one of this machine's addresses."""
        connection = http.client.HTTPSConnection(
            HOST, self.nginx.port, context=self.nginx.trust(), timeout=20, source_address=(source, 0)
        )
        connection._create_connection = lambda address, *rest: (  # type: ignore[attr-defined] # no name server knows it
            socket.create_connection((ADDRESS, address[1]), *rest)
        )
        return connection

    def watch(self) -> ClientConnection:
        """A watcher of the board."""
        plain = socket.create_connection((ADDRESS, self.nginx.port))
        return connect(f"wss://{HOST}/live-updates", sock=plain, ssl=self.nginx.trust(), server_hostname=HOST)


@pytest.fixture
def proxied(
    tmp_path: Path, redis_server: RedisServer, redis: redis_client.Redis, database_url: str
) -> Iterator[Callable[..., Proxied]]:
    migrate(database_url)
    trust(redis)
    started: list[ServerProcess | Nginx] = []

    def start(**more: str) -> Proxied:
        settings = {
            "REDIS_HOST": redis_server.host,
            "REDIS_PORT": str(redis_server.port),
            "KAFKA_BROKERS": f"{ADDRESS}:{free_port()}",
            "DATABASE_URL": database_url,
            "TRUSTED_PROXIES": ADDRESS,
            "DRAIN_DELAY_MS": DRAIN_DELAY_MS,
            **more,
        }
        servers = [ServerProcess(tmp_path, settings) for _ in range(2)]
        try:
            nginx = Nginx(tmp_path, [server.port for server in servers])
        except UnavailableError as error:
            pytest.skip(str(error))
        started.extend([*servers, nginx])
        for service in started:
            service.launch()
        for service in started:
            wait_until(service.answers, 30)
        for server in servers:
            wait_until_writable(server)
        return Proxied(servers, nginx)

    yield start
    for service in started:
        if isinstance(service, ServerProcess):
            service.kill()  # how they end is what tests look at themselves
        else:
            service.stop()


def ask(connection: http.client.HTTPConnection, method: str, path: str, body: Any = None, **headers: str) -> Answer:
    content = None if body is None else json.dumps(body)
    connection.request(method, path, content, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    fields = {name.lower(): value for name, value in answer.getheaders()}
    return Answer(answer.status, fields, answer.read())


class Clients:
    """Threads that ask through the proxy without a pause; `errors` is whatever a client would not want to see."""

    def __init__(self, proxied: Proxied) -> None:
        self.errors: list[str] = []
        self.acknowledged: dict[str, int] = {}
        self.pages = 0
        self._proxied = proxied
        self._stopped = threading.Event()
        players = [f"player{number}" for number in range(4)]
        self._threads = [threading.Thread(target=self._run, args=(self._submitter(player),)) for player in players]
        self._threads += [threading.Thread(target=self._run, args=(self._read,)) for _ in range(2)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(30)

    def _run(self, act: Callable[[http.client.HTTPConnection], None]) -> None:
        connection = self._proxied.connection()
        while not self._stopped.is_set():
            try:
                act(connection)
            except (OSError, http.client.HTTPException) as error:
                self.errors.append(repr(error))
                connection.close()
            # Connections of nginx to the servers have to be idle, too, for that is when they can break.
            self._stopped.wait(0.002)
        connection.close()

    def _submitter(self, player: str) -> Callable[[http.client.HTTPConnection], None]:
        bearer = f"Bearer {token(player)}"
        self.acknowledged[player] = 0

        def submit(connection: http.client.HTTPConnection) -> None:
            body = {"playerId": player, "scoreDelta": 1}
            answer = ask(connection, "POST", "/update-score", body, Authorization=bearer)
            if answer.status == 200:
                self.acknowledged[player] += 1
            else:
                self.errors.append(f"POST: {answer.status} {answer.body!r}")

        return submit

    def _read(self, connection: http.client.HTTPConnection) -> None:
        answer = ask(connection, "GET", "/leaderboard")
        if answer.status == 200:
            self.pages += 1
        else:
            self.errors.append(f"GET: {answer.status} {answer.body!r}")


def test_rolling_restart_under_load_loses_no_request_and_shows_no_error(
    proxied: Callable[..., Proxied], redis: redis_client.Redis
) -> None:
    board = proxied(RATE_LIMIT_PER_SECOND="0")
    with Clients(board) as clients:
        for server in board.servers:
            before = sum(clients.acknowledged.values())
            wait_until(lambda before=before: sum(clients.acknowledged.values()) > before + 200, 30)
            os.kill(server.pid, signal.SIGTERM)
            assert server.wait(30) == 0
            server.start()
            wait_until(lambda server=server: can_write(server), 20)
        before = sum(clients.acknowledged.values())
        wait_until(lambda: sum(clients.acknowledged.values()) > before + 200, 30)
    assert clients.errors == []
    assert clients.pages
    scores = redis.zrange(Keys().board("main").leaderboard, 0, -1, withscores=True)
    assert {player.decode(): int(score) for player, score in scores} == clients.acknowledged
    assert board.nginx.running


def test_watcher_gets_the_board_through_the_proxy_and_is_told_to_come_back(proxied: Callable[..., Proxied]) -> None:
    board = proxied(DRAIN_DELAY_MS="0")
    with board.watch() as watcher:
        assert json.loads(watcher.recv(10))["type"] in ("status", "leaderboardUpdate")
        for server in board.servers:
            os.kill(server.pid, signal.SIGTERM)
        for _message in watcher:  # ends with a close of 1000 or 1001 only
            pass
        assert (watcher.close_code, watcher.close_reason) == (1001, "restarting; reconnect within 1 s")


def test_limits_count_the_address_that_nginx_saw_and_no_other(proxied: Callable[..., Proxied]) -> None:
    board = proxied(RATE_LIMIT_BY="ip", RATE_LIMIT_PER_SECOND="0.001", RATE_LIMIT_BURST="2")
    body, bearer = {"playerId": "ann", "scoreDelta": 1}, f"Bearer {token('ann')}"
    statuses = []
    for source, claimed in (
        ("127.0.0.2", "203.0.113.1"),
        ("127.0.0.2", "203.0.113.2"),
        ("127.0.0.2", f"203.0.113.3, {ADDRESS}"),  # neither does the name of a trusted proxy help
        ("127.0.0.3", "203.0.113.1"),
    ):
        connection = board.connection(source)
        answer = ask(connection, "POST", "/update-score", body, Authorization=bearer, X_Forwarded_For=claimed)
        connection.close()
        statuses.append(answer.status)
    assert statuses == [200, 200, 429, 200]
    statuses = []
    for claimed in ("203.0.113.1", "203.0.113.2", "203.0.113.3"):  # past nginx: this peer is no trusted proxy
        direct = http.client.HTTPConnection(ADDRESS, board.servers[0].port, timeout=10, source_address=("127.0.0.4", 0))
        statuses.append(
            ask(direct, "POST", "/update-score", body, Authorization=bearer, X_Forwarded_For=claimed).status
        )
        direct.close()
    assert statuses == [200, 200, 429]


def test_what_is_wrong_is_said_by_the_server_and_metrics_by_nobody(proxied: Callable[..., Proxied]) -> None:
    board = proxied()
    connection = board.connection()
    too_large = ask(connection, "POST", "/update-score", "x" * 20_000, Authorization=f"Bearer {token('ann')}")
    assert (too_large.status, too_large.headers["content-type"]) == (413, "application/problem+json")
    assert ask(connection, "GET", "/metrics").status == 404
    connection.close()


# ---------------------------------------------------------------------- quiet sockets


def ready(service: Service) -> Service:
    service.launch()
    wait_until(service.answers, 30)
    return service


@pytest.fixture(scope="module")
def below_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServerProcess, PlainNginx]]:
    """A server below /scores/ of an nginx whose time-outs are its defaults."""
    directory = tmp_path_factory.mktemp("subpath")
    with server_alone(directory, {"CORS_ORIGINS": "https://game.example", "TRUSTED_PROXIES": ADDRESS}) as server:
        documented = (ROOT / "ops/nginx-subpath.conf").read_text()
        assert documented.count("127.0.0.1:8080") == 2
        try:
            nginx = PlainNginx(directory / "nginx", documented.replace("127.0.0.1:8080", f"{ADDRESS}:{server.port}"))
        except UnavailableError as error:
            pytest.skip(str(error))
        try:
            ready(nginx)
            yield server, nginx
        finally:
            nginx.stop()


def test_quiet_watcher_is_pinged_long_before_nginx_gives_up(below_path: tuple[ServerProcess, PlainNginx]) -> None:
    """nginx, HAProxy and AWS' load balancers close what is quiet for 60 s; some firewalls for 30."""
    with Wire(below_path[1].port, timeout_s=40) as watcher:
        assert watcher.upgrade("/scores/live-updates?scores=none").status == 101
        began_s = quiet_since_s = time.monotonic()
        while watcher.any_frame()[0] != PING:
            quiet_since_s = time.monotonic()
        assert time.monotonic() - quiet_since_s < 25
        assert time.monotonic() - began_s < 25, "expected a ping whatever was sent"
        watcher.send(frame_bytes(PONG))
        watcher.send_text(b"ping")
        while watcher.frame() != (TEXT, b"pong"):
            pass


def test_quiet_socket_outlives_the_patience_of_a_proxy_if_its_client_answers(tmp_path: Path) -> None:
    app = UwsApp(tmp_path)
    lines = f"""
        location = /ws {{
            proxy_http_version 1.1;
            proxy_set_header Connection upgrade;
            proxy_set_header Upgrade $http_upgrade;
            proxy_read_timeout 6s;
            proxy_send_timeout 6s;
            proxy_pass http://{ADDRESS}:{app.port};
        }}
    """
    try:
        nginx = PlainNginx(tmp_path, lines)
    except UnavailableError as error:
        pytest.skip(str(error))
    try:
        ready(app)
        ready(nginx)
        with Wire(nginx.port) as good, Wire(nginx.port) as deaf:
            for wire in (good, deaf):
                assert wire.upgrade("/ws").status == 101
            began_s = time.monotonic()
            while time.monotonic() - began_s < 7:
                assert good.any_frame() == (PING, b"")
                good.send(frame_bytes(PONG))
            good.send_text(b"echo still here")
            assert good.frame() == (TEXT, b"still here")
            assert deaf.any_frame() == (PING, b"")
            assert deaf.ended, "expected the server to give up a client that answers no ping"
    finally:
        nginx.stop()
        app.stop()


# ---------------------------------------------------------------------- below a path


@pytest.mark.browser
def test_page_works_below_a_path_of_a_proxy(
    below_path: tuple[ServerProcess, PlainNginx], chromium: Chromium, tmp_path: Path
) -> None:
    server, nginx = below_path
    players = "[...document.querySelectorAll('#ranking tr')].map((row) => row.dataset.player).join()"
    assert post(server, "ann", 30).status == 200
    with chromium.page() as page:
        page.open(f"http://{ADDRESS}:{nginx.port}/scores?limit=25")  # nginx leads it to /scores/
        page.wait(f"{players} === 'ann'")
        assert page.evaluate("location.pathname + location.search") == "/scores/?limit=25"
        assert page.evaluate("document.getElementById('limit').value") == "25"
        assert page.evaluate("getComputedStyle(document.body).margin") == "0px", "expected the style sheet"
        assert page.evaluate("document.querySelector('h1 img').naturalWidth") > 0
        page.evaluate("document.querySelector('#ranking .pin button').click()")
        page.wait("document.querySelector('#pins .total')?.textContent === '30'")
        assert post(server, "bob", 40).status == 200
        page.wait(f"{players} === 'bob,ann'")
        assert page.evaluate("Object.keys(localStorage).join()") == "pins:/scores/:main"
        page.reload()
        page.wait("document.querySelector('#pins .total')?.textContent === '30'")
        assert page.problems == []


def test_api_works_below_a_path_of_a_proxy(below_path: tuple[ServerProcess, PlainNginx]) -> None:
    _, nginx = below_path
    body = json.dumps({"playerId": "cid", "scoreDelta": 1}).encode()
    answer = once(nginx.port, "POST", "/scores/update-score", body, Authorization=f"Bearer {token('cid')}")
    assert (answer.status, answer.json()["newScore"]) == (200, 1)
    assert once(nginx.port, "GET", "/scores/leaderboard").status == 200
    assert once(nginx.port, "GET", "/scores/metrics").status == 404
    assert once(nginx.port, "GET", "/leaderboard").status == 404, "nginx' own"
