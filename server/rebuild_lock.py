"""The lock under which Redis is verified and rebuilt, and the only way to write while holding it.

Its token fences: what is written goes through a script that looks whether the lock still holds that token. So one who
was paused past the expiry writes nothing when it wakes, and one who died blocks the next no longer than that.
Each attempt of a server has a token of its own, which takes over the lock of the attempt before it.
Knows nothing of scores.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import hiredis

from server.errors import NotReady
from server.redis_connection import RedisConnection

LOCK_MS: Final = 3_000
"""How long a lock outlives the last sign of its holder; longer than REPLY_TIMEOUT_S of one round trip."""

END_TIMEOUT_S: Final = 1.0
"""How long cancelled work may take to end; what it still writes then, the token stops."""

RELEASE_TIMEOUT_S: Final = 0.5
"""Giving the lock back spares others the wait for its expiry, and is worth no more."""

Command = Sequence[str | bytes]

_TAKE: Final = Path(__file__).with_name("take_lock.lua").read_text()
_FENCED: Final = Path(__file__).with_name("fenced.lua").read_text()
_RELEASE: Final = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"


class RebuildLocks:
    """The lock of one deployment as one server takes it, attempt after attempt."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._server = secrets.token_hex(8)
        self._attempts = itertools.count(1)

    async def take(self, connection: RedisConnection) -> RebuildLock | None:
        """The lock, or None while it is another server's."""
        attempt = next(self._attempts)
        token = await connection.execute("EVAL", _TAKE, 1, self._key, self._server, attempt, LOCK_MS)
        return RebuildLock(connection, self._key, token) if token else None


class RebuildLock:
    """A lock that was taken. Every method raises NotReady when it was lost, ConnectionError and TimeoutError."""

    def __init__(self, connection: RedisConnection, key: str, token: bytes) -> None:
        self._connection = connection
        self._key = key
        self._token = token

    async def hold_during(self, work: Coroutine[Any, Any, None]) -> None:
        """Await `work`, keep the lock also while it reads elsewhere for longer than its life, and give it back.

        When the lock is lost, or Redis does not answer, the work is cancelled.
        """
        working, beating = asyncio.create_task(work), asyncio.create_task(self._beat())
        try:
            await asyncio.wait((working, beating), return_when=asyncio.FIRST_COMPLETED)
            await (working if working.done() else beating)
        finally:
            for task in (working, beating):
                task.add_done_callback(_retrieve_exception)
                task.cancel()
            # A database or Kafka that does not answer may keep cancelled work for longer than Redis should wait.
            await asyncio.wait((working, beating), timeout=END_TIMEOUT_S)
            with suppress(ConnectionError, TimeoutError, hiredis.HiredisError):
                async with asyncio.timeout(RELEASE_TIMEOUT_S):
                    await self._connection.execute("EVAL", _RELEASE, 1, self._key, self._token)

    async def look(self) -> None:
        """Make sure that the lock is still ours, at this moment."""
        await self.write(())

    async def write(self, commands: Sequence[Command]) -> None:
        """Run commands, none of them unless the lock is still ours."""
        flat: list[bytes | str | int] = []
        for command in commands:
            flat.append(len(command))
            flat += command
        if not await self._connection.execute("EVAL", _FENCED, 1, self._key, self._token, LOCK_MS, *flat):
            raise NotReady("the lock on rebuilding Redis was lost: another server goes on")

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(LOCK_MS / 3000)
            await self.look()


def _retrieve_exception(task: asyncio.Task[None]) -> None:
    """Of two tasks that fail, the first is raised: nobody need hear of the second."""
    if not task.cancelled():
        task.exception()
