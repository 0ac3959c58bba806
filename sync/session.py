"""A connection to the database that is never waited for without end.

Its work is done in a thread of its own. To connect, to resolve a name and to wait for an answer may each hang. The
thread that needs the answer polls Kafka meanwhile, and heeds a request to stop. Knows none of our tables.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Final, Generic, TypeVar

import psycopg
from psycopg import errors

from server import postgres
from server.postgres import ANSWER_WITHIN_S, Connection, Unanswered

RETRY_DELAYS_S: Final = (0.0, 0.02, 0.1, 0.3)
"""Before each further try at a statement that lost a race, or whose connection was lost."""

RETRY_WITHIN_S: Final = 1.0
"""A loss that took longer to be noticed is not tried again here: the caller waits in its own way."""

LONGEST_S: Final = 60.0
"""For a statement at most, where a database that is slow had less time before."""

_LOOK_EVERY_S: Final = 0.1
_BACKEND: Final = "SELECT pg_backend_pid()"
_T = TypeVar("_T")


def nothing(_waited_s: float) -> None:
    """What is to be done meanwhile, where nothing is."""


class Session:
    """One connection, made when it is needed and again when it was lost.

    `meanwhile` is called ten times a second with the seconds that an answer is waited for. It may raise: the answer
    is given up then.
    """

    def __init__(
        self,
        database_url: str,
        role: str,
        meanwhile: Callable[[float], None] = nothing,
        examine: Callable[[Connection], None] | None = None,
    ) -> None:
        """`examine` is given each new connection before anything else, and raises if it is no good.

        Behind a pooler it is given the connection before each work: another database may answer there unseen.
        """
        self._database_url = database_url
        self._role = role
        self._meanwhile = meanwhile
        self._examine = examine
        self._within_s = ANSWER_WITHIN_S
        self._connection: Connection | None = None
        self._pooled = False

    def run(self, work: Callable[[Connection], _T], within_s: float | None = None) -> _T:
        """What `work` returns, tried again where that may succeed at once.

        After a statement that was not answered in time the next one has twice as much, until one is answered;
        `within_s` is for one that needs a time of its own. Raises psycopg.Error, and what `meanwhile` raises.
        """
        began_s = time.monotonic()
        for delay_s in (*RETRY_DELAYS_S, None):
            try:
                return self._once(work, within_s)
            except (errors.SerializationFailure, errors.DeadlockDetected):
                if delay_s is None:
                    raise
                time.sleep(delay_s * random.random())  # noqa: S311 (jitter, not a secret)
            except psycopg.OperationalError:
                self.close()
                if delay_s is None or time.monotonic() - began_s > RETRY_WITHIN_S:
                    raise
                time.sleep(delay_s)
            except errors.ReadOnlySqlTransaction:
                self.close()  # another of several hosts may be the one that can be written to now
                raise
        raise AssertionError("the last try returns or raises")

    def close(self) -> None:
        """Give up the connection."""
        if self._connection:
            self._connection.close()
        self._connection = None

    def _once(self, work: Callable[[Connection], _T], within_s: float | None) -> _T:
        errand = _Errand(self._connection, self._ready, work, within_s or self._within_s)
        self._connection = None
        threading.Thread(target=errand.run, daemon=True).start()
        began_s = time.monotonic()
        try:
            while not wait([errand.done], _LOOK_EVERY_S).done:
                self._meanwhile(time.monotonic() - began_s)
        except BaseException:
            errand.give_up()
            raise
        self._connection = errand.connection
        try:
            result = errand.done.result()
        except Unanswered:
            self._within_s = min(2 * self._within_s, LONGEST_S)
            raise
        self._within_s = ANSWER_WITHIN_S
        return result

    def _ready(self, connection: Connection | None) -> Connection:
        if connection is None or connection.closed:
            return self._connect()
        if self._pooled and self._examine:
            self._examine(connection)
        return connection

    def _connect(self) -> Connection:
        connection = postgres.connect(self._database_url, self._role)
        try:
            connection.autocommit = True
            row = connection.execute(_BACKEND).fetchone()
            if self._examine:
                self._examine(connection)
        except BaseException:
            connection.close()
            raise
        # The id in a pooler's greeting is its own, only good to cancel with. Each statement may go to another backend.
        self._pooled = row != (connection.info.backend_pid,)
        if not self._pooled:
            connection.prepare_threshold = 1
        return connection


class _Errand(Generic[_T]):
    """What a thread of its own does with the connection; the thread that waits for it may give it up."""

    def __init__(
        self,
        connection: Connection | None,
        ready: Callable[[Connection | None], Connection],
        work: Callable[[Connection], _T],
        within_s: float,
    ) -> None:
        self.done: Future[_T] = Future()
        self.connection = connection
        self._ready = ready
        self._work = work
        self._within_s = within_s
        self._given_up = False

    def run(self) -> None:
        """Connect where that is needed, and do the work; `done` tells how that ended."""
        try:
            self.connection = self._ready(self.connection)
            if self._given_up:
                raise Unanswered("the database's answer is not needed any more")
            self.connection.answer_within_s = self._within_s
            result = self._work(self.connection)
        except BaseException as error:
            self.done.set_exception(error)
        else:
            self.done.set_result(result)
        if self._given_up and self.connection:
            self.connection.close()

    def give_up(self) -> None:
        """Let the connection end: at once where it waits for an answer, else as soon as there is one."""
        self._given_up = True
        if self.connection:
            self.connection.given_up = True
            if self.done.done():
                self.connection.close()
