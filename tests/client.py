"""What a game client and a web page ask of a server, and what a test prepares for them.

Every request has a connection of its own.
"""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import psycopg
import redis

from server.auth import issue
from server.embedded import RedisServer
from server.keys import Keys
from tests.services import JWT_SECRET, ServerProcess, wait_until
from tests.wire import Answer, once

_numbers = itertools.count(1)
SCORE_ROW = "INSERT INTO scores VALUES (%s, %s, %s, 1000, 0, to_timestamp(1))"


def new_player() -> str:
    """A player whom no other test knows, so nor do the limits."""
    return f"player{next(_numbers)}"


def token(subject: str, scope: str = "", ttl_s: int = 600) -> str:
    """A token as the server accepts it."""
    return issue(JWT_SECRET.encode(), subject, scope=scope, ttl_s=ttl_s)


def post(
    server: ServerProcess, player: str, delta: int = 1, *, subject: str = "", scope: str = "", **fields: Any
) -> Answer:
    """POST /update-score with a token of the player's own, or of `subject`."""
    body = {"playerId": player, "scoreDelta": delta, **fields}
    return post_body(server, json.dumps(body).encode(), Authorization=f"Bearer {token(subject or player, scope)}")


def post_body(server: ServerProcess, body: bytes, **headers: str) -> Answer:
    """POST /update-score with any body and headers."""
    return once(server.port, "POST", "/update-score", body, **headers)


def get(server: ServerProcess, path: str, **headers: str) -> Answer:
    """GET a path."""
    return once(server.port, "GET", path, **headers)


def metric(server: ServerProcess, name: str) -> float:
    """A value of /metrics."""
    found = re.search(rf"^{name} (\S+)$", get(server, "/metrics").body.decode(), re.MULTILINE)
    assert found, f"no metric {name}"
    return float(found[1])


def board(server: ServerProcess, query: str = "limit=1000") -> dict[str, int]:
    """What GET /leaderboard shows: scores by player, in its order."""
    answer = get(server, f"/leaderboard?{query}")
    assert answer.status == 200, answer.body
    return {row["playerId"]: row["score"] for row in answer.json()}


def can_write(server: ServerProcess) -> bool:
    """Whether /readyz says that updates are accepted."""
    return bool(get(server, "/readyz").json()["write"]["ok"])


def wait_until_writable(server: ServerProcess) -> None:
    """Wait until updates are accepted."""
    wait_until(lambda: can_write(server), 20, "updates were never accepted")


def connect(server: RedisServer) -> redis.Redis:
    """A client of a test's own Redis."""
    return redis.Redis(host=server.host, port=server.port)


def trust(client: redis.Redis, epoch: int = 1) -> None:
    """Mark a new Redis as verified, so that neither Kafka nor a database is needed to begin."""
    run_id: Any = client.info("server")["run_id"]
    client.hset(Keys().ready, mapping={"epoch": epoch, "run_id": run_id})


def store_scores(database_url: str, *rows: tuple[str, str, int]) -> None:
    """Put (board, player, score) into the database, as the persister would."""
    with psycopg.connect(database_url) as connection, connection.cursor() as cursor:
        cursor.executemany(SCORE_ROW, rows)


def assert_problem(answer: Answer, status: int, kind: str, detail: str = "") -> None:
    """Check that it is a problem document (RFC 9457) with `detail` in its detail."""
    assert answer.status == status, answer.body
    assert answer.headers["content-type"] == "application/problem+json"
    document = answer.json()
    assert document["type"] == f"urn:scoreboard:{kind}"
    assert document["status"] == status
    assert document["title"]
    assert detail in document["detail"]
