"""What watchers are told, in JSON: the messages of /live-updates (docs/live.md).

Pure: knows neither who is told nor when.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

_encode = msgspec.json.Encoder().encode


class _Score(msgspec.Struct, rename="camel", gc=False):
    player_id: str
    score: int


class _LeaderboardUpdate(msgspec.Struct, rename="camel", tag_field="type", tag="leaderboardUpdate", omit_defaults=True):
    board: str
    seq: int
    top_scores: list[_Score]
    delay_ms: int | None = None
    resync: bool = False


class _ScoreUpdate(msgspec.Struct, rename="camel", tag_field="type", tag="scoreUpdate", gc=False):
    board: str
    player_id: str
    new_score: int


def list_message(
    board: str, seq: int, entries: Iterable[tuple[str, int]], delay_ms: int | None = None, *, resync: bool = False
) -> bytes:
    """The whole list, and how long ago the oldest change in it was applied; `resync`: messages were left out before."""
    rows = [_Score(player, score) for player, score in entries]
    return _encode(_LeaderboardUpdate(board, seq, rows, delay_ms, resync))


def score_message(board: str, player: str, score: int) -> bytes:
    """A player's score is now this."""
    return _encode(_ScoreUpdate(board, player, score))


def skipped_message(count: int) -> bytes:
    """In a flood: this many players' scores changed and were not sent."""
    return _encode({"type": "scoreUpdatesSkipped", "count": count})


def status_message(trouble: str) -> bytes:
    """Whether changes reach watchers as they happen, and if not, why."""
    return _encode(
        {"type": "status", "live": False, "detail": trouble} if trouble else {"type": "status", "live": True}
    )


def pong_message() -> bytes:
    """The answer to a heartbeat."""
    return _encode({"type": "pong"})


def error_message(detail: str) -> bytes:
    """A message of the client cannot be understood."""
    return _encode({"type": "error", "detail": detail})
