"""Connecting to PostgreSQL: what every connection of every command has in common.

What DATABASE_URL says, and libpq's environment (PGOPTIONS, PGSSLMODE, PGPASSFILE and the rest), counts for every
command alike. We only fill in what nobody said. Nothing here needs a session of our own, so that a pooler may hand
each transaction to another one: no startup `options`, no SET, no statement that is prepared in the server.

No answer is waited for without end. A connection may go silent for ever: a proxy between may have forgotten it, and
its kernel confirms what we send. So neither TCP nor a cancelled statement gives an answer, and only a clock helps.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Generator
from typing import Any, Final, TypeVar

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import TupleRow

CONNECT_WITHIN_S: Final = 5
"""For one host; a name with several addresses, or several hosts, gets as much for each."""

ANSWER_WITHIN_S: Final = 10.0
"""For one statement, unless said otherwise."""

CANCEL_WITHIN_S: Final = 1.0

# A host that vanished is noticed after 20 s, whether we wait for it or send to it.
_DEFAULTS: Final[dict[str, Any]] = {
    "keepalives": 1,
    "keepalives_idle": 5,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}
_Answer = TypeVar("_Answer")
_Waiting = Generator[Any, Any, _Answer]
"""What psycopg waits with: yields when it would block, and is resumed ten times a second at least."""


class Unanswered(psycopg.OperationalError):
    """The database did not answer in time: whether it did what was asked is not known."""


def parameters(database_url: str, role: str, connect_within_s: int = CONNECT_WITHIN_S) -> dict[str, Any]:
    """The keyword arguments of every `connect`; `role` and `connect_within_s` count where nobody said another.

    Raises psycopg.ProgrammingError for a URL that libpq cannot read.
    """
    given = conninfo_to_dict(database_url)
    defaults: dict[str, Any] = {"fallback_application_name": role}
    # A service file has defaults of its own, and libpq lets ours, being explicit, win over them.
    if "service" not in given and "PGSERVICE" not in os.environ:
        defaults |= _DEFAULTS
        if "PGCONNECT_TIMEOUT" not in os.environ:
            defaults["connect_timeout"] = connect_within_s
    # Names of players are any text at all, whatever encoding the environment prefers.
    return {**defaults, **given, "client_encoding": "UTF8", "prepare_threshold": None}


class _Patience:
    """How long a connection waits for each answer."""

    answer_within_s = ANSWER_WITHIN_S
    given_up = False
    """Set by another thread that needs no answer any more: the one that waits here gives up at once."""

    is_at_work: Callable[[], bool] | None = None
    """Asked when the time is over, where a statement may take any time: True gives it as much again."""

    def _in_time(self, gen: _Waiting[_Answer]) -> _Waiting[_Answer]:
        within_s = self.answer_within_s
        deadline_s = time.monotonic() + within_s
        ready = None
        try:
            while True:
                ready = yield gen.send(ready)
                if self.given_up:
                    raise Unanswered("the database's answer is not needed any more")
                if time.monotonic() >= deadline_s:
                    if self.is_at_work is None or not self.is_at_work():
                        raise Unanswered(f"the database did not answer within {within_s:g} s")
                    deadline_s = time.monotonic() + within_s
        except StopIteration as done:
            answer: _Answer = done.value
            return answer


class Connection(_Patience, psycopg.Connection[TupleRow]):
    """A connection that raises Unanswered, and is closed, when a statement is not answered in time."""

    def wait(self, gen: _Waiting[_Answer], *args: Any, **options: Any) -> _Answer:
        """psycopg: whatever this connection waits for."""
        try:
            return super().wait(self._in_time(gen), *args, **options)
        except Unanswered:
            with contextlib.suppress(psycopg.Error):
                self.cancel_safe(timeout=CANCEL_WITHIN_S)  # a server that only is slow should not go on for nobody
            self.close()
            raise


class AsyncConnection(_Patience, psycopg.AsyncConnection[TupleRow]):
    """The same for asyncio. Limit its time rather than cancel it: psycopg may take 10 s to be cancelled."""

    async def wait(self, gen: _Waiting[_Answer], *args: Any, **options: Any) -> _Answer:
        """psycopg: whatever this connection waits for."""
        try:
            return await super().wait(self._in_time(gen), *args, **options)
        except Unanswered:
            with contextlib.suppress(psycopg.Error):
                await self.cancel_safe(timeout=CANCEL_WITHIN_S)
            await self.close()
            raise


def connect(database_url: str, role: str, within_s: float = ANSWER_WITHIN_S) -> Connection:
    """A connection each of whose statements has that much time.

    Raises psycopg.Error.
    """
    connection = Connection.connect(**parameters(database_url, role))
    connection.answer_within_s = within_s
    return connection
