"""docs/live.md does what it says: both examples come back after a restart, and know resync, status and close codes.

They run as they stand, with another address. What a real server cannot be made to do at will, a scripted one does.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

from server.embedded import ADDRESS, RedisServer, free_port
from tests.client import connect, post, trust, wait_until_writable
from tests.services import ROOT, ServerProcess

WRITTEN = "ws://127.0.0.1:8080/live-updates"
LIST = '{"type":"leaderboardUpdate","board":"main","seq":1,"topScores":[{"playerId":"ann","score":%d}]%s}'
RESYNC = ',"resync":true'
SCORE = '{"type":"scoreUpdate","board":"main","playerId":"bob","newScore":7}'

Script = Callable[[ServerConnection, int], None]


def example(language: str) -> str:
    """The code block of docs/live.md in a language."""
    found = re.search(rf"^```{language}\n(.*?)^```$", (ROOT / "docs/live.md").read_text(), re.MULTILINE | re.DOTALL)
    assert found, f"docs/live.md has no example in {language}"
    return found[1]


class Example:
    """One of them, running."""

    def __init__(self, language: str, url: str, directory: Path) -> None:
        code = example(language)
        assert code.count(WRITTEN) == 1
        argv = {"python": [sys.executable], "js": ["node", "--no-warnings", "--experimental-websocket"]}[language]
        program = directory / f"watch.{language}"
        program.write_text(code.replace(WRITTEN, url))
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([*argv, str(program)], stdout=pipe, stderr=pipe, text=True)

    def until(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """What it shows, once that is so."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            seen: dict[str, Any] = json.loads(line)
            if condition(seen):
                return seen
        assert self.process.stderr is not None
        pytest.fail(f"it ended: {self.process.stderr.read()}")

    def end(self) -> str:
        """What it said when it ended by itself."""
        return self.process.communicate(timeout=20)[1]


@pytest.fixture(params=["python", "js"])
def run_example(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[str], Example]]:
    """Runs the example in one of the languages against an address."""
    if request.param == "js":
        require_websocket_of_node()
    running: list[Example] = []

    def run(url: str) -> Example:
        running.append(Example(request.param, url, tmp_path))
        # One that waits for what never comes is ended, and `until` says so.
        alarm = threading.Timer(60, running[-1].process.kill)
        alarm.daemon = True
        alarm.start()
        return running[-1]

    yield run
    for each in running:
        each.process.kill()
        each.process.communicate()


def require_websocket_of_node() -> None:
    if not shutil.which("node"):
        pytest.skip("the JavaScript example needs Node, and there is no `node` on the PATH")
    argv = ["node", "--no-warnings", "--experimental-websocket", "-e", "WebSocket"]
    if subprocess.run(argv, capture_output=True, check=False).returncode:
        pytest.skip("the JavaScript example needs a Node with WebSocket: 20.10 or newer")


@pytest.fixture
def scripted() -> Iterator[Callable[[Script], str]]:
    """Starts a server that does what a function says on each connection, the first of which has number 0."""
    servers = []

    def start(script: Script) -> str:
        numbers = iter(range(1000))

        def handle(connection: ServerConnection) -> None:
            script(connection, next(numbers))

        server = serve(handle, ADDRESS, 0)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"ws://{ADDRESS}:{server.socket.getsockname()[1]}/live-updates"

    yield start
    for server in servers:
        server.shutdown()


@pytest.mark.redis
def test_example_comes_back_after_a_restart_and_shows_what_happened_since(
    run_example: Callable[[str], Example], fresh_redis: Callable[..., RedisServer], tmp_path: Path
) -> None:
    redis = fresh_redis()
    with connect(redis) as client:
        trust(client)
    # Without Kafka the server says that the board is not live, and reads it once a second.
    settings = {"REDIS_PORT": str(redis.port), "KAFKA_BROKERS": f"{ADDRESS}:{free_port()}"}
    server = ServerProcess(tmp_path, settings)
    try:
        server.start()
        wait_until_writable(server)
        shown = run_example(f"ws://{ADDRESS}:{server.port}/live-updates")
        shown.until(lambda seen: seen["top"] == [] and seen["live"] is False)
        assert post(server, "ann", 5).status == 200
        shown.until(lambda seen: seen["top"] == [{"playerId": "ann", "score": 5}])
        assert server.stop() == 0  # 1001
        server.start()
        wait_until_writable(server)
        assert post(server, "ann", 6).status == 200
        shown.until(lambda seen: seen["top"] == [{"playerId": "ann", "score": 11}])
        server.kill()  # 1006
        server.start()
        wait_until_writable(server)
        assert post(server, "ann", 7).status == 200
        shown.until(lambda seen: seen["top"] == [{"playerId": "ann", "score": 18}])
    finally:
        server.stop()


def test_example_forgets_scores_at_a_resync_and_shows_the_status(
    run_example: Callable[[str], Example], scripted: Callable[[Script], str]
) -> None:
    def script(connection: ServerConnection, _number: int) -> None:
        for text in (LIST % (1, ""), SCORE, '{"type":"status","live":false}', '{"type":"of tomorrow"}'):
            connection.send(text)
        connection.send(LIST % (2, RESYNC))
        wait_for_the_end(connection)

    shown = run_example(scripted(script))
    before = shown.until(lambda seen: seen["live"] is False)
    assert (before["top"][0]["score"], before["scores"]) == (1, {"bob": 7})
    after = shown.until(lambda seen: seen["top"][0]["score"] == 2)
    assert (after["live"], after["scores"]) == (False, {})


@pytest.mark.parametrize(
    ("code", "reason"), [(1001, "restarting; reconnect within 1 s"), (1013, "reads too slowly"), (1011, "")]
)
def test_example_connects_again(
    run_example: Callable[[str], Example], scripted: Callable[[Script], str], code: int, reason: str
) -> None:
    def script(connection: ServerConnection, number: int) -> None:
        connection.send(LIST % (number, ""))
        if number == 0:
            connection.send(SCORE)
            connection.close(code, reason)
        else:
            wait_for_the_end(connection)

    shown = run_example(scripted(script))
    assert shown.until(lambda seen: seen["top"][0]["score"] == 1)["scores"] == {}


@pytest.mark.parametrize("code", [1002, 1007, 1008, 1009])
def test_example_that_is_not_wanted_stays_away(
    run_example: Callable[[str], Example], scripted: Callable[[Script], str], code: int
) -> None:
    connections = []

    def script(connection: ServerConnection, number: int) -> None:
        connections.append(number)
        connection.close(code, "too many messages that make no sense")

    said = run_example(scripted(script)).end()
    assert "not wanted here: too many messages that make no sense" in said
    assert connections == [0]


def wait_for_the_end(connection: ServerConnection) -> None:
    with contextlib.suppress(ConnectionClosed):
        connection.recv()
