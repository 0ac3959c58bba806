"""Reading TimescaleDB: a board's top when Redis is away, and the scores to fill Redis from.

Only ever reads; what writes is sync/store.py.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, cast

import psycopg
import psycopg_pool
from psycopg import errors

from server import postgres
from server.errors import NotReady
from server.events import PERSISTER_GROUP
from server.postgres import AsyncConnection, Unanswered

TOP_LIMIT: Final = 1000
"""Players in the longest list anyone may ask for."""

MAX_AGE_S: Final = 1.0
"""How long one reading of a board's top serves everybody: at most one query a second and board."""

QUERY_TIMEOUT_S: Final = 1.0
"""Longest a reading may take, unless said otherwise."""

CONNECT_WITHIN_S: Final = 2

STEP_TIMEOUT_S: Final = 30.0
"""For one step of reading everything."""

CHUNK_ROWS: Final = 2000

Entry = tuple[str, int]
"""(player, score)"""

ScoreRow = tuple[str, str, int, int, int]
"""(board, player, score, ver_ms, ver_seq)"""

# Equal scores by player id descending, as ZREVRANGE does: by bytes, hence the collation.
_TOP = """
    SELECT player_id, score FROM scores WHERE board = %s
    ORDER BY score DESC, player_id COLLATE "C" DESC LIMIT %s
"""
_SCORES = "SELECT board, player_id, score, ver_ms, ver_seq FROM scores"
_SCORES_OF = f"{_SCORES} WHERE board = ANY (%s)"
# From one board to the next by the primary key: they are few, and the table is long.
_BOARDS = """
    WITH RECURSIVE found AS (
        (SELECT board FROM scores ORDER BY board LIMIT 1)
        UNION ALL
        SELECT (SELECT board FROM scores WHERE board > found.board ORDER BY board LIMIT 1) FROM found
        WHERE found.board IS NOT NULL
    ) SELECT board FROM found WHERE board IS NOT NULL
"""
_OFFSETS = """
    SELECT partition, topic_id, next_offset,
           CASE WHEN epoch > 0 THEN jsonb_build_object('', epoch) ELSE '{}' END || tag_epochs
    FROM consumer_offsets WHERE consumer_group = %s AND topic = %s
"""


class Database:
    """A pool of connections that comes and goes with the database."""

    def __init__(self, url: str, query_timeout_s: float = QUERY_TIMEOUT_S) -> None:
        self._url = url
        self._query_timeout_s = query_timeout_s
        self._pool: psycopg_pool.AsyncConnectionPool[AsyncConnection] | None = None
        self._tops: dict[str, tuple[float, list[Entry]]] = {}
        self._readings: dict[str, asyncio.Task[list[Entry]]] = {}

    async def open(self) -> None:
        """Make the pool; it connects when first asked for something."""
        self._pool = psycopg_pool.AsyncConnectionPool(
            connection_class=AsyncConnection,
            min_size=0,
            max_size=2,
            open=False,
            timeout=self._query_timeout_s,
            reconnect_timeout=5,
            configure=self._configure,
            kwargs=postgres.parameters(self._url, "scoreboard-server", CONNECT_WITHIN_S) | {"autocommit": True},
        )
        await self._pool.open()

    async def _configure(self, connection: AsyncConnection) -> None:
        connection.answer_within_s = self._query_timeout_s

    async def close(self) -> None:
        """Close the pool."""
        if self._pool is not None:
            await self._pool.close()

    async def top(self, board: str, limit: int) -> list[Entry]:
        """The board's first `limit` players, highest first; at most MAX_AGE_S old.

        Raises psycopg.Error or TimeoutError.
        """
        read_s, entries = self._tops.get(board, (-MAX_AGE_S, []))
        if time.monotonic() - read_s >= MAX_AGE_S:
            # Readers share one query, and its failure: one after the other, each would wait for its own.
            reading = self._readings.get(board)
            if reading is None:
                reading = self._readings[board] = asyncio.create_task(self._read_top(board))
                reading.add_done_callback(lambda done: self._over(board, done))
            # From connecting on; the query is not cancelled with it, for that may take seconds.
            async with asyncio.timeout(self._query_timeout_s):
                entries = await asyncio.shield(reading)
        return entries[:limit]

    def _over(self, board: str, reading: asyncio.Task[list[Entry]]) -> None:
        del self._readings[board]
        if not reading.cancelled():
            reading.exception()  # whoever still waits gets it; without anybody it is no news

    async def _read_top(self, board: str) -> list[Entry]:
        assert self._pool is not None
        try:
            async with self._pool.connection() as connection:
                cursor = await connection.execute(_TOP, (board, TOP_LIMIT))
                entries = [(player, score) for player, score in await cursor.fetchall()]
        except Unanswered:
            await self._pool.drain()  # what silenced one connection silenced the other
            raise
        self._tops[board] = (time.monotonic(), entries)
        return entries

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[Snapshot]:
        """The whole database as of one moment.

        Raises NotReady, from within the block too, when it fails or does not answer in time.
        """
        try:
            known = postgres.parameters(self._url, "scoreboard-rebuild", CONNECT_WITHIN_S)
            connection = await AsyncConnection.connect(**known)
            async with connection:
                connection.answer_within_s = STEP_TIMEOUT_S
                await connection.set_isolation_level(psycopg.IsolationLevel.REPEATABLE_READ)
                yield Snapshot(connection)
        except Unanswered as error:
            raise NotReady("the database does not answer in time") from error
        except errors.UndefinedTable as error:
            raise NotReady("the database has no tables yet: `scoreboard migrate` and `sync` make them") from error
        except errors.UndefinedColumn as error:
            raise NotReady("the database has older tables: `scoreboard migrate` and `sync` bring them up") from error
        except psycopg.Error as error:
            raise NotReady(f"the database fails: {error}") from error


class Snapshot:
    """One transaction that sees one moment."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def offsets(self, topic: str) -> dict[int, tuple[str, int, dict[str, int]]]:
        """By partition, the topic's id, the offset that the persister goes on at, and the epochs of the last fences."""
        cursor = await self._connection.execute(_OFFSETS, (PERSISTER_GROUP, topic))
        return {
            partition: (topic_id, offset, epochs) for partition, topic_id, offset, epochs in await cursor.fetchall()
        }

    async def boards(self) -> list[str]:
        """Every board that has a score."""
        cursor = await self._connection.execute(_BOARDS)
        return [board for (board,) in await cursor.fetchall()]

    async def scores(self, boards: list[str] | None = None) -> AsyncGenerator[list[ScoreRow], None]:
        """Every score, or those of some boards, CHUNK_ROWS at a time."""
        async with self._connection.cursor(name="scores") as cursor:
            await (cursor.execute(_SCORES) if boards is None else cursor.execute(_SCORES_OF, (boards,)))
            while rows := cast(list[ScoreRow], await cursor.fetchmany(CHUNK_ROWS)):
                yield rows
