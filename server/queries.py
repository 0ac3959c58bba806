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

    A value is cut off after `longest` characters, as sent: decoding costs time, so a route says what it can use.
    Raises Problem 400 when there are more than MAX_FIELDS.
    """
    parts = query.split("&", MAX_FIELDS)
    if len(parts) > MAX_FIELDS:
        raise Problem(400, f"query: expected at most {MAX_FIELDS} fields, got more")
    fields = {}
    for part in parts:
        name, _, value = part.partition("=")
        if part and len(name) <= MAX_NAME:
            fields[urllib.parse.unquote_plus(name)] = urllib.parse.unquote_plus(value[:longest])
    return fields
