"""Query strings of strangers: read at a cost that has a bound, whatever they hold.

Pure: knows no route.
"""

from __future__ import annotations

import urllib.parse
from typing import Final

from server.errors import Problem

MAX_FIELDS: Final = 16
"""More than any route knows, with room for what caches and analysts add."""

MAX_NAME: Final = 64
"""Longest name of a field, encoded; no route knows a longer one."""


def query_fields(query: str, longest: int) -> dict[str, str]:
    """The fields of `?a=b&c=d`, decoded; of several with one name, the last counts.

    `query` has a character for each byte that was sent, percent-encoded or not; they are UTF-8. A byte that is not
    becomes a lone surrogate (`surrogateescape`), which no name of a player or board has. A value is cut off after
    `longest` characters, as sent: decoding costs time, so a route says what it can use.
    Raises Problem 400 when there are more than MAX_FIELDS.
    """
    parts = query.split("&", MAX_FIELDS)
    if len(parts) > MAX_FIELDS:
        raise Problem(400, f"query: expected at most {MAX_FIELDS} fields, got more")
    fields = {}
    for part in parts:
        name, _, value = part.partition("=")
        if part and len(name) <= MAX_NAME:
            fields[_decoded(name)] = _decoded(value[:longest])
    return fields


def _decoded(text: str) -> str:
    sent = text.encode("latin-1").replace(b"+", b" ")
    return urllib.parse.unquote_to_bytes(sent).decode("utf-8", "surrogateescape")
