"""Dead letters: what cannot be stored is kept with the reason, can be looked at, and can be sent once more."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from confluent_kafka import Producer

from server.config import Settings
from server.events import encode_event
from sync.dead_letters import Letter, letters, send_again
from sync.persister import Persister
from tests.odd_records import Odd, put_odd_records
from tests.services import ROOT, KafkaBroker, environment, wait_until
from tests.sync_parts import (
    environment_of,
    event,
    limit_dead_letters,
    migrated,
    put_records,
    records_of,
    running,
)

pytestmark = [pytest.mark.kafka, pytest.mark.postgres]


@pytest.fixture
def settings(kafka_broker: KafkaBroker, kafka_topic: str, database_url: str) -> Settings:
    return migrated(kafka_broker, kafka_topic, database_url, partitions=2)


@pytest.fixture
def database(settings: Settings) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(settings.database_url, autocommit=True) as connection:
        yield connection


def persist_all(settings: Settings, database: psycopg.Connection[Any], records: int) -> None:
    """Run a persister until it has been through this many records."""
    total = "SELECT sum(next_offset) FROM consumer_offsets"
    with running(Persister, settings):
        wait_until(lambda: database.execute(total).fetchone() == (records,))


def scores(database: psycopg.Connection[Any]) -> dict[str, int]:
    return dict(database.execute("SELECT player_id, score FROM scores").fetchall())


def raw(**fields: Any) -> bytes:
    """An event's JSON, right but for `fields`."""
    right: dict[str, Any] = json.loads(encode_event(event("ann", 1000)))
    return json.dumps(right | fields).encode()


def command(settings: Settings, *arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "server", "dead-letters", *arguments]
    env = environment(environment_of(settings))
    return subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


POISON = {
    "JSON is malformed": b"not JSON",
    "Input data was truncated": b"",
    "Object missing required field `newScore`": b'{"eventId":"1-0-0","board":"main","playerId":"a","scoreDelta":1}',
    "Expected `int`, got `str` - at `$.newScore`": raw(newScore="7"),
    "Expected `int` <= 9007199254740991": raw(newScore=2**53),
    "Expected `str` of length <= 128": raw(playerId="x" * 129),
    "Expected `str` of length <= 64": raw(board="b" * 9000),
    "not enough values to unpack": raw(eventId="1000-0"),
    "`at` is the id's milliseconds: expected 1000, got 1001": raw(at=1001),
    "eventId: expected ms-seq-index, each in range": raw(eventId=f"1000-{2**60}-0"),
    "Expected `int` <= 253402300799999 - at `$.at`": raw(eventId=f"{10**17}-0-0", at=10**17),
    "playerId: expected no control characters, got '\\x00'": raw(playerId="a\0b"),
}


def test_each_poison_is_put_aside_with_its_reason(settings: Settings, database: psycopg.Connection[Any]) -> None:
    put_records(settings, [event("good", 1000), *POISON.values(), event("better", 1000)])
    persist_all(settings, database, len(POISON) + 2)
    assert scores(database) == {"good": 1, "better": 1}
    kept = {letter.value: letter.reason for letter in letters(settings)}
    assert set(kept) == set(POISON.values())
    for reason, value in POISON.items():
        assert reason in kept[value]


def test_unknown_fields_are_taken_and_an_unknown_major_is_not(
    settings: Settings, database: psycopg.Connection[Any]
) -> None:
    put_records(settings, [raw(playerId="new", season=3, tags=["a"])])
    put_records(settings, [raw(playerId="newer")], version=b"2")
    persist_all(settings, database, 2)
    assert scores(database) == {"new": 1}
    (letter,) = letters(settings)
    assert letter.reason == "format version: expected b'1', got b'2'"


def test_letter_tells_where_it_stood_and_what_it_was(settings: Settings, database: psycopg.Connection[Any]) -> None:
    producer = Producer({"bootstrap.servers": settings.kafka_brokers})
    headers: list[tuple[str, str | bytes | None]] = [("v", b"1"), ("trace", b"\xff\0"), ("empty", None)]
    producer.produce(settings.kafka_topic, b"poison", b"ann", 1, headers=headers, timestamp=1_700_000_000_000)
    assert producer.flush(10) == 0
    persist_all(settings, database, 1)
    (letter,) = letters(settings)
    assert letter[:4] == (settings.kafka_topic, 1, 0, "JSON is malformed: invalid character (byte 0)")
    assert letter[5:] == (b"ann", b"poison", headers, 1_700_000_000_000)


def test_letters_too_large_for_their_topic_are_cut_and_not_sent_again(
    settings: Settings, database: psycopg.Connection[Any]
) -> None:
    limit_dead_letters(settings, 5000)
    poison = [b"small", b"x" * 900_000, b"y" * 4900, b"z" * 700]
    put_records(settings, poison)
    persist_all(settings, database, 4)
    kept = list(letters(settings))
    assert {(letter.value or b"")[:1]: len(letter.value or b"") for letter in kept} == {
        b"s": 5, b"x": 1000, b"y": 1000, b"z": 700,
    }  # fmt: skip
    assert {(letter.value or b"")[:1] for letter in kept if letter.whole} == {b"s", b"z"}
    cut = ", ".join(f"{letter.partition}:{letter.offset}" for letter in kept if not letter.whole)
    replayed = command(settings, "--replay")
    assert replayed.stdout == f"2 records sent once more\nnot sent, for they were too large to be kept whole: {cut}\n"
    assert len(records_of(settings)) == 6


def test_record_as_large_as_kafka_takes_is_kept(settings: Settings, database: psycopg.Connection[Any]) -> None:
    producer = Producer({"bootstrap.servers": settings.kafka_brokers, "message.max.bytes": 2_000_000})
    for partition in range(2):
        producer.produce(settings.kafka_topic, b"x" * 1_048_400, partition=partition)
    producer.produce(settings.kafka_topic, b"x" * 1_000_000, partition=0)
    assert producer.flush(10) == 0
    persist_all(settings, database, 3)
    kept = sorted((letter.whole, len(letter.value or b"")) for letter in letters(settings))
    assert kept == [(False, 100_000), (False, 100_000), (True, 1_000_000)]


def test_letter_of_somebody_else_is_listed_too(settings: Settings) -> None:
    topic = dataclasses.replace(settings, kafka_topic=settings.dead_letter_topic)
    strange = [(b"partition", b"x"), (b"offset", b"9" * 5000), (b"timestamp", b"-"), (b"reason", b"\x1b[2J\xff")]
    put_odd_records(topic, [Odd(b"1", strange), Odd(b"2", [(b"\xff", b"x")]), Odd(None, [])])
    listed = command(settings)
    assert listed.returncode == 0, listed.stderr
    assert len(listed.stdout.splitlines()) == 4
    assert "\x1b" not in listed.stdout
    far = Letter("t", 0, 0, "r", 2**62, None, None, [], 0)
    assert f"{2**62} ms" in str(far)


def test_replay_sends_records_as_they_were_and_counts_them_once(
    settings: Settings, database: psycopg.Connection[Any]
) -> None:
    late = event("ann", 1000, score=1)
    put_records(settings, [event("ann", 2000, score=2)])
    put_records(settings, [late, event("bob", 1000, score=7)], version=b"2")
    persist_all(settings, database, 3)
    repaired = [letter._replace(headers=[("v", b"1")]) for letter in letters(settings)]
    for _ in range(2):
        assert send_again(settings, repaired) == 2
    persist_all(settings, database, 7)
    assert scores(database) == {"ann": 2, "bob": 7}
    assert database.execute("SELECT count(*) FROM score_events").fetchone() == (3,)
    same = [record for record in records_of(settings) if record.value() == encode_event(late)]
    assert len(same) == 3
    assert len({(record.key(), record.timestamp()) for record in same}) == 1


def test_letters_that_say_the_same_are_sent_once(settings: Settings) -> None:
    letter = Letter(settings.kafka_topic, 0, 5, "because", 1, b"ann", b"poison", [], 1000)
    assert send_again(settings, [letter, letter._replace(offset=6), letter._replace(key=b"bob")]) == 2
    assert [record.timestamp()[1] for record in records_of(settings)] == [1000, 1000]


def test_command_lists_and_replays(settings: Settings, database: psycopg.Connection[Any]) -> None:
    assert command(settings).stdout == "0 dead letters\n"
    put_records(settings, [b"poison 1", b"poison 2", b"poison 3"])
    persist_all(settings, database, 3)
    listed = command(settings, "--limit", "2")
    assert listed.returncode == 0, listed.stderr
    *lines, summary = listed.stdout.splitlines()
    assert summary == "3 dead letters, the latest 2 of them listed"
    assert len(lines) == 2
    kept = list(letters(settings))
    assert lines == [str(letter) for letter in kept[1:]]
    assert "JSON is malformed" in lines[0]
    assert lines[0].startswith(f"{settings.kafka_topic}/{kept[1].partition}:{kept[1].offset}  20")
    one = command(settings, "--replay", "--only", f"{kept[1].partition}:{kept[1].offset}")
    assert (one.returncode, one.stdout) == (0, "1 records sent once more\n")
    assert command(settings, "--replay", "--only", "0:99").returncode == 1
    assert command(settings, "--replay").stdout == "3 records sent once more\n"
    values = [record.value() for record in records_of(settings)]
    assert sorted(map(values.count, {letter.value for letter in kept})) == [2, 2, 3]


def test_wrong_use_of_the_command_is_said(settings: Settings) -> None:
    for arguments, says in (
        (["--only", "3:1"], "--only says what to --replay"),
        (["--only", "x"], "expected PARTITION"),
    ):
        used = command(settings, *arguments)
        assert used.returncode == 2
        assert says in used.stderr
