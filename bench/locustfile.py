"""A load test of a running scoreboard: players who post, watchers who look on.

JWT_SECRET=… locust -f bench/locustfile.py --headless -u 100 -r 20 -t 30s -H http://127.0.0.1:8080

Each player has a token of its own, made from JWT_SECRET. Mind two things:

* The server closes a keep-alive connection that is idle for 10 s. A user who pauses that long meets a closed
  connection and reports an error that is none, so every wait_time here stays well below.
* 20 updates a second and player are allowed, 40 at once: beyond that 429 is the right answer. To find out what the
  machine can do, start the server with RATE_LIMIT_PER_SECOND=0.

Needs nothing of the server's code: the file may be copied to wherever the load comes from.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
import time

import jwt
import websocket
from locust import FastHttpUser, User, between, constant, task

TOKEN_TTL_S = 24 * 3600
SECRET = os.environ.get("JWT_SECRET", "")
BOARD_LIMIT = 10

if not SECRET:
    sys.exit("JWT_SECRET: expected the server's secret, to make a token for each player")

_numbers = itertools.count(1)
_run = f"{random.randrange(16**6):06x}"
_posted_s: dict[str, float] = {}


def token_for(player: str) -> str:
    """A token that may change this player's score."""
    claims = {"sub": player, "exp": int(time.time()) + TOKEN_TTL_S}
    return jwt.encode(claims, SECRET, algorithm="HS256")


class Player(FastHttpUser):
    """Scores every half second, and now and then looks at the board."""

    weight = 9
    wait_time = between(0.1, 1)

    def on_start(self) -> None:
        """Become somebody: no two users are the same player, in no two runs."""
        self.player = f"locust-{_run}-{next(_numbers)}"
        self.headers = {"Authorization": f"Bearer {token_for(self.player)}"}

    @task(9)
    def score(self) -> None:
        """POST /update-score"""
        _posted_s[self.player] = time.perf_counter()
        change = {"playerId": self.player, "scoreDelta": random.randint(1, 10)}
        self.client.post("/update-score", json=change, headers=self.headers)

    @task(1)
    def look(self) -> None:
        """GET /leaderboard"""
        self.client.get("/leaderboard?limit=10", name="/leaderboard")


class Watcher(User):
    """Follows the board over WebSocket; the response time of a scoreUpdate counts from the player's POST."""

    weight = 1
    wait_time = constant(1)  # before connecting again, when the server restarts

    def on_start(self) -> None:
        """Not connected yet."""
        self.socket: websocket.WebSocket | None = None

    def on_stop(self) -> None:
        """Leave."""
        if self.socket is not None:
            self.socket.close()

    @task
    def watch(self) -> None:
        """Read until the connection ends."""
        started_s = time.perf_counter()
        address = self.host.replace("http", "ws", 1)
        try:
            self.socket = websocket.create_connection(f"{address}/live-updates?limit={BOARD_LIMIT}", timeout=60)
            self._report("connect", started_s)
            while text := self.socket.recv():
                self._received(text)
        except (OSError, websocket.WebSocketException) as error:
            self._report("connection", started_s, error=error)

    def _received(self, text: str) -> None:
        message = json.loads(text)
        # Only players of this locust process are known here: others' messages are not timed.
        posted_s = _posted_s.get(message.get("playerId", ""))
        if message["type"] == "scoreUpdate" and posted_s is not None:
            self._report("scoreUpdate", posted_s, len(text))

    def _report(self, name: str, since_s: float, size: int = 0, error: Exception | None = None) -> None:
        self.environment.events.request.fire(
            request_type="WS",
            name=name,
            response_time=(time.perf_counter() - since_s) * 1000,
            response_length=size,
            exception=error,
            context={},
        )
