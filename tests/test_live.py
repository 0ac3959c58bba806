"""What a watcher sees: a snapshot at once, then every change, never an old board that passes for a live one.

The server, Redis and Kafka are real. Events come from the test itself where no relay runs, so that it decides when.
"""

from __future__ import annotations

import json
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer

from server.embedded import RedisServer, free_port
from server.events import ScoreEvent, encode_event
from server.subscription import MAX_MESSAGE_BYTES
from sync import topics
from tests.client import (
    assert_problem,
    can_write,
    connect,
    get,
    metric,
    new_player,
    post,
    token,
    trust,
    wait_until_writable,
)
from tests.services import KafkaBroker, ServerProcess, SyncProcess, wait_until
from tests.wire import Answer, Wire, once

TEXT, CLOSE = 1, 8
HIGH_WATER_BYTES = 4096


class Watcher(Wire):
    """A page that watches."""

    def __init__(self, server: ServerProcess, query: str = "", **options: int) -> None:
        super().__init__(server.port, **options)
        answer = self.upgrade(f"/live-updates?{query}")
        assert answer.status == 101, answer.body

    def __enter__(self) -> Watcher:
        return self

    def message(self) -> dict[str, Any]:
        """The next message."""
        opcode, payload = self.frame()
        assert opcode == TEXT, payload
        return dict(json.loads(payload))

    def until(self, **expected: Any) -> dict[str, Any]:
        """The next message with these fields."""
        while True:
            message = self.message()
            if expected.items() <= message.items():
                return message

    def ask(self, **message: Any) -> None:
        """Send a message."""
        self.send_text(json.dumps(message).encode())


def scores_of(message: dict[str, Any]) -> list[tuple[str, int]]:
    assert message["type"] == "leaderboardUpdate"
    return [(row["playerId"], row["score"]) for row in message["topScores"]]


class World:
    """One server, its Redis, and the Kafka topic that feeds it."""

    def __init__(self, redis: RedisServer, broker: KafkaBroker, topic: str, directory: Path) -> None:
        self.settings = {
            "REDIS_PORT": str(redis.port),
            "KAFKA_BROKERS": broker.brokers,
            "KAFKA_TOPIC": topic,
            "KAFKA_PARTITIONS": "2",
            "DATABASE_URL": f"postgresql://127.0.0.1:{free_port()}/none",
            "BOARDS": "main,weekly",
            "LIVE_HIGH_WATER_BYTES": str(HIGH_WATER_BYTES),
        }
        self.redis = redis
        self.directory = directory
        self._topic = topic
        self._producer = Producer({"bootstrap.servers": broker.brokers, "linger.ms": 0})
        self.server = self.new_server()

    def new_server(self) -> ServerProcess:
        return ServerProcess(self.directory, self.settings)

    def set_scores(self, board: str = "main", **scores: int) -> None:
        """Change Redis without a word to anybody."""
        prefix = "" if board == "main" else f"board:{board}:"
        with connect(self.redis) as client, client.pipeline() as together:
            together.mset({f"{prefix}player:{player}:score": score for player, score in scores.items()})
            together.zadd(f"{prefix}leaderboard", scores)
            together.execute()

    def say(self, *players: str, board: str = "main", score: int = 0) -> None:
        """Produce an event for each of the players; what it says of the score is nobody's concern."""
        for number, player in enumerate(players):
            event = ScoreEvent(f"1-0-{number}", board, player, 1, score, 1)
            self._producer.produce(self._topic, encode_event(event), player.encode())
        assert self._producer.flush(10) == 0

    def settle(self) -> None:
        """Wait until events come through, and every earlier one has: what is behind it in each partition."""
        with Watcher(self.server) as watcher:
            watcher.until(type="leaderboardUpdate")  # what comes before its snapshot is in it
            self.set_scores(settled0=1, settled1=1)
            seen: set[str] = set()
            both = {"settled0", "settled1"}
            while not seen >= both:
                for partition in range(2):
                    event = ScoreEvent("1-0-0", "main", f"settled{partition}", 1, 1, 1)
                    self._producer.produce(self._topic, encode_event(event), partition=partition)
                assert self._producer.flush(10) == 0
                while not seen >= both and not watcher.is_silent(0.3):
                    seen.add(watcher.message().get("playerId", ""))

    def change(self, board: str = "main", **scores: int) -> None:
        """Change Redis and say so."""
        self.set_scores(board, **scores)
        self.say(*scores, board=board)


@pytest.fixture(scope="module")
def running_world(kafka_broker: KafkaBroker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("live")
    redis = RedisServer(directory / "redis", options={"appendonly": "no"})
    redis.start()
    world = World(redis, kafka_broker, f"live-{redis.port}", directory)
    try:
        with connect(redis) as client:
            trust(client)
        topics.ensure_topics(load_settings(world))
        world.server.start()
        wait_until_writable(world.server)
        wait_until(lambda: get(world.server, "/readyz").json()["live"]["ok"])
        yield world
    finally:
        world.server.stop()
        redis.stop()


def load_settings(world: World) -> Any:
    from server.config import load

    return load(world.settings)


@pytest.fixture
def world(running_world: World) -> Iterator[World]:
    """The world with both boards empty, and in the end nobody left watching."""
    # Somebody watches all the time, or the feed would stop reading between two tests.
    with Watcher(running_world.server, "board=weekly&scores=none"):
        running_world.settle()
        with connect(running_world.redis) as client:
            for key in client.scan_iter("*player:*"):
                client.delete(key)
            client.delete("leaderboard", "board:weekly:leaderboard")
            client.xtrim("outbox", maxlen=0, approximate=False)
        wait_until(lambda: get(running_world.server, "/readyz").json()["live"]["ok"])
        yield running_world
    assert running_world.server.running, running_world.server.output_tail()
    wait_until(lambda: metric(running_world.server, "scoreboard_live_connections") == 0)


# ---------------------------------------------------------------------- connecting


def test_empty_board_is_a_snapshot_too(world: World) -> None:
    with Watcher(world.server) as watcher:
        message = watcher.message()
        assert message["type"] == "leaderboardUpdate"
        assert message["board"] == "main"
        assert message["topScores"] == []


def test_snapshot_comes_at_once_and_has_the_first_ten(world: World) -> None:
    world.set_scores(**{f"p{number:02}": number for number in range(15)})
    with Watcher(world.server) as watcher:
        assert scores_of(watcher.message()) == [(f"p{number:02}", number) for number in range(14, 4, -1)]


@pytest.mark.parametrize("limit", [10, 25, 50, 100])
def test_list_is_as_long_as_asked_for(world: World, limit: int) -> None:
    world.set_scores(**{f"p{number}": number for number in range(110)})
    with Watcher(world.server, f"limit={limit}") as watcher:
        assert len(scores_of(watcher.message())) == limit


def test_named_players_come_with_the_snapshot(world: World) -> None:
    world.set_scores(ann=3, bob=2)
    with Watcher(world.server, "players=bob,nobody,ann") as watcher:
        assert scores_of(watcher.message()) == [("ann", 3), ("bob", 2)]
        updates = [watcher.message() for _ in range(2)]
        assert sorted((update["type"], update["playerId"], update["newScore"]) for update in updates) == [
            ("scoreUpdate", "ann", 3),
            ("scoreUpdate", "bob", 2),
        ]


@pytest.mark.parametrize(
    ("query", "status", "kind", "detail"),
    [
        ("limit=11", 400, "invalid-request", "limit: expected one of 10, 25, 50, 100, got '11'"),
        ("limit=", 400, "invalid-request", "limit: expected one of 10, 25, 50, 100, got ''"),
        ("limit=1e1", 400, "invalid-request", "limit: expected one of"),
        ("scores=some", 400, "invalid-request", "scores: expected all or none, got 'some'"),
        ("players=" + "x" * 129, 400, "invalid-request", "players: expected ids of 1 to 128 characters"),
        (
            "players=" + ",".join(f"p{number}" for number in range(101)),
            400,
            "invalid-request",
            "players: expected at most 100, got 101",
        ),
        ("board=daily", 404, "not-found", "board: expected one of main, weekly, got 'daily'"),
    ],
)
def test_wrong_parameter_is_refused_before_the_upgrade(
    world: World, query: str, status: int, kind: str, detail: str
) -> None:
    with Wire(world.server.port) as wire:
        assert_problem(wire.upgrade(f"/live-updates?{query}"), status, kind, detail)
        assert wire.request("GET", "/healthz").status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Upgrade": "h2c"},
        {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="},
        {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="},
        {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "8"},
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_request_without_an_upgrade_to_our_version_is_426(world: World, headers: dict[str, str], method: str) -> None:
    answer = once(world.server.port, method, "/live-updates?limit=10", **headers)
    assert answer.status == 426
    assert (answer.headers["upgrade"], answer.headers["sec-websocket-version"]) == ("websocket", "13")
    if method == "GET":
        assert_problem(answer, 426, "upgrade-required")


@pytest.mark.parametrize("key", ["", "c2hvcnQ=", "!" * 24])
def test_handshake_without_a_key_is_400(world: World, key: str) -> None:
    with Wire(world.server.port) as wire:
        answer = wire.upgrade("/live-updates", **{"Sec-WebSocket-Key": key})
        assert_problem(answer, 400, "invalid-request", "Sec-WebSocket-Key: expected 16 bytes in base64")


def test_upgrade_by_post_is_405(world: World) -> None:
    key = {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version": "13"}
    answer = once(world.server.port, "POST", "/live-updates", b"", Upgrade="websocket", Connection="Upgrade", **key)
    assert_problem(answer, 405, "method-not-allowed")
    assert answer.headers["allow"] == "GET, HEAD, OPTIONS"


@pytest.mark.parametrize("written", ["raw", "encoded"])
def test_name_in_the_address_is_utf_8_encoded_or_not(world: World, written: str) -> None:
    name = "Žižka 🦊 山田"
    world.set_scores(**{name: 7})
    encoded = urllib.parse.quote_plus(name)
    raw = name.replace(" ", "+").encode().decode("latin-1")  # a character for each byte, as the wire has them
    with Watcher(world.server, f"scores=none&players={raw if written == 'raw' else encoded}") as watcher:
        assert watcher.until(type="scoreUpdate") == {
            "type": "scoreUpdate", "board": "main", "playerId": name, "newScore": 7,
        }  # fmt: skip


def test_names_in_the_address_are_counted_in_characters(world: World) -> None:
    for character in ("a", "ü", "山", "🦊"):
        for spell in (urllib.parse.quote, lambda text: text.encode().decode("latin-1")):
            with Wire(world.server.port) as wire:
                assert wire.upgrade(f"/live-updates?players={spell(character * 128)}").status == 101
            with Wire(world.server.port) as wire:
                answer = wire.upgrade(f"/live-updates?players={spell(character * 129)}")
                assert_problem(answer, 400, "invalid-request", "ids of 1 to 128 characters")


@pytest.mark.parametrize("sent", ["%FF", "\xff", "\xc5", "%ED%A0%80", "ann,%C5"])
def test_name_that_is_no_utf_8_is_refused_and_never_another_name(world: World, sent: str) -> None:
    with Wire(world.server.port) as wire:
        answer = wire.upgrade(f"/live-updates?players={sent}")
        assert_problem(answer, 400, "invalid-request", "players: expected ids in UTF-8")


@pytest.mark.parametrize("path", ["/leaderboard", "/live-updates"])
@pytest.mark.parametrize(("sent", "shown"), [("\xc5\xbdi", "'Ži'"), ("%C5%BDi", "'Ži'"), ("\xff", "'\\udcff'")])
def test_other_parameters_are_utf_8_too(world: World, path: str, sent: str, shown: str) -> None:
    with Wire(world.server.port) as wire:
        assert_problem(wire.upgrade(f"{path}?board={sent}"), 404, "not-found", f"got {shown}")
        assert_problem(wire.upgrade(f"{path}?limit={sent}"), 400, "invalid-request", f"got {shown}")


# ---------------------------------------------------------------------- changes


def test_event_brings_the_score_and_the_list(world: World) -> None:
    with Watcher(world.server) as watcher:
        first = watcher.message()
        world.change(ann=5)
        update = watcher.until(type="leaderboardUpdate")
        assert scores_of(update) == [("ann", 5)]
        assert update["seq"] == first["seq"] + 1
        assert watcher.message() == {"type": "scoreUpdate", "board": "main", "playerId": "ann", "newScore": 5}


def test_list_numbers_rise_by_one_with_each_change_of_the_list(world: World) -> None:
    with Watcher(world.server, "scores=none") as watcher:
        numbers = [watcher.message()["seq"]]
        for score in range(1, 6):
            world.change(ann=score)
            message = watcher.message()
            assert scores_of(message) == [("ann", score)]
            numbers.append(message["seq"])
    assert numbers == list(range(numbers[0], numbers[0] + 6))


def test_first_watcher_of_a_server_misses_nothing_behind_its_snapshot(world: World) -> None:
    server = world.new_server()
    server.start()
    try:
        wait_until_writable(server)
        with Watcher(server, "scores=none&players=ann") as watcher:
            watcher.until(type="leaderboardUpdate")
            world.change(ann=5)
            assert watcher.until(type="scoreUpdate")["newScore"] == 5
    finally:
        server.stop()


def test_redis_counts_and_not_what_an_event_says(world: World) -> None:
    world.set_scores(ann=5)
    with Watcher(world.server) as watcher:
        watcher.message()
        world.say("ann", score=1)  # late, or repeated
        assert watcher.message() == {"type": "scoreUpdate", "board": "main", "playerId": "ann", "newScore": 5}


def test_change_below_the_list_moves_no_list(world: World) -> None:
    world.set_scores(**{f"p{number}": 100 + number for number in range(10)})
    with Watcher(world.server) as watcher:
        watcher.message()
        world.change(low=1)
        assert watcher.message() == {"type": "scoreUpdate", "board": "main", "playerId": "low", "newScore": 1}


def test_successor_of_a_fallen_leader_moves_up(world: World) -> None:
    world.set_scores(**{f"p{number:02}": number for number in range(12)})
    with Watcher(world.server, "scores=none") as watcher:
        assert scores_of(watcher.message())[-1] == ("p02", 2)
        world.change(p11=-1)
        assert scores_of(watcher.message())[-1] == ("p01", 1)


def test_boards_are_apart(world: World) -> None:
    with Watcher(world.server, "board=weekly") as weekly, Watcher(world.server) as main:
        weekly.message()
        main.message()
        world.change("weekly", ann=7)
        world.change(bob=8)
        assert scores_of(weekly.message()) == [("ann", 7)]
        assert scores_of(main.message()) == [("bob", 8)]


def test_without_scores_only_named_players_are_told_of(world: World) -> None:
    with Watcher(world.server, "scores=none&players=bob") as watcher:
        watcher.message()
        world.change(ann=1, bob=2)
        told = [watcher.until(type="scoreUpdate")]
        world.change(bob=3)
        told.append(watcher.until(type="scoreUpdate"))
        assert [update["playerId"] for update in told] == ["bob", "bob"]
        assert told[1]["newScore"] == 3


def test_nonsense_in_the_topic_stops_nothing(world: World) -> None:
    with Watcher(world.server) as watcher:
        watcher.message()
        for value in (b"", b"nonsense", b"{}", b'{"board":5}', None):
            world._producer.produce(world._topic, value)
        world.change(ann=5)
        assert scores_of(watcher.message()) == [("ann", 5)]


def test_update_reaches_watchers_through_outbox_relay_and_kafka(world: World) -> None:
    relay = SyncProcess(world.directory, world.settings, "relay")
    relay.start()
    try:
        with Watcher(world.server) as watcher:
            watcher.until(type="leaderboardUpdate")
            player = new_player()
            assert post(world.server, player, 5).status == 200
            assert watcher.until(type="scoreUpdate", playerId=player)["newScore"] == 5
            with connect(world.redis) as client:
                wait_until(lambda: client.xlen("outbox") == 0)
    finally:
        relay.stop()


# ---------------------------------------------------------------------- what a client may say


def test_subscribe_is_answered_with_current_scores_and_followed(world: World) -> None:
    world.set_scores(ann=5, bob=6)
    with Watcher(world.server, "scores=none") as watcher:
        watcher.message()
        watcher.ask(type="subscribe", players=["ann", "nobody"])
        assert watcher.message() == {"type": "scoreUpdate", "board": "main", "playerId": "ann", "newScore": 5}
        world.change(ann=7)
        assert watcher.until(type="scoreUpdate", playerId="ann")["newScore"] == 7
        watcher.ask(type="unsubscribe", players=["ann", "stranger"])
        watcher.ask(type="subscribe", players=["bob"])
        assert watcher.message()["playerId"] == "bob"
        world.change(ann=8)
        world.change(bob=9)
        assert watcher.until(type="scoreUpdate")["playerId"] == "bob"


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        (b"", "."),
        (b"hello", "."),
        (b"[]", "expected `object`"),
        (b"{}", "type"),
        (b'{"type":"dance"}', "dance"),
        (b'{"type":"subscribe"}', "players"),
        (b'{"type":"subscribe","players":"ann"}', "expected `array`"),
        (b'{"type":"subscribe","players":[5]}', "expected `str`"),
        (b'{"type":"subscribe","players":[""]}', "ids of 1 to 128 characters"),
        (b"[" * 100, "."),
        (b'{"type":"subscribe","players":[],"more":' + b"[" * 10_000, "."),
        (b'{"type":"subscribe","players":["\\ud800"]}', "."),
    ],
)
def test_nonsense_is_answered_with_an_error(world: World, text: bytes, detail: str) -> None:
    with Watcher(world.server) as watcher:
        watcher.message()
        watcher.send_text(text)
        error = watcher.until(type="error")
        assert re.search(detail, error["detail"], re.IGNORECASE)
        watcher.ask(type="subscribe", players=["ann"])
        world.change(ann=5)
        assert watcher.until(type="scoreUpdate", playerId="ann")


def test_more_than_a_hundred_names_are_an_error(world: World) -> None:
    with Watcher(world.server, "players=" + ",".join(f"p{number}" for number in range(95))) as watcher:
        watcher.message()
        watcher.ask(type="subscribe", players=["a", "b", "c", "d", "e"])
        watcher.ask(type="subscribe", players=["f"])
        assert watcher.until(type="error")["detail"] == "players: expected at most 100, got 101"


def test_nonsense_without_end_is_closed(world: World) -> None:
    with Watcher(world.server) as watcher:
        watcher.message()
        for _ in range(21):
            watcher.send_text(b"nonsense")
        for _ in range(20):
            assert watcher.message()["type"] == "error"
        opcode, payload = watcher.frame()
        assert (opcode, payload[:2]) == (CLOSE, (1008).to_bytes(2, "big"))


@pytest.mark.parametrize(
    ("ping", "pong"),
    [
        (b"ping", b"pong"),
        (b'"ping"', b'"pong"'),
        (b'{"type":"ping"}', b'{"type":"pong"}'),
        (b'{ "type": "ping", "at": 17 }', b'{"type":"pong"}'),
    ],
)
def test_heartbeat_is_answered_and_is_no_error(world: World, ping: bytes, pong: bytes) -> None:
    with Watcher(world.server, "scores=none") as watcher:
        watcher.message()
        for _ in range(30):  # more than errors may be
            watcher.send_text(ping)
        for _ in range(30):
            assert watcher.frame() == (TEXT, pong)


def test_heartbeats_without_end_are_closed(world: World) -> None:
    with Watcher(world.server, "scores=none") as watcher:
        watcher.message()
        for _ in range(200):
            watcher.send_text(b"ping")
        opcode = TEXT
        while opcode == TEXT:
            opcode, payload = watcher.frame()
        assert (opcode, payload) == (CLOSE, b"\x03\xf0too many messages")


@pytest.mark.parametrize("escaped", [False, True], ids=["utf-8", "escaped"])
@pytest.mark.parametrize("character", ["山", "🦊"])
def test_hundred_of_the_longest_names_fit_into_a_message(world: World, character: str, escaped: bool) -> None:
    names = [f"{number:03}" + character * 125 for number in range(100)]
    world.set_scores(**{names[-1]: 5})
    message = json.dumps({"type": "subscribe", "players": names}, ensure_ascii=escaped, indent=8 if escaped else None)
    with Watcher(world.server, "scores=none") as watcher:
        watcher.message()
        watcher.send_text(message.encode())
        assert watcher.until(type="scoreUpdate")["playerId"] == names[-1]
        world.change(**{names[-1]: 6})
        assert watcher.until(type="scoreUpdate")["newScore"] == 6
        watcher.send_text(message.replace("subscribe", "unsubscribe").encode())
        watcher.ask(type="subscribe", players=[names[-1]])
        assert watcher.until(type="scoreUpdate")["newScore"] == 6


@pytest.mark.parametrize("pieces", [1, 3])
def test_message_that_is_too_large_is_closed_with_1009(world: World, pieces: int) -> None:
    with Watcher(world.server, "scores=none") as watcher:
        watcher.message()
        size = MAX_MESSAGE_BYTES // pieces + 1
        for number in range(pieces):
            first = (0x01 if number == 0 else 0x00) | (0x80 if number == pieces - 1 else 0)
            watcher.send(bytes([first, 0xFF]) + size.to_bytes(8, "big") + b"\0\0\0\0" + b" " * size)
        opcode, payload = watcher.frame()
        assert (opcode, payload) == (CLOSE, b"\x03\xf1expected a message of at most 163840 bytes")
        assert watcher.ended


def test_long_messages_count_for_more(world: World) -> None:
    with Watcher(world.server, "scores=none") as watcher:
        watcher.message()
        for _ in range(11):
            watcher.send_text(b'{"type":"unsubscribe","players":[]}' + b" " * 150_000)
        assert watcher.frame() == (CLOSE, b"\x03\xf0too many messages")


def test_messages_without_end_are_closed(world: World) -> None:
    with Watcher(world.server) as watcher:
        watcher.message()
        for _ in range(200):
            watcher.ask(type="unsubscribe", players=[])
        opcode, payload = watcher.frame()
        assert (opcode, payload) == (CLOSE, b"\x03\xf0too many messages")


# ---------------------------------------------------------------------- who may watch


@pytest.fixture
def strict_server(world: World) -> Iterator[ServerProcess]:
    """A server that lets in three, two of them from one address, and pages of one origin."""
    limits = {"LIVE_MAX_CONNECTIONS": "3", "LIVE_MAX_PER_IP": "2", "TRUSTED_PROXIES": "127.0.0.1"}
    server = ServerProcess(world.directory, world.settings | limits | {"CORS_ORIGINS": "https://game.example"})
    try:
        server.start()
        wait_until_writable(server)
        yield server
    finally:
        server.stop()


def refused(server: ServerProcess, **headers: str) -> Answer:
    with Wire(server.port) as wire:
        return wire.upgrade("/live-updates", **headers)


def test_connections_of_one_address_are_limited_unless_they_bring_a_token(strict_server: ServerProcess) -> None:
    with Watcher(strict_server) as first, Watcher(strict_server):
        answer = refused(strict_server)
        assert_problem(answer, 503, "too-many-connections", "at most 2 connections from 127.0.0.1 (LIVE_MAX_PER_IP)")
        assert answer.headers["retry-after"] == "5"
        with Wire(strict_server.port) as wire:
            assert wire.upgrade("/live-updates", Authorization="Bearer nonsense").status == 503
        with Wire(strict_server.port) as wire:
            assert wire.upgrade("/live-updates", Authorization=f"Bearer {token('ann')}").status == 101
            first.until(type="leaderboardUpdate")
        first.close()
        wait_until(lambda: metric(strict_server, "scoreboard_live_connections") == 1)
        with Watcher(strict_server) as third:
            third.until(type="leaderboardUpdate")


def test_connections_with_a_token_do_not_count_against_their_address(strict_server: ServerProcess) -> None:
    bearer = f"Bearer {token('ann')}"
    with Wire(strict_server.port) as game, Wire(strict_server.port) as one, Wire(strict_server.port) as other:
        assert game.upgrade("/live-updates", Authorization=bearer).status == 101
        assert one.upgrade("/live-updates").status == 101
        assert other.upgrade("/live-updates").status == 101
        assert_problem(refused(strict_server), 503, "too-many-connections", "LIVE_MAX_CONNECTIONS")
        game.close()
        wait_until(lambda: metric(strict_server, "scoreboard_live_connections") == 2)
        assert_problem(refused(strict_server), 503, "too-many-connections", "LIVE_MAX_PER_IP")


def test_connections_are_limited_in_total_and_counted_by_the_address_behind_a_proxy(
    strict_server: ServerProcess,
) -> None:
    with Wire(strict_server.port) as one, Wire(strict_server.port) as other, Wire(strict_server.port) as third:
        for number, wire in enumerate((one, other, third)):
            assert wire.upgrade("/live-updates", X_Forwarded_For=f"10.0.0.{number}").status == 101
        answer = refused(strict_server, X_Forwarded_For="10.0.0.9", Authorization=f"Bearer {token('ann')}")
        assert_problem(answer, 503, "too-many-connections", "at most 3 connections in total (LIVE_MAX_CONNECTIONS)")
    wait_until(lambda: metric(strict_server, "scoreboard_live_connections") == 0)


@pytest.mark.parametrize("origin", ["https://game.example", "http://test", ""])
def test_page_of_an_allowed_origin_or_of_our_own_may_watch(strict_server: ServerProcess, origin: str) -> None:
    with Wire(strict_server.port) as wire:
        assert wire.upgrade("/live-updates", **({"Origin": origin} if origin else {})).status == 101


@pytest.mark.parametrize("origin", ["https://evil.example", "https://game.example.evil", "null"])
def test_page_of_another_origin_may_not_watch(strict_server: ServerProcess, origin: str) -> None:
    assert_problem(refused(strict_server, Origin=origin), 403, "forbidden", f"got '{origin}'")


# ---------------------------------------------------------------------- slow clients


def test_client_that_stops_reading_lags_alone_and_gets_a_resync_when_it_reads_again(world: World) -> None:
    names = [f"{'long' * 30}{number}" for number in range(100)]
    world.set_scores(**dict.fromkeys(names, 1))
    with (
        Watcher(world.server, "limit=100&players=ann", receive_buffer_bytes=4096) as slow,
        Watcher(world.server) as quick,
    ):
        slow.message()
        quick.message()
        score = 1
        while metric(world.server, "scoreboard_live_lagging") == 0:
            score += 1
            assert score < 200, "it never lagged"
            world.change(**dict.fromkeys(names[:50], score))
            assert quick.until(type="leaderboardUpdate")["topScores"][0]["score"] == score
        world.change(ann=9_000)
        assert quick.until(type="leaderboardUpdate")["topScores"][0]["playerId"] == "ann"

        resync = slow.until(resync=True)
        assert scores_of(resync)[0] == ("ann", 9_000)
        assert slow.until(type="scoreUpdate", playerId="ann")["newScore"] == 9_000
        world.change(ann=9_001)
        assert slow.until(type="leaderboardUpdate")["topScores"][0]["score"] == 9_001
    assert metric(world.server, "scoreboard_live_lagging") == 0


# ---------------------------------------------------------------------- staleness


def test_board_is_called_stale_while_the_outbox_is_not_emptied_and_still_moves(world: World) -> None:
    player = new_player()
    with Watcher(world.server) as watcher:
        watcher.message()
        assert post(world.server, player, 5).status == 200  # nobody relays it
        late = "changes wait in Redis for Kafka: is the relay or Kafka down?"
        assert watcher.until(type="status") == {"type": "status", "live": False, "detail": late}
        assert get(world.server, "/readyz").json()["live"] == {"ok": False, "detail": late}
        with Watcher(world.server) as other:
            assert other.until(type="status")["live"] is False
            assert other.until(type="leaderboardUpdate")
        world.set_scores(zoe=99)  # without a word, and without an event
        assert ("zoe", 99) in scores_of(wait_for_list(watcher, "zoe"))
        with connect(world.redis) as client:
            client.xtrim("outbox", maxlen=0, approximate=False)
        assert watcher.until(type="status")["live"] is True


def test_entry_from_the_future_that_does_not_move_makes_the_board_stale(world: World) -> None:
    with Watcher(world.server) as watcher, connect(world.redis) as client:
        watcher.message()
        future_ms = (client.time()[0] + 7200) * 1000
        client.xadd("outbox", {"batch": b"nobody relays it"}, id=f"{future_ms}-0")
        assert watcher.until(type="status")["live"] is False
        client.xtrim("outbox", maxlen=0, approximate=False)
        assert watcher.until(type="status")["live"] is True
        client.delete("outbox")  # or all later ids of this file would be in the future


@pytest.mark.parametrize("ahead_s", [5, -5])
def test_server_whose_clock_is_wrong_is_live_and_tells_true_delays(world: World, tmp_path: Path, ahead_s: int) -> None:
    server = ServerProcess(tmp_path, {**world.settings, "PYTHONPATH": str(clock_ahead(tmp_path, ahead_s))})
    relay = SyncProcess(world.directory, world.settings, "relay")
    relay.start()
    server.start()
    try:
        wait_until_writable(server)
        wait_until(lambda: get(server, "/readyz").json()["live"]["ok"])
        with Watcher(server) as watcher:
            watcher.until(type="leaderboardUpdate")
            delays = []
            for number in range(10):
                assert post(server, new_player(), 1000 + number).status == 200
                delays.append(watcher.until(type="leaderboardUpdate").get("delayMs"))
            told = sorted(delay for delay in delays if delay is not None)
            # Half of them, since a busy machine may make some of them late.
            assert 0 < told[len(told) // 2] < 2000
            assert metric(server, "scoreboard_outbox_oldest_age_seconds") < 2
            assert get(server, "/readyz").json()["live"] == {"ok": True}
    finally:
        server.stop()
        relay.stop()


def clock_ahead(directory: Path, ahead_s: float) -> Path:
    """Where to look for modules first, to have a clock that is ahead of everybody's."""
    (directory / "sitecustomize.py").write_text(
        f"import time\nreal, real_ns = time.time, time.time_ns\ntime.time = lambda: real() + {ahead_s}\n"
        f"time.time_ns = lambda: real_ns() + {ahead_s} * 10**9\n"
    )
    return directory


# ---------------------------------------------------------------------- while another server rebuilds


def test_half_rebuilt_board_is_shown_to_nobody(world: World) -> None:
    whole = {f"player{number}": number for number in range(1, 6)}
    top = sorted(whole.items(), key=lambda entry: -entry[1])
    with Watcher(world.server, "players=player1") as watcher, connect(world.redis) as client:
        world.change(**whole)
        while scores_of(watcher.until(type="leaderboardUpdate")) != top:
            pass
        with client.pipeline() as together:  # as a server on another machine does that rebuilds
            together.delete("scoreboard:ready", "leaderboard", *(f"player:{player}:score" for player in whole))
            together.mset({"player:player1:score": 99})
            together.zadd("leaderboard", {"player1": 99})
            together.execute()
        world.say(*whole)
        watcher.ask(type="subscribe", players=["player1"])
        with Watcher(world.server, "scores=none&players=player1") as late:
            answer = get(world.server, "/leaderboard")
            wait_until(lambda: not get(world.server, "/readyz").json()["live"]["ok"])
            world.set_scores(**whole)

            def is_whole_again() -> bool:
                trust(client, 2)  # again and again: the server may be about to begin a rebuild of its own
                return can_write(world.server)

            wait_until(is_whole_again, 20)
            assert answer.status == 503, "the database is away, too"
            assert scores_of(late.until(type="leaderboardUpdate")) == top
            assert late.until(type="scoreUpdate", playerId="player1")["newScore"] == 1
            while (message := watcher.message()) != {"type": "status", "live": True}:
                assert message.get("newScore") != 99
                if message["type"] == "leaderboardUpdate":
                    assert scores_of(message) == top


def test_client_that_lagged_through_a_change_of_status_is_told(world: World) -> None:
    names = [f"{'long' * 30}{number}" for number in range(100)]
    world.set_scores(**dict.fromkeys(names, 1))
    with Watcher(world.server, "limit=100", receive_buffer_bytes=4096) as slow:
        slow.message()
        score = 1
        while metric(world.server, "scoreboard_live_lagging") == 0:
            score += 1
            assert score < 200, "it never lagged"
            world.change(**dict.fromkeys(names[:50], score))
        assert post(world.server, new_player(), 5).status == 200  # nobody relays it
        wait_until(lambda: not get(world.server, "/readyz").json()["live"]["ok"])
        assert slow.until(resync=True)
        assert slow.until(type="status")["live"] is False
        with connect(world.redis) as client:
            client.xtrim("outbox", maxlen=0, approximate=False)
        assert slow.until(type="status")["live"] is True


def test_server_without_kafka_says_so_and_reads_once_a_second(
    tmp_path: Path, fresh_redis: Callable[..., RedisServer]
) -> None:
    redis = fresh_redis()
    with connect(redis) as client:
        trust(client)
        server = ServerProcess(tmp_path, {"REDIS_PORT": str(redis.port), "KAFKA_BROKERS": f"127.0.0.1:{free_port()}"})
        server.start()
        try:
            assert get(server, "/readyz").json()["live"]["ok"] is False, "not even in its first second"
            wait_until_writable(server)
            with Watcher(server) as watcher:
                while (status := watcher.until(type="status")).get("detail") != "Kafka does not answer":
                    assert status["live"] is False
                assert post(server, "ann", 5).status == 200
                assert ("ann", 5) in scores_of(wait_for_list(watcher, "ann"))
        finally:
            server.stop()


def wait_for_list(watcher: Watcher, player: str) -> dict[str, Any]:
    while True:
        message = watcher.until(type="leaderboardUpdate")
        if any(name == player for name, _ in scores_of(message)):
            return message


# ---------------------------------------------------------------------- the process


def test_stop_says_goodbye_to_every_watcher(world: World) -> None:
    server = world.new_server()
    server.start()
    watchers = []
    try:
        wait_until_writable(server)
        watchers = [Watcher(server) for _ in range(5)]
        for watcher in watchers:
            watcher.until(type="leaderboardUpdate")
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        for watcher in watchers:
            opcode, payload = TEXT, b""
            while opcode == TEXT:
                opcode, payload = watcher.frame()
            assert (opcode, payload) == (CLOSE, b"\x03\xe9restarting; reconnect within 1 s")
        stopping.join()
        assert server.status == 0
        said = server.output_tail(1000)
        assert not re.search("Traceback|never awaited|destroyed|Warning|Exception ignored", said), said
    finally:
        for watcher in watchers:
            watcher.close()
        server.stop()
