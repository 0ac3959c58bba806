"""A real Redis Cluster: boards on several masters, a slot that moves under load, a master that is killed under load."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from websockets.sync.client import ClientConnection, connect

from server import config
from server.auth import issue
from server.embedded import RedisServer, ServiceError
from server.events import decode_event
from server.fences import Fences
from server.keys import tag_of
from sync import store
from sync.topics import ensure_topics
from tests.client import assert_problem, can_write, get, post, post_body, token, wait_until_writable
from tests.redis_cluster import RedisCluster
from tests.services import JWT_SECRET, ROOT, KafkaBroker, ServerProcess, SyncProcess, environment, wait_until
from tests.sync_parts import records_of

pytestmark = [pytest.mark.redis, pytest.mark.postgres, pytest.mark.kafka]

BOARDS = ("main", "weekly", "daily", "monthly")
"""On all three masters: see test_boards_are_spread_over_the_masters."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    """Six nodes for all tests of this module."""
    try:
        made = RedisCluster(tmp_path_factory.mktemp("cluster"))
    except ServiceError as error:
        pytest.skip(str(error))
    try:
        made.start()
        yield made
    finally:
        made.stop()


class Deployment:
    """Server and sync on a cluster that was emptied."""

    def __init__(self, directory: Path, cluster: RedisCluster, settings: dict[str, str]) -> None:
        self.cluster = cluster
        self.variables = settings
        self.settings = config.load(environment(settings))
        self.server = ServerProcess(directory, settings)
        self.sync = SyncProcess(directory, settings)

    def is_relayed(self) -> bool:
        """Whether a relay has the lease of each outbox."""
        return all(self.cluster.master_of(it).client.exists(self.cluster.keys(it).relay_lease) for it in BOARDS)

    def database_scores(self, board: str) -> dict[str, int]:
        with psycopg.connect(self.settings.database_url) as connection:
            rows = connection.execute("SELECT player_id, score FROM scores WHERE board = %s", (board,)).fetchall()
        return dict(rows)

    def history_sums(self, board: str) -> dict[str, int]:
        query = "SELECT player_id, sum(delta) FROM score_events WHERE board = %s GROUP BY 1"
        with psycopg.connect(self.settings.database_url) as connection:
            return {player: int(total) for player, total in connection.execute(query, (board,)).fetchall()}

    def kafka_scores(self, board: str) -> dict[str, int]:
        """What the log comes to: of each player the latest event that counts."""
        fences, latest = Fences(), dict[str, Any]()
        for record in records_of(self.settings):
            if fences.admits(record.partition(), record.headers()):
                event = decode_event(record.value())
                known = latest.get(event.player_id)
                if event.board == board and (known is None or event.version > known.version):
                    latest[event.player_id] = event
        return {player: event.new_score for player, event in latest.items()}

    def agree(self) -> dict[str, dict[str, int]]:
        """The scores by board, once Redis, Kafka and the database say the same."""
        scores = {board: self.cluster.scores(board) for board in BOARDS}
        wait_until(
            lambda: {board: self.database_scores(board) for board in BOARDS} == scores, 30, "the database differs"
        )
        for board in BOARDS:
            assert self.history_sums(board) == scores[board], "an event is missing, or counted twice"
            assert self.kafka_scores(board) == scores[board]
        return scores


@pytest.fixture
def deployment(
    tmp_path: Path, cluster: RedisCluster, kafka_broker: KafkaBroker, kafka_topic: str, database_url: str
) -> Iterator[Deployment]:
    for node in cluster.masters:
        node.client.flushall()
    made = Deployment(
        tmp_path,
        cluster,
        {
            **cluster.settings,
            "BOARDS": ",".join(BOARDS),
            "KAFKA_BROKERS": kafka_broker.brokers,
            "KAFKA_TOPIC": kafka_topic,
            "KAFKA_PARTITIONS": "2",
            "KAFKA_FETCH_WAIT_MS": "10",
            "DATABASE_URL": database_url,
            # One span of time for whole days: which limits Redis holds does not hang on the second.
            "RATE_LIMIT_PER_SECOND": "10",
            "RATE_LIMIT_BURST": "1000000",
        },
    )
    ensure_topics(made.settings)
    store.migrate(database_url)
    try:
        made.sync.start()
        made.server.start()
        wait_until_writable(made.server)
        wait_until(made.is_relayed, 20, "an outbox is not relayed")
        yield made
    finally:
        made.server.stop()
        made.sync.stop()


class Player(threading.Thread):
    """A game client that submits to all boards by turns, and retries with its key until it has a 200."""

    def __init__(self, port: int, name: str) -> None:
        super().__init__(name=name)
        self.acknowledged = dict.fromkeys(BOARDS, 0)
        self.last = dict.fromkeys(BOARDS, 0)
        """The last delta that was acknowledged before the first trouble with a board."""
        self.troubles: list[str] = []
        self.ending = False
        self._port = port
        self._token = issue(JWT_SECRET.encode(), name, scope="scores:write")

    def run(self) -> None:
        connection, count, troubled = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10), 0, set()
        while not self.ending:
            count += 1
            board, delta = BOARDS[count % len(BOARDS)], count % 7 + 1
            while (trouble := self._submit(connection, board, delta, f"{count}")) is not None:
                self.troubles.append(trouble)
                troubled.add(board)
            self.acknowledged[board] += delta
            if board not in troubled:
                self.last[board] = delta
        connection.close()

    def _submit(self, connection: http.client.HTTPConnection, board: str, delta: int, key: str) -> str | None:
        body = json.dumps({"playerId": self.name, "scoreDelta": delta, "board": board})
        connection.request(
            "POST", "/update-score", body, {"Authorization": f"Bearer {self._token}", "Idempotency-Key": key}
        )
        answer = connection.getresponse()
        result = json.loads(answer.read())
        assert answer.status in (200, 503), result
        return None if answer.status == 200 else f"{board}: {result['type']}: {result['detail']}"


class Load:
    """Players that submit for the length of a `with`, and go on for a while behind what happens in it."""

    def __init__(self, deployment: Deployment) -> None:
        self.players = [Player(deployment.server.port, f"player{number}") for number in range(4)]

    def __enter__(self) -> Load:
        for player in self.players:
            player.start()
        self.go_on()
        return self

    def go_on(self) -> None:
        """Wait until each player has had some more acknowledged on each board."""
        wanted = [(player, board, player.acknowledged[board] + 50) for player in self.players for board in BOARDS]
        wait_until(
            lambda: all(player.acknowledged[board] >= score for player, board, score in wanted), 60, "no more is taken"
        )

    def __exit__(self, *_: object) -> None:
        for player in self.players:
            player.ending = True
        for player in self.players:
            player.join(30)
            assert not player.is_alive()

    @property
    def scores(self) -> dict[str, dict[str, int]]:
        """What was acknowledged, by board and player."""
        return {board: {player.name: player.acknowledged[board] for player in self.players} for board in BOARDS}

    @property
    def troubles(self) -> set[str]:
        """What was answered instead of a 200."""
        return {trouble for player in self.players for trouble in player.troubles}


def next_list(watcher: ClientConnection, but: Any = None) -> Any:
    """The next list that a watcher is shown, another one than `but`."""
    while True:
        message = json.loads(watcher.recv(10))
        if message["type"] == "leaderboardUpdate" and message["topScores"] != but:
            return message["topScores"]


def test_boards_are_spread_over_the_masters(deployment: Deployment) -> None:
    cluster, server = deployment.cluster, deployment.server
    assert {cluster.master_of(board) for board in BOARDS} == set(cluster.masters)
    url = f"ws://127.0.0.1:{server.port}/live-updates?board="
    with connect(url + "weekly") as weekly, connect(url + "daily") as daily:
        assert [next_list(each) for each in (weekly, daily)] == [[], []]
        for number, board in enumerate(BOARDS):
            assert post(server, "ann", 10 + number, board=board).status == 200
        for watcher, score in ((weekly, 11), (daily, 12)):
            assert next_list(watcher, but=[]) == [{"playerId": "ann", "score": score}]
    assert deployment.agree() == {board: {"ann": 10 + number} for number, board in enumerate(BOARDS)}
    for number, board in enumerate(BOARDS):
        assert get(server, f"/leaderboard?board={board}").json() == [{"playerId": "ann", "score": 10 + number}]
    events = [record for record in records_of(deployment.settings) if record.value()]
    tags = {decode_event(record.value()).board: dict(record.headers())["tag"] for record in events}
    assert tags == {board: tag_of(board).encode() for board in BOARDS}
    argv = [sys.executable, "-m", "server", "reconcile"]
    env = environment(deployment.variables)
    compared = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert (compared.returncode, compared.stdout.split()[0]) == (0, str(len(BOARDS))), compared
    argv[-1] = "check"
    checked = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, check=False).stdout
    assert [f"127.0.0.1:{node.port}: version" in checked for node in cluster.nodes] == [
        node in cluster.masters for node in cluster.nodes
    ]


def test_update_to_a_slot_on_the_move_is_applied_as_a_whole_or_not_at_all(deployment: Deployment) -> None:
    cluster, server = deployment.cluster, deployment.server
    assert post(server, "ann", 1, board="weekly").status == 200
    source, keys = cluster.master_of("weekly"), cluster.keys("weekly")
    target = next(node for node in cluster.masters if node is not source)
    (limits,) = source.client.keys(f"{keys.ratelimit}*")
    # So every key that an update reads is there, and only the one that it takes away is not.
    source.client.hset(f"{keys.ratelimit}{int(limits.decode().rpartition(':')[2]) - 1}", "somebody", 1)
    cluster.begin_move("weekly", target)
    try:
        with ThreadPoolExecutor() as clients:
            answers = list(clients.map(lambda player: post(server, player, 1, board="weekly"), ("ann", "bob")))
        assert post(server, "ann", 1, board="daily").status == 200, "another master's boards go on"
    finally:
        for node in (source, target):
            node.ask("CLUSTER", "SETSLOT", keys.slot, "STABLE")
    for answer in answers:
        assert_problem(answer, 503, "not-applied")
    assert cluster.scores("weekly") == {"ann": 1}
    wait_until(lambda: post(server, "ann", 1, board="weekly").status == 200, 20, "it was never taken again")
    assert deployment.agree()["weekly"] == {"ann": 2}


def test_slot_moved_under_load_loses_nothing_and_counts_nothing_twice(deployment: Deployment) -> None:
    cluster = deployment.cluster
    source = cluster.master_of("main")
    target = next(node for node in cluster.masters if node is not source)
    with Load(deployment) as load:
        cluster.begin_move("main", target)
        load.players[0].join(0.3)  # with all keys where they were
        cluster.move_keys("main", source, target, 2)
        load.players[0].join(0.3)  # with some here, some there
        while cluster.move_keys("main", source, target, 100):
            pass
        cluster.end_move("main", target)
        load.go_on()
    assert cluster.master_of("main") is target
    assert deployment.agree() == load.scores
    assert all(trouble.startswith("main: ") for trouble in load.troubles), load.troubles


def test_failover_under_load_loses_nothing_that_the_replica_or_kafka_had(deployment: Deployment) -> None:
    cluster = deployment.cluster
    victim = cluster.master_of("monthly")
    with Load(deployment) as load:
        victim.kill()
        load.go_on()
    assert cluster.master_of("monthly") is not victim
    scores = deployment.agree()
    for player in load.players:
        for board in BOARDS:
            # It may die between an answer and sending the same to its replica: then it is the last one before.
            lost = player.acknowledged[board] - scores[board][player.name]
            assert lost in (0, player.last[board]), f"{player.name} on {board}: {lost} lost of {player.acknowledged}"
    victim.start()
    cluster.wait_until_whole()


def test_what_a_replica_missed_comes_back_from_kafka_and_other_masters_go_on(deployment: Deployment) -> None:
    cluster, server = deployment.cluster, deployment.server
    for board in BOARDS:
        assert post(server, "ann", 1, board=board).status == 200
    quiet_since_ms = cluster.last_ms("main")
    victim = cluster.master_of("daily")
    heir = next(it for it in cluster.followers if it.client.info("replication")["master_port"] == victim.port)
    wait_until(lambda: heir.client.keys("*leaderboard"), 20, "nothing is replicated")
    heir.pause()
    try:
        victim.ask("CLIENT", "KILL", "TYPE", "replica")
        body = json.dumps({"playerId": "ann", "scoreDelta": 10, "board": "daily"}).encode()
        keyed = {"Authorization": f"Bearer {token('ann')}", "Idempotency_Key": "once"}
        assert post_body(server, body, **keyed).json()["newScore"] == 11
        wait_until(lambda: not victim.client.xlen(cluster.keys("daily").outbox), 20, "it was not relayed")
        with connect(f"ws://127.0.0.1:{server.port}/live-updates?board=weekly") as watcher:
            next_list(watcher)
            victim.kill()
            wait_until(lambda: not can_write(server), 20, "it was never noticed")
            assert "daily: " in get(server, "/readyz").json()["write"]["detail"]
            assert post(server, "ann", 1, board="weekly").json()["newScore"] == 2
            assert next_list(watcher, but=[{"playerId": "ann", "score": 1}]) == [{"playerId": "ann", "score": 2}]
        assert_problem(post(server, "ann", 1, board="daily"), 503, "not-applied")
        assert get(server, "/leaderboard?board=daily").headers["scoreboard-source"] == "database"
    finally:
        heir.resume()
    wait_until(lambda: heir.client.info("replication")["role"] == "master", 20, "nobody took over")
    wait_until_writable(server)
    assert "replayed what Redis had lost: 1 players" in deployment.server.output_tail()
    assert cluster.scores("daily") == {"ann": 11}
    again = post_body(server, body, **keyed)
    assert (again.json()["newScore"], again.headers.get("idempotent-replayed")) == (11, "true")
    # A quiet board goes on with the time, so that its next replay need not read what all others have done since.
    wait_until(lambda: cluster.last_ms("main") > quiet_since_ms, 20, "it stands still")
    victim.start()
    cluster.wait_until_whole()
    scores = {board: board_scores["ann"] for board, board_scores in deployment.agree().items()}
    assert scores == {"main": 1, "weekly": 2, "daily": 11, "monthly": 1}


@pytest.mark.parametrize("wanted", [1, 0])
def test_setup_that_is_not_what_redis_cluster_says_is_refused(
    tmp_path: Path, cluster: RedisCluster, redis_server: RedisServer, kafka_broker: KafkaBroker, wanted: int
) -> None:
    node = redis_server if wanted else cluster.nodes[0]
    settings = {"REDIS_HOST": node.host, "REDIS_PORT": str(node.port), "REDIS_CLUSTER": str(wanted)}
    settings |= {"KAFKA_BROKERS": kafka_broker.brokers}
    kinds = ["a node of a Redis Cluster", "a Redis without cluster mode"]
    sentence = f"REDIS_CLUSTER={wanted}: expected {kinds[1 - wanted]}, got {kinds[wanted]}"
    server, relay = ServerProcess(tmp_path, settings), SyncProcess(tmp_path, settings, "relay")
    try:
        relay.start()
        server.start()
        wait_until(lambda: sentence in get(server, "/readyz").json()["write"].get("detail", ""), 20, sentence)
        wait_until(lambda: sentence in relay.output_tail(), 20, sentence)
    finally:
        server.stop()
        relay.stop()
