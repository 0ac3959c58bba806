"""What a client asks to watch: the query it connects with, and the messages that change it later.

Pure: knows no socket.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from server.errors import Problem
from server.events import MAX_PLAYER
from server.hub import Watcher
from server.keys import default_board
from server.queries import query_fields

LIMITS: Final = (10, 25, 50, 100)
MAX_NAMED: Final = 100

MAX_MESSAGE_BYTES: Final = 160 * 1024
"""All that a client may say fits, however its JSON is spelled: MAX_NAMED names of MAX_PLAYER characters, each of which
takes up to 12 bytes (\\ud83e\\udd8a), and 100 bytes of quotes, commas and indentation beside each name."""

HEARTBEATS: Final = {b"ping": b"pong", b'"ping"': b'"pong"'}
"""What libraries send to keep a connection alive, as text or as JSON, and what they expect back. Beside it: Ping."""

_SURROGATE: Final = re.compile("[\ud800-\udfff]")


class Subscribe(msgspec.Struct, tag_field="type", tag="subscribe"):
    """Follow these players by name too."""

    players: list[str]


class Unsubscribe(msgspec.Struct, tag_field="type", tag="unsubscribe"):
    """Follow these players by name no longer."""

    players: list[str]


class Ping(msgspec.Struct, tag_field="type", tag="ping"):
    """A heartbeat, with whatever else in it."""


decode_message: Final = msgspec.json.Decoder(Subscribe | Unsubscribe | Ping).decode
"""A client's message. Raises msgspec.DecodeError, ValueError or RecursionError."""


def parse_query(query: str, boards: tuple[str, ...]) -> Watcher:
    """The watcher that `?board=&limit=&scores=&players=` describes.

    Raises Problem 400 or 404.
    """
    fields = query_fields(query, len(query))
    board = fields.get("board", default_board(boards))
    if board not in boards:
        raise Problem(404, f"board: expected one of {', '.join(boards)}, got {board[:80]!r}")
    raw_limit = fields.get("limit", "10")
    if not re.fullmatch(r"[0-9]{1,3}", raw_limit) or int(raw_limit) not in LIMITS:
        raise Problem(400, f"limit: expected one of {', '.join(map(str, LIMITS))}, got {raw_limit[:80]!r}")
    mode = fields.get("scores", "all")
    if mode not in ("all", "none"):
        raise Problem(400, f"scores: expected all or none, got {mode[:80]!r}")
    players = {player for player in fields.get("players", "").split(",") if player}
    try:
        check_players(players)
    except ValueError as error:
        raise Problem(400, str(error)) from error
    return Watcher(board, int(raw_limit), mode == "all", players)


def check_players(players: set[str]) -> None:
    """Raises ValueError when there are too many, or one is no player id."""
    if len(players) > MAX_NAMED:
        raise ValueError(f"players: expected at most {MAX_NAMED}, got {len(players)}")
    if not all(1 <= len(player) <= MAX_PLAYER for player in players):
        raise ValueError(f"players: expected ids of 1 to {MAX_PLAYER} characters")
    if any(map(_SURROGATE.search, players)):
        raise ValueError("players: expected ids in UTF-8")
