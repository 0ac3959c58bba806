"""What is written as an event is read as the same event, and nothing else is taken for one."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.events import (
    INDEX_SPAN,
    MAX_AT_MS,
    MAX_BATCH,
    MAX_MEMORY,
    MAX_SCORE,
    BadEvent,
    ScoreEvent,
    decode_event,
    encode_event,
    events_of_entry,
    memories_of_entry,
    memory_of_headers,
)

DOCUMENT = {
    "eventId": "1795428816570-2-0",
    "board": "main",
    "playerId": "player123",
    "scoreDelta": 5,
    "newScore": 125,
    "at": 1795428816570,
}

players = st.text(min_size=1, max_size=128, alphabet="ab:%é玩🎮 ")
scores = st.integers(-MAX_SCORE, MAX_SCORE)


def document(**changes: Any) -> bytes:
    return json.dumps({**DOCUMENT, **changes}).encode()


def packed(*fields: Any) -> bytes:
    return msgspec.msgpack.encode(fields)


def test_event_reads_as_documented() -> None:
    event = decode_event(document())
    assert event == ScoreEvent("1795428816570-2-0", "main", "player123", 5, 125, 1795428816570)
    assert json.loads(encode_event(event)) == DOCUMENT


@given(players, scores, scores, st.integers(0, 2**44), st.integers(0, 2**32), st.integers(0, MAX_BATCH - 1))
def test_event_survives_the_way_there_and_back(
    player: str, delta: int, score: int, ms: int, seq: int, index: int
) -> None:
    event = ScoreEvent(f"{ms}-{seq}-{index}", "main", player, delta, score, ms)
    assert decode_event(encode_event(event)) == event
    assert event.version == (ms, seq * INDEX_SPAN + index)


def test_versions_rise_with_time_sequence_and_index() -> None:
    ids = ["9-0-0", "10-0-0", "10-0-1", f"10-0-{MAX_BATCH - 1}", "10-1-0", "10-9-0", "10-10-0", "11-0-0"]
    versions = [ScoreEvent(each, "main", "ada", 0, 0, 0).version for each in ids]
    assert versions == sorted(set(versions))


def test_unknown_field_is_no_obstacle() -> None:
    assert decode_event(document(season=3)).player_id == "player123"


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"",
        b"not JSON",
        b"\xff",
        b"[]",
        b"[" * 10_000,
        document(eventId="1795428816570-2"),
        document(eventId="a-b-c"),
        document(eventId=5),
        document(at=1),
        document(playerId=""),
        document(playerId="x" * 129),
        document(playerId=None),
        document(scoreDelta=1.5),
        document(scoreDelta=MAX_SCORE + 1),
        document(newScore=-MAX_SCORE - 1),
        document(newScore="125"),
        document(board=None),
        json.dumps({key: value for key, value in DOCUMENT.items() if key != "newScore"}).encode(),
        document()[:-1] + b',"more":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        document()[:-1] + b',"more":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
        document(board="b" * 9000),
        document(board="Main"),
        document(board=""),
        document(board="a:b"),
        document(playerId="a\0b"),
        document(playerId="a\nb"),
        document(playerId="a\x9fb"),
        document(playerId="XX").replace(b"XX", b"\\ud800"),
        document(playerId="XX").replace(b"XX", b"\xed\xa0\x80"),
        document().replace(b'"at": 1795428816570', b'"at": ' + b"9" * 5000),
        document().replace(b'"newScore": 125', b'"newScore": ' + b"9" * 5000),
        document(eventId=f"{'9' * 5000}-0-0"),
        document(eventId=f"{'9' * 4000}-0-0", at=1),
        document(eventId=f"{MAX_AT_MS + 1}-0-0", at=MAX_AT_MS + 1),
        document(eventId=f"1-{2**60}-0", at=1),
        document(eventId=f"1-0-{INDEX_SPAN}", at=1),
        document(eventId="1_0-0-0", at=10),
        document(eventId="+10-0-0", at=10),
        document(eventId="10-0- 0", at=10),
        document(eventId="010-0-0", at=10),
        document(eventId="\u0661-0-0", at=1),
    ],
)
def test_anything_else_is_no_event(value: bytes | None) -> None:
    with pytest.raises(BadEvent, match=r".+"):
        decode_event(value)


@given(st.binary())
def test_any_bytes_are_an_event_or_refused(value: bytes) -> None:
    with pytest.raises(BadEvent):
        decode_event(value)


@pytest.mark.parametrize("headers", [None, [], [("v", b"1")], [("other", b"2")], [("v", b"1"), ("x", None)]])
def test_our_format_is_taken(headers: Any) -> None:
    assert memory_of_headers(headers) is None


@pytest.mark.parametrize("value", [b"2", b"", b"1.0", None])
def test_other_format_is_refused(value: bytes | None) -> None:
    with pytest.raises(BadEvent, match="expected b'1', got"):
        memory_of_headers([("v", value)])


@pytest.mark.parametrize("memory", ["f" * 17, "f" * 16 + "ann:1", "f" * 16 + "玩" * 769])
def test_memory_is_read_from_its_header(memory: str) -> None:
    assert memory_of_headers([("v", b"1"), ("idempotency", memory.encode())]) == memory


@pytest.mark.parametrize("value", [None, b"", b"f" * 16, b"f" * (MAX_MEMORY + 1), b"f" * 17 + b"\xff", b"f" * 10**7])
def test_memory_that_is_none_makes_a_bad_event(value: bytes | None) -> None:
    with pytest.raises(BadEvent, match="header idempotency: expected 17 to 785 characters") as caught:
        memory_of_headers([("v", b"1"), ("idempotency", value)])
    assert len(str(caught.value)) <= 300


@given(st.lists(st.tuples(players, scores, scores), max_size=20))
def test_entry_gives_its_events_in_order(changes: list[tuple[str, int, int]]) -> None:
    payload = packed("main", *(field for change in changes for field in change))
    events = events_of_entry("1795428816570-2", payload)
    assert events == [
        ScoreEvent(f"1795428816570-2-{index}", "main", *change, 1795428816570) for index, change in enumerate(changes)
    ]
    assert [decode_event(encode_event(event)) for event in events] == events


@pytest.mark.parametrize(
    ("entry_id", "payload"),
    [
        ("1-0", b""),
        ("1-0", b"\xc1"),
        ("1-0", packed()),
        ("1-0", packed(5)),
        ("1-0", packed("main", "ada", 1)),
        ("1-0", packed("main", "ada", 1, 1, "bob")),
        ("1-0", packed("main", b"ada", 1, 1)),
        ("x-0", packed("main", "ada", 1, 1)),
        ("1-0", msgspec.msgpack.encode({"main": 1})),
        ("1-0", b"\x91" * 100_000 + b"\xc0"),
        ("1-0", packed("main", "ada", 1.0, 1)),
        ("1-0", packed("main", "ada", True, 1)),
        ("1-0", packed("main", "ada", 1, MAX_SCORE + 1)),
        ("1-0", packed("main", "ada", -MAX_SCORE - 1, 1)),
        ("1-0", packed("main", "", 1, 1)),
        ("1-0", packed("main", "x" * 129, 1, 1)),
        ("1-0", packed("main", "a\0b", 1, 1)),
        ("1-0", packed("main", "ada", 1, 1).replace(b"ada", b"\xed\xa0\x80")),
        ("1-0", packed("Main", "ada", 1, 1)),
        ("1-0", packed("b" * 9000, "ada", 1, 1)),
        ("1-0", packed("main", *["ada", 1, 1] * (MAX_BATCH + 1))),
        (f"{2**64 - 1}-0", packed("main", "ada", 1, 1)),
        (f"1-{2**64 - 1}", packed("main", "ada", 1, 1)),
    ],
)
def test_entry_of_another_making_is_refused(entry_id: str, payload: bytes) -> None:
    with pytest.raises(BadEvent, match=r".+"):
        events_of_entry(entry_id, payload)


@given(st.binary())
def test_any_bytes_are_an_entry_or_refused(payload: bytes) -> None:
    with pytest.raises(BadEvent):
        events_of_entry("1-0", payload)


def test_memories_of_an_entry_go_by_the_update() -> None:
    assert memories_of_entry(None, 1) == {}
    assert memories_of_entry(packed(0, "f" * 20, 2, "g" * 20), 3) == {0: "f" * 20, 2: "g" * 20}


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        packed(0),
        packed("f" * 20, 0),
        packed(0, 1),
        packed(1, "f" * 20),
        packed(-1, "f" * 20),
        packed(2**63, "f" * 20),
        packed(0.0, "f" * 20),
        packed(False, "f" * 20),
        packed(0, b"f" * 20),
        packed(0, "f" * 16),
        packed(0, "f" * (MAX_MEMORY + 1)),
        packed(0, "f" * 20).replace(b"ff", b"\xff\xff"),
        b"\x91" * 100_000 + b"\xc0",
    ],
)
def test_memories_of_another_making_are_refused(payload: bytes) -> None:
    with pytest.raises(BadEvent, match=r".+"):
        memories_of_entry(payload, 1)
