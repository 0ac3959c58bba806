"""The whole way, through real processes: a client's POST, the watchers' WebSocket, the rows in the database."""

from __future__ import annotations

import http.client
import json
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis as redis_client
from websockets.sync.client import connect

from server.auth import issue
from server.embedded import PostgresServer, RedisServer, Service
from server.keys import Keys
from tests.services import JWT_SECRET, KafkaBroker, ServerProcess, SyncProcess, wait_until

pytestmark = [pytest.mark.redis, pytest.mark.postgres, pytest.mark.kafka]

PLAYERS = [f"player{number}" for number in range(50)]


class Player:
    """A game client on one connection, that keeps count of what was acknowledged."""

    def __init__(self, port: int) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        self.token = issue(JWT_SECRET.encode(), "game-server", scope="scores:write")
        self.acknowledged: dict[str, int] = {}

    def submit(self, player: str, delta: int) -> tuple[int, dict[str, Any]]:
        body = json.dumps({"playerId": player, "scoreDelta": delta})
        self.connection.request("POST", "/update-score", body, {"Authorization": f"Bearer {self.token}"})
        answer = self.connection.getresponse()
        result = json.loads(answer.read())
        if answer.status == 200:
            self.acknowledged[player] = self.acknowledged.get(player, 0) + delta
        return answer.status, result

    def close(self) -> None:
        self.connection.close()


class Scoreboard:
    """Server and sync, with the stores they stand on."""

    def __init__(self, directory: Path, settings: dict[str, str], client: redis_client.Redis) -> None:
        self.settings = settings
        self.redis = client
        self.sync = SyncProcess(directory, settings)
        self.server = ServerProcess(directory, settings)

    def start(self) -> None:
        self.sync.start()
        self.server.start()
        wait_until(lambda: self.server.status_of("/readyz") == 200 and self.live(), 30, "server and sync are not ready")

    def live(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=5)
        try:
            connection.request("GET", "/readyz")
            state = json.loads(connection.getresponse().read())
        finally:
            connection.close()
        return bool(state["live"]["ok"] and state["write"]["ok"])

    def stop(self) -> None:
        for service in (self.server, self.sync):
            service.stop()

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.settings["DATABASE_URL"]) as connection:
            return connection.execute(query).fetchall()

    def redis_scores(self) -> dict[str, int]:
        entries = self.redis.zrange(Keys().board("main").leaderboard, 0, -1, withscores=True)
        return {player.decode(): int(score) for player, score in entries}

    def database_scores(self) -> dict[str, int]:
        return dict(self.rows("SELECT player_id, score FROM scores"))

    def history_sums(self) -> dict[str, int]:
        return {
            player: int(total)
            for player, total in self.rows("SELECT player_id, sum(delta) FROM score_events GROUP BY 1")
        }


@pytest.fixture
def scoreboard(
    tmp_path: Path,
    redis: redis_client.Redis,
    redis_server: RedisServer,
    kafka_broker: KafkaBroker,
    kafka_topic: str,
    database_url: str,
) -> Iterator[Scoreboard]:
    settings = {
        "REDIS_HOST": redis_server.host,
        "REDIS_PORT": str(redis_server.port),
        "KAFKA_BROKERS": kafka_broker.brokers,
        "KAFKA_TOPIC": kafka_topic,
        "DATABASE_URL": database_url,
    }
    scoreboard = Scoreboard(tmp_path, settings, redis)
    try:
        scoreboard.start()
        yield scoreboard
    finally:
        scoreboard.stop()


def test_update_goes_from_the_post_to_the_watchers_and_into_the_database(scoreboard: Scoreboard) -> None:
    player = Player(scoreboard.server.port)
    with connect(f"ws://127.0.0.1:{scoreboard.server.port}/live-updates") as watcher:
        assert json.loads(watcher.recv(5)) == {
            "type": "leaderboardUpdate", "board": "main", "seq": 1, "topScores": []
        }  # fmt: skip
        assert player.submit("player123", 125) == (200, {"playerId": "player123", "newScore": 125})
        messages = [json.loads(watcher.recv(5)) for _ in range(2)]
    player.close()
    # How late it is, is known only of what happened after the server began to read the log.
    assert all(0 <= message.pop("delayMs", 0) < 5000 for message in messages)
    assert messages == [
        {
            "type": "leaderboardUpdate",
            "board": "main",
            "seq": 2,
            "topScores": [{"playerId": "player123", "score": 125}],
        },
        {"type": "scoreUpdate", "board": "main", "playerId": "player123", "newScore": 125},
    ]
    wait_until(lambda: scoreboard.database_scores() == {"player123": 125}, 10, "the score is not in the database")
    assert scoreboard.rows("SELECT board, player_id, delta, score FROM score_events") == [
        ("main", "player123", 125, 125)
    ]
    wait_until(lambda: scoreboard.redis.xlen(Keys().outbox) == 0, 10, "the outbox is not empty")


@pytest.mark.parametrize("victim", ["sync", "server"])
def test_nothing_is_lost_or_counted_twice_when_a_process_is_killed_under_load(
    scoreboard: Scoreboard, victim: str
) -> None:
    submitted, killed = threading.Event(), threading.Event()
    ledgers: list[dict[str, int]] = []
    unknown: list[tuple[str, int]] = []

    def play(seed: int) -> None:
        choose, player, count = random.Random(seed), Player(scoreboard.server.port), 0
        while count < 600 or not killed.is_set():
            name, delta = choose.choice(PLAYERS), choose.randint(-10, 100)
            try:
                player.submit(name, delta)
            except ConnectionRefusedError:
                player.close()
                killed.wait(0.1)
            except (OSError, http.client.HTTPException):
                player.close()  # http.client connects again by itself
                unknown.append((name, delta))
            count += 1
            if count == 200:
                submitted.set()
        player.close()
        ledgers.append(player.acknowledged)

    threads = [threading.Thread(target=play, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    assert submitted.wait(60)
    service: Service = getattr(scoreboard, victim)
    service.kill()
    service.restart()
    killed.set()
    for thread in threads:
        thread.join(120)

    acknowledged = {name: sum(ledger.get(name, 0) for ledger in ledgers) for name in PLAYERS}
    scores = scoreboard.redis_scores()
    if victim == "sync":
        assert not unknown
        assert scores == acknowledged
    else:
        # What was under way when the server died may or may not have been applied, but only as a whole.
        differences = {
            name: scores[name] - acknowledged[name] for name in PLAYERS if scores[name] != acknowledged[name]
        }
        for name, difference in differences.items():
            assert difference in _sums([delta for player, delta in unknown if player == name])
        # One request each, and those whose connections the kernel had taken for a server that was dying.
        assert len(unknown) <= 5 * len(threads)
    wait_until(lambda: scoreboard.database_scores() == scores, 30, "the database differs from Redis")
    assert scoreboard.history_sums() == scores


def test_nothing_but_redis_is_ever_waited_for(
    scoreboard: Scoreboard, kafka_broker: KafkaBroker, postgres_server: PostgresServer
) -> None:
    hung: list[Service] = [kafka_broker, postgres_server, scoreboard.sync]
    player = Player(scoreboard.server.port)
    assert player.submit("ann", 1)[0] == 200
    for service in hung:
        service.pause()
    try:
        # A client's timeout of 10 s would end the test: each of these would be waited for much longer.
        assert [player.submit("ann", 1) for _ in range(200)][-1] == (200, {"playerId": "ann", "newScore": 201})
        assert scoreboard.server.status_of("/leaderboard") == 200
        assert scoreboard.server.status_of("/readyz") == 200
    finally:
        for service in hung:
            service.resume()
        player.close()
    wait_until(lambda: scoreboard.database_scores() == {"ann": 201}, 60, "the database did not catch up")
    assert scoreboard.history_sums() == {"ann": 201}


def _sums(deltas: list[int]) -> set[int]:
    sums = {0}
    for delta in deltas:
        sums |= {each + delta for each in sums}
    return sums
