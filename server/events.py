"""ScoreEvent and its encodings: the contract between server/ and sync/.

A batch of accepted updates is one outbox entry; each update in it is one event. The entry's stream id
`ms-seq` and the update's index give the event its id and the version of that player's score.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Final

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

MAX_SCORE: Final = 2**53 - 1
"""Largest |delta| and |score|: a sorted set keeps doubles, and so does JavaScript."""

MAX_PLAYER: Final = 128
"""Longest player id, in characters."""


Score = Annotated[int, msgspec.Meta(ge=-MAX_SCORE, le=MAX_SCORE)]
PlayerId = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_PLAYER)]


class BadEvent(ScoreboardError):
    """A record that is not an event of a known version: to be dead-lettered."""


class ScoreEvent(msgspec.Struct, frozen=True, rename="camel", gc=False):
    """An accepted change, as it stands in Kafka (JSON, camelCase).

    `at` is the id's milliseconds, never a clock read later, so a replay yields the same row.
    """

    event_id: str
    board: str
    player_id: PlayerId
    score_delta: Score
    new_score: Score
    at: int

    @property
    def version(self) -> tuple[int, int]:
        """(ms, seq * INDEX_SPAN + index): for one player of one board, later wins."""
        ms, seq, index = self.event_id.split("-")
        return int(ms), int(seq) * INDEX_SPAN + int(index)


encode_event: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(ScoreEvent).decode
_decode_entry: Final = msgspec.msgpack.Decoder(list[Any]).decode


def decode_event(value: bytes | None) -> ScoreEvent:
    """The event in a record's value.

    Raises BadEvent, saying what is wrong with it.
    """
    if value is None:
        raise BadEvent("no value")
    try:
        event = _decode(value)
        ms, _ = event.version
    except (msgspec.DecodeError, ValueError) as error:
        raise BadEvent(str(error)) from error
    if ms != event.at:
        raise BadEvent(f"`at` is the id's milliseconds: expected {ms}, got {event.at}")
    return event


def check_format(headers: Iterable[tuple[str, object]] | None) -> None:
    """Pass a record whose header `v` is our format's; a record without one is of version 1.

    Raises BadEvent for any other version.
    """
    for name, value in headers or ():
        if name == "v" and value != FORMAT_VERSION:
            raise BadEvent(f"format version: expected {FORMAT_VERSION!r}, got {value!r}")


def events_of_entry(entry_id: str, payload: bytes) -> list[ScoreEvent]:
    """The events in one outbox entry, in the order they were applied.

    Raises BadEvent when it is not what `apply_updates.lua` writes.
    """
    try:
        board, *fields = _decode_entry(payload)
        at = int(entry_id.split("-")[0])
        changes = iter(fields)
        events = [
            ScoreEvent(f"{entry_id}-{index}", board, player, delta, score, at)
            for index, (player, delta, score) in enumerate(zip(changes, changes, changes, strict=True))
        ]
    except (msgspec.DecodeError, ValueError) as error:
        raise BadEvent(str(error)) from error
    if len(events) > MAX_BATCH:
        raise BadEvent(f"expected {MAX_BATCH} updates at most, got {len(events)}")
    # type, not isinstance: True is no number here.
    if {type(board), *map(type, fields[::3])} != {str} or not {*map(type, fields[1::3]), *map(type, fields[2::3])} <= {
        int
    }:
        raise BadEvent("expected text for the board and the players, integers for the rest")
    return events


def memories_of_entry(payload: bytes | None) -> dict[int, str]:
    """By index, the memory of each update that came with an Idempotency-Key.

    Raises BadEvent when it is not what `apply_updates.lua` writes.
    """
    if payload is None:
        return {}
    try:
        fields = iter(_decode_entry(payload))
        return {int(index): str(memory) for index, memory in zip(fields, fields, strict=True)}
    except (msgspec.DecodeError, ValueError, TypeError, OverflowError) as error:
        raise BadEvent(str(error)) from error
