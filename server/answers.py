"""Answers, as both kinds of request of server/uws.py put them: heads, ids, and what the log says of them."""

from __future__ import annotations

import itertools
import logging
import secrets
from typing import Final

from server.errors import Problem
from server.logs import Sparing

OK: Final = b"200 OK"
JSON: Final = b"application/json"
PROBLEM_JSON: Final = b"application/problem+json"
NO_STORE: Final = b"\r\nCache-Control: no-store"
"""A header line of what is true only now: without it, a cache may keep a 200 or a 404 for as long as it likes."""

tokens: Final = itertools.count(1)
ID_PREFIX: Final = secrets.token_hex(4).encode() + b"-"

_log = logging.getLogger(__name__)
_slow = Sparing()


def new_id() -> bytes:
    """What we call a request."""
    return b"%b%x" % (ID_PREFIX, next(tokens))


def head_of(problem: Problem) -> bytes:
    """Status and header lines, each after a CRLF."""
    fields = "".join(f"\r\n{name}: {value}" for name, value in problem.headers)
    return f"{problem.status} {problem.title}{fields}".encode()


def fault(request_id: bytes, error: BaseException) -> Problem:
    """A fault of ours: 500, and the log has the rest under the request's id."""
    name = request_id.decode()
    _log.error("request %s failed", name, exc_info=error, extra={"request_id": name})
    return Problem(500, f"an internal error, logged as request {name}")


def log_slow(request_id: bytes, status: bytes, seconds: float, parts: str) -> None:
    """Say that an answer took long, and where its time went; sparingly."""
    if not _slow.admits():
        return
    name = request_id.decode()
    parts = f" ({parts})" if parts else ""
    more = f"; and {others} others that are not logged" if (others := _slow.left_out()) else ""
    _log.warning(
        "request %s took %d ms%s until it was answered with %s%s",
        name, 1000 * seconds, parts, status.decode(), more, extra={"request_id": name},
    )  # fmt: skip
