"""Whether a candidate does its duty: asked before it is measured, for a fast wrong answer is worth nothing.

Knows the interface only, not who is behind it.
"""

from __future__ import annotations

import http.client
import json
from typing import Any
from urllib.parse import urlsplit

from server.auth import issue

BURST_AT_MOST = 400
"""Updates of one subject, as fast as one connection can: with 10/s and a burst of 20, one of them is refused."""


class WrongAnswerError(Exception):
    """A candidate does not do its duty; the message says what was expected and what came."""


_Answer = tuple[int, Any]


class _Client:
    def __init__(self, url: str, secret: str) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
        self._secret = secret.encode()

    def post(self, player: str, delta: int, subject: str | None = None, token: str | None = None) -> _Answer:
        token = issue(self._secret, subject or player) if token is None else token
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        return self._ask("POST", "/update-score", json.dumps({"playerId": player, "scoreDelta": delta}), headers)

    def get(self, path: str) -> _Answer:
        return self._ask("GET", path)

    def _ask(self, method: str, path: str, body: str | None = None, headers: dict[str, str] | None = None) -> _Answer:
        self._connection.request(method, path, body, headers or {})
        answer = self._connection.getresponse()
        text = answer.read()
        return answer.status, json.loads(text) if text else None


def check(url: str, secret: str) -> int:
    """How many updates it accepted, each of which owes an event; raises WrongAnswerError."""
    client = _Client(url, secret)
    _expect("the first update", client.post("duty-ann", 5), (200, {"playerId": "duty-ann", "newScore": 5}))
    _expect("the second update", client.post("duty-ann", -2), (200, {"playerId": "duty-ann", "newScore": 3}))
    _expect("another player", client.post("duty-bob", 9), (200, {"playerId": "duty-bob", "newScore": 9}))
    _expect("a player of somebody else", client.post("duty-bob", 1, subject="duty-ann")[0], 403)
    _expect("no token", client.post("duty-bob", 1, token="")[0], 401)
    _expect("a broken signature", client.post("duty-bob", 1, token=issue(b"x" * 32, "duty-bob"))[0], 401)
    _expect("an expired token", client.post("duty-bob", 1, token=issue(secret.encode(), "duty-bob", ttl_s=-60))[0], 401)
    board = [{"playerId": "duty-bob", "score": 9}, {"playerId": "duty-ann", "score": 3}]
    _expect("the leaderboard", client.get("/leaderboard?limit=10"), (200, board))
    _expect("its first place", client.get("/leaderboard?limit=1"), (200, board[:1]))
    for accepted in range(BURST_AT_MOST):
        status, _ = client.post("duty-eve", 1, token=issue(secret.encode(), "duty-eve"))
        if status == 429:
            _expect("at least a burst of 20 before the limit", accepted >= 20, True)
            return 3 + accepted
    raise WrongAnswerError(f"the rate limit: expected 429 within {BURST_AT_MOST} updates at once, got none")


def _expect(what: str, got: object, expected: object) -> None:
    if got != expected:
        raise WrongAnswerError(f"{what}: expected {expected}, got {got}")
