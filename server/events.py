"""ScoreEvent and its encodings: the contract between server/ and sync/.

A batch of accepted updates is one outbox entry; each update in it is one event. The entry's stream id
`ms-seq` and the update's index give the event its id and the version of that player's score.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Annotated, Final

import msgspec

from server.errors import ScoreboardError

FORMAT_VERSION: Final = b"1"
"""Major version, in the Kafka header `v`. A consumer takes unknown fields, not an unknown major."""

MAX_BATCH: Final = 512
"""Updates in one outbox entry at most."""

INDEX_SPAN: Final = 65536
"""Versions are (ms, seq * INDEX_SPAN + index); MAX_BATCH stays far below."""

PERSISTER_GROUP: Final = "scoreboard-persister"
"""The persister's consumer group, in Kafka and in the table consumer_offsets."""

OUTBOX_FIELD: Final = b"batch"
"""The one field of an outbox entry: MessagePack `[board, player, delta, score, player, …]`."""

MEMORY_FIELD: Final = b"memory"
"""Of an entry with idempotent updates: MessagePack `[index, memory, index, …]`."""

MEMORY_HEADER: Final = "idempotency"
"""Of a record whose request had an Idempotency-Key: its memory, so that a replay restores what is known of retries.

A memory is the payload's fingerprint (FINGERPRINT_LENGTH characters), then server.keys.idempotency_name.
"""

FINGERPRINT_LENGTH: Final = 16

MAX_MEMORY: Final = FINGERPRINT_LENGTH + 2 * 3 * 128 + 1
"""Longest memory, in characters: subject and key have 128 at most, and each may become three between colons."""

MAX_SCORE: Final = 2**53 - 1
"""Largest |delta| and |score|: a sorted set keeps doubles, and so does JavaScript."""

MAX_PLAYER: Final = 128
"""Longest player id, in characters."""

MAX_BOARD: Final = 64
"""Longest name of a board, in characters."""

CONTROL_CHARACTERS: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")
"""None of them stands in a player id: they would pass for line ends in logs and terminals."""

MAX_AT_MS: Final = 253_402_300_799_999
"""The last millisecond of the year 9999: a client reads no later time from the database."""

MAX_EVENT_ID: Final = 48
SEQ_DIGITS: Final = 12
INDEX_DIGITS: Final = 4
"""Of an event id, so that versions fit into 64 bits, and an index stays below INDEX_SPAN."""

LONGEST_REASON: Final = 300
"""Characters of a BadEvent: it may repeat what it refuses, and that may be a megabyte."""

# Every reader of an event checks it against these. What one of them refuses, all of them refuse: else the database and
# a rebuild would not come to the same scores. Redis, Kafka and PostgreSQL take whatever they admit.
Score = Annotated[int, msgspec.Meta(ge=-MAX_SCORE, le=MAX_SCORE)]
PlayerId = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_PLAYER)]
Board = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_BOARD)]
Moment = Annotated[int, msgspec.Meta(ge=0, le=MAX_AT_MS)]
Memory = Annotated[str, msgspec.Meta(min_length=FINGERPRINT_LENGTH + 1, max_length=MAX_MEMORY)]

BOARD_NAME: Final = re.compile(rf"[a-z0-9_-]{{1,{MAX_BOARD}}}")
"""What a board may be called, in settings and in events."""


class BadEvent(ScoreboardError):
    """A record that is not an event of a known version: to be dead-lettered."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason[:LONGEST_REASON])


class ScoreEvent(msgspec.Struct, frozen=True, rename="camel", gc=False):
    """An accepted change, as it stands in Kafka (JSON, camelCase).

    `at` is the id's milliseconds, never a clock read later, so a replay yields the same row.
    """

    event_id: Annotated[str, msgspec.Meta(max_length=MAX_EVENT_ID)]
    board: Board
    player_id: PlayerId
    score_delta: Score
    new_score: Score
    at: Moment

    @property
    def version(self) -> tuple[int, int]:
        """(ms, seq * INDEX_SPAN + index): for one player of one board, later wins."""
        ms, seq, index = self.event_id.split("-")
        return int(ms), int(seq) * INDEX_SPAN + int(index)


encode_event: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(ScoreEvent).decode
_decode_entry: Final = msgspec.msgpack.Decoder(list[PlayerId | Score]).decode
_decode_memories: Final = msgspec.msgpack.Decoder(list[Memory | int]).decode
# Nesting that is too deep for the decoder is a RecursionError, a number of 5,000 digits a ValueError.
_NOT_DECODED: Final = (msgspec.DecodeError, ValueError, RecursionError)


def decode_event(value: bytes | None) -> ScoreEvent:
    """The event in a record's value.

    Raises BadEvent, saying what is wrong with it.
    """
    if value is None:
        raise BadEvent("no value")
    try:
        event = _decode(value)
        ms, seq, index = event.event_id.split("-")
    except _NOT_DECODED as error:
        raise BadEvent(str(error)) from error
    if ms != str(event.at):
        raise BadEvent(f"`at` is the id's milliseconds: expected {ms}, got {event.at}")
    digits = seq + index
    if not (digits.isdigit() and digits.isascii() and 0 < len(seq) <= SEQ_DIGITS and 0 < len(index) <= INDEX_DIGITS):
        raise BadEvent(f"eventId: expected ms-seq-index, each in range, got {event.event_id}")
    if not _is_board(event.board):
        raise BadEvent(f"board: expected a name of {BOARD_NAME.pattern}, got {event.board!r}")
    if not event.player_id.isprintable():
        _check_players(event.player_id)
    return event


def memory_of_headers(headers: Iterable[tuple[str, object]] | None) -> str | None:
    """The memory that a record carries, None where its request had no Idempotency-Key.

    A record without the header `v` is of version 1. Raises BadEvent for any other version than ours, and for a memory
    that is none.
    """
    memory = None
    for name, value in headers or ():
        if name == "v":
            if value != FORMAT_VERSION:
                raise BadEvent(f"format version: expected {FORMAT_VERSION!r}, got {value!r}")
        elif name == MEMORY_HEADER:
            memory = _memory(value)
    return memory


def events_of_entry(entry_id: str, payload: bytes) -> list[ScoreEvent]:
    """The events in one outbox entry, in the order they were applied.

    Raises BadEvent when it is not what `apply_updates.lua` writes.
    """
    try:
        board, *fields = _decode_entry(payload)
        ms, seq = entry_id.split("-")
        at, changes = int(ms), iter(fields)
        events = [
            ScoreEvent(f"{entry_id}-{index}", board, player, delta, score, at)  # type: ignore[arg-type]
            for index, (player, delta, score) in enumerate(zip(changes, changes, changes, strict=True))
        ]
    except _NOT_DECODED as error:
        raise BadEvent(str(error)) from error
    if len(events) > MAX_BATCH:
        raise BadEvent(f"expected {MAX_BATCH} updates at most, got {len(events)}")
    if {type(board), *map(type, fields[::3])} != {str} or not {*map(type, fields[1::3]), *map(type, fields[2::3])} <= {
        int
    }:
        raise BadEvent("expected text for the board and the players, integers for the rest")
    if not _is_board(board):
        raise BadEvent(f"board: expected a name of {BOARD_NAME.pattern}, got {board!r}")
    if not (players := "".join(fields[::3])).isprintable():  # type: ignore[arg-type]
        _check_players(players)
    if at > MAX_AT_MS or len(seq) > SEQ_DIGITS:
        raise BadEvent(f"the entry's id: expected one of our time, got {entry_id}")
    return events


def memories_of_entry(payload: bytes | None, events: int) -> dict[int, str]:
    """By index, the memory of each update that came with an Idempotency-Key, of so many `events` in the entry.

    Raises BadEvent when it is not what `apply_updates.lua` writes.
    """
    if payload is None:
        return {}
    try:
        fields = iter(_decode_memories(payload))
        memories = dict(zip(fields, fields, strict=True))
    except _NOT_DECODED as error:
        raise BadEvent(str(error)) from error
    if not {*map(type, memories)} <= {int} or not {*map(type, memories.values())} <= {str}:
        raise BadEvent("expected an index and a memory in turn")
    if not all(0 <= index < events for index in memories):  # type: ignore[operator]
        raise BadEvent(f"expected memories of {events} updates, got the places {list(memories)}")
    return memories  # type: ignore[return-value]


@lru_cache(maxsize=1024)
def _is_board(name: object) -> bool:
    return isinstance(name, str) and BOARD_NAME.fullmatch(name) is not None


def _check_players(text: str) -> None:
    """Pass one player id, or many that are joined."""
    if found := CONTROL_CHARACTERS.search(text):
        raise BadEvent(f"playerId: expected no control characters, got {found[0]!r}")


def _memory(value: object) -> str:
    if isinstance(value, bytes) and len(value) <= 4 * MAX_MEMORY:
        try:
            memory = value.decode()
        except UnicodeDecodeError:
            memory = ""
        if FINGERPRINT_LENGTH < len(memory) <= MAX_MEMORY:
            return memory
    raise BadEvent(
        f"header {MEMORY_HEADER}: expected {FINGERPRINT_LENGTH + 1} to {MAX_MEMORY} characters of UTF-8, got {value!r}"
    )
