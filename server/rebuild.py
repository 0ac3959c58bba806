"""Verify and rebuild: may this Redis be written, and if it is empty, fill it from TimescaleDB first.

Runs once per new connection, before any update goes over it, and again when Redis turns out to be cold. A marker
(epoch, and the run_id of the Redis process that was verified) says that the boards in this Redis are whole.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
import psycopg

from server.database import Database
from server.errors import NotReady
from server.events import INDEX_SPAN
from server.keys import Keys
from server.redis_connection import RedisConnection

LOCK_MS: Final = 10_000
LOCK_POLL_S: Final = 0.1

_FILL = Path(__file__).with_name("fill_scores.lua").read_text()
_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"
_pack = msgspec.msgpack.Encoder().encode
_log = logging.getLogger(__name__)


async def verify(keys: Keys, database: Database, connection: RedisConnection, on_rebuild: Callable[[], None]) -> str:
    """The epoch that batches over this connection carry, once Redis can be trusted.

    Raises NotReady when it cannot be for now, ConnectionError when it is gone. `on_rebuild` is called before a
    rebuild begins, which may take a while.
    """
    run_id = await _check_process(connection)
    while True:
        epoch, verified_run_id = await connection.execute("HMGET", keys.ready, "epoch", "run_id")
        if epoch is not None and verified_run_id == run_id:
            return str(epoch, "ascii")
        token = secrets.token_hex(8)
        if await connection.execute("SET", keys.rebuild_lock, token, "NX", "PX", LOCK_MS):
            break
        await asyncio.sleep(LOCK_POLL_S)  # another server is at it
    try:
        if epoch is None:
            on_rebuild()
            await _fill(connection, keys, database, token)
        next_epoch = str(max(int(epoch or 0) + 1, time.time_ns() // 1_000_000))
        await connection.execute("HSET", keys.ready, "epoch", next_epoch, "run_id", run_id)
        return next_epoch
    finally:
        await connection.execute("EVAL", _RELEASE, 1, keys.rebuild_lock, token)


async def _check_process(connection: RedisConnection) -> bytes:
    """The run_id of the Redis process behind this connection.

    Raises NotReady if that process might evict what it should keep.
    """
    info: bytes = await connection.execute("INFO")
    fields = dict(line.split(b":", 1) for line in info.splitlines() if b":" in line)
    policy = fields[b"maxmemory_policy"].decode()
    if policy != "noeviction":
        raise NotReady(f"Redis setting maxmemory-policy: expected noeviction, got {policy}")
    if fields.get(b"loading") == b"1":
        raise NotReady("Redis is still loading its data")
    return fields[b"run_id"]


async def _fill(connection: RedisConnection, keys: Keys, database: Database, token: str) -> None:
    """Write every score of the database that Redis does not know better."""
    started_s, players, last = time.monotonic(), 0, (0, 0)
    try:
        async for rows in database.scores():
            chunk: list[str | int] = []
            for board, player, score, ver_ms, ver_seq in rows:
                board_keys = keys.board(board)
                chunk += (board_keys.leaderboard, player, board_keys.score(player), score)
                last = max(last, (ver_ms, ver_seq))
            await _fenced(connection, keys, token, chunk)
            players += len(rows)
    except psycopg.Error as error:
        raise NotReady(f"Redis has no scoreboard, and the database to fill it from fails: {error}") from error
    await _continue_after(connection, keys, last)
    _log.info("filled Redis from the database: %d players in %.1f s", players, time.monotonic() - started_s)


async def _fenced(connection: RedisConnection, keys: Keys, token: str, chunk: list[str | int]) -> None:
    if not await connection.execute("EVAL", _FILL, 1, keys.rebuild_lock, token, LOCK_MS, _pack(chunk)):
        raise NotReady("another server took the rebuild over")


async def _continue_after(connection: RedisConnection, keys: Keys, last: tuple[int, int]) -> None:
    """Let the outbox's ids go on above every version the database has seen."""
    ver_ms, ver_seq = last
    floor = f"{ver_ms}-{ver_seq // INDEX_SPAN + 1}"
    if not await connection.execute("EXISTS", keys.outbox):
        # The way to an empty stream: an entry, however short its life, could be read by the relay.
        await connection.execute("XGROUP", "CREATE", keys.outbox, "none", "$", "MKSTREAM")
        await connection.execute("XGROUP", "DESTROY", keys.outbox, "none")
    state = await connection.execute("XINFO", "STREAM", keys.outbox)
    current: bytes = state[state.index(b"last-generated-id") + 1]
    if tuple(map(int, current.split(b"-"))) < tuple(map(int, floor.split("-"))):
        await connection.execute("XSETID", keys.outbox, floor)
