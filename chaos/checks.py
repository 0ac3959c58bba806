"""What must hold when all is healed: every place says what the ledger says, and no event is there twice.

Reads the stores; changes nothing in them but a table of its own.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import confluent_kafka
import psycopg
import redis

from bench.stack import TOPIC, Stack
from chaos.ledger import Ledger, player_name
from server.events import MEMORY_HEADER, decode_event
from server.fences import Fences
from server.keys import Keys

_TABLE: Final = "CREATE TABLE acknowledged (update bigint, player_id text, delta bigint, score bigint)"
# Deltas are positive, so a player's new score names one update of that player: while Redis loses nothing, no other
# can bring it again.
_LEDGER: Final = "SELECT player_id, delta, score FROM acknowledged"
_HISTORY: Final = "SELECT player_id, delta, score FROM score_events"
_LOST: Final = f"SELECT count(*) FROM ({_LEDGER} EXCEPT ALL {_HISTORY}) AS missing"
_DUPLICATED: Final = f"SELECT count(*) FROM ({_HISTORY} EXCEPT ALL {_LEDGER}) AS extra"
_TWICE: Final = "SELECT count(*) - count(DISTINCT (ver_ms, ver_seq)) FROM score_events"

# Where Redis did lose something, a record's memory says which update it is of: `update` is its key.
_RECORDED: Final = "CREATE TABLE recorded (update bigint, ms bigint, seq bigint, PRIMARY KEY (update, ms, seq))"
_RECORD: Final = """
    INSERT INTO recorded SELECT * FROM unnest(%s::bigint[], %s::bigint[], %s::bigint[]) ON CONFLICT DO NOTHING
"""
_EXCUSED: Final = "SELECT count(*) FROM acknowledged WHERE update NOT IN (SELECT update FROM recorded)"
_RECORDED_BUT_LOST: Final = """
    SELECT count(*) FROM recorded AS r
    WHERE NOT EXISTS (SELECT FROM score_events AS e WHERE (e.ver_ms, e.ver_seq) = (r.ms, r.seq))
"""
_RECORDED_TWICE: Final = "SELECT count(*) - count(DISTINCT update) FROM recorded"

READ_RECORDS: Final = 10_000
Scores = dict[str, int]


class Verdict(NamedTuple):
    """Updates that are not in the history, changes in it that nobody was told of, and what else is wrong.

    `excused` were acknowledged, but lost by Redis before Kafka had them; None where Redis may lose nothing.
    """

    lost: int
    duplicated: int
    disagreements: list[str]
    excused: int | None = None


def judge(stack: Stack, ledger: Ledger) -> Verdict:
    """Compare all places with the ledger; nothing may be on its way any more."""
    expected = ledger.scores()
    with psycopg.connect(stack.postgres.url) as connection:
        places = {**_in_redis(stack), **_in_database(connection)}
        _write_down(connection, ledger)
        lost, extra, twice = (_number(connection, query) for query in (_LOST, _DUPLICATED, _TWICE))
    wrong = [line for place, scores in places.items() for line in differences(place, expected, scores)]
    if twice:
        wrong.append(f"score_events has {twice} event ids twice")
    top = sorted(((score, player) for player, score in expected.items()), reverse=True)
    if _page(stack) != [(player, score) for score, player in top]:
        wrong.append("GET /leaderboard is not the ledger's order")
    return Verdict(lost, extra, wrong)


def judge_losses(stack: Stack, ledger: Ledger) -> Verdict:
    """Compare all places with each other, and the ledger with Kafka; nothing may be on its way any more."""
    with psycopg.connect(stack.postgres.url) as connection:
        places = {**_in_redis(stack), **_in_database(connection)}
        _write_down(connection, ledger)
        connection.execute(_RECORDED)
        for columns in _records(stack):
            connection.execute(_RECORD, columns)
        connection.execute("ANALYZE recorded, acknowledged")
        counts = [_number(connection, query) for query in (_RECORDED_BUT_LOST, _RECORDED_TWICE, _EXCUSED, _TWICE)]
    lost, twice, excused, same_id = counts
    history = places["the sums of score_events"]
    wrong = [line for place, scores in places.items() for line in differences(place, history, scores)]
    if same_id:
        wrong.append(f"score_events has {same_id} event ids twice")
    return Verdict(lost, twice, wrong, excused)


def differences(place: str, expected: Scores, found: Scores) -> list[str]:
    """A line for each player whose score is another in `place` than in the ledger."""
    return [
        f"{place}: expected {expected.get(player)} for {player}, got {found.get(player)}"
        for player in sorted(expected.keys() | found.keys())
        if expected.get(player) != found.get(player)
    ]


def _in_redis(stack: Stack) -> dict[str, Scores]:
    board = Keys().board("main")
    with redis.Redis(stack.redis.host, stack.redis.port) as client:
        members = client.zrange(board.leaderboard, 0, -1, withscores=True)
        leaderboard = {player.decode(): int(score) for player, score in members}
        keys = {board.score(player): player for player in leaderboard}
        stray = {key.decode(): key.decode() for key in client.scan_iter(board.score("*"), count=1000)}
        players = {**stray, **keys}
        values = client.mget(list(players)) if players else []
    scores = {player: int(value) for player, value in zip(players.values(), values, strict=True) if value is not None}
    return {"the keys in Redis": scores, "the board in Redis": leaderboard}


def _in_database(connection: psycopg.Connection) -> dict[str, Scores]:
    queries = {
        "scores": "SELECT player_id, score FROM scores",
        "the sums of score_events": "SELECT player_id, sum(delta) FROM score_events GROUP BY 1",
    }
    return {
        place: {player: int(score) for player, score in connection.execute(query)} for place, query in queries.items()
    }


def _write_down(connection: psycopg.Connection, ledger: Ledger) -> None:
    connection.execute(_TABLE)
    with connection.cursor() as cursor, cursor.copy("COPY acknowledged FROM STDIN") as copy:
        for update, player, delta, new_score in ledger:
            copy.write(f"{update}\t{player_name(player)}\t{delta}\t{new_score}\n")


def _records(stack: Stack) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """Update, milliseconds and sequence of all events in Kafka that count, some at a time."""
    consumer = confluent_kafka.Consumer({"bootstrap.servers": stack.kafka.brokers, "group.id": "chaos"})
    try:
        left: dict[int, int] = {}
        for number in consumer.list_topics(TOPIC, timeout=10).topics[TOPIC].partitions:
            left[number] = consumer.get_watermark_offsets(confluent_kafka.TopicPartition(TOPIC, number), timeout=10)[1]
        consumer.assign([confluent_kafka.TopicPartition(TOPIC, number, 0) for number, end in left.items() if end])
        unread, fences = sum(left.values()), Fences()
        while unread:
            updates, ms, seq = [], [], []
            for record in consumer.consume(READ_RECORDS, 5):
                assert record.error() is None, record.error()
                unread -= 1
                if not fences.admits(record.partition(), record.headers()):
                    continue
                version = decode_event(record.value()).version
                ms.append(version[0])
                seq.append(version[1])
                updates.append(_update_of(record))
            yield updates, ms, seq
    finally:
        consumer.close()


def _update_of(record: confluent_kafka.Message) -> int:
    headers: Any = record.headers()
    return int(dict(headers)[MEMORY_HEADER].rpartition(b":")[2])


def _number(connection: psycopg.Connection, query: str) -> int:
    row = connection.execute(query).fetchone()
    assert row is not None
    return int(row[0])


def _page(stack: Stack) -> list[tuple[str, int]]:
    with urllib.request.urlopen(f"{stack.server.url}/leaderboard?limit=1000", timeout=10) as answer:
        return [(entry["playerId"], entry["score"]) for entry in json.load(answer)]
