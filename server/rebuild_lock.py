"""The lock under which Redis is verified and rebuilt, and the only way to write while holding it.

Its token fences: what is written goes through a script that looks whether the lock still holds that token. So one who
was paused past the expiry writes nothing when it wakes, and one who died blocks the next no longer than that.
Knows nothing of scores.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import hiredis

from server.errors import NotReady
from server.redis_connection import RedisConnection

LOCK_MS: Final = 3_000
"""How long a lock outlives the last sign of its holder."""

STEP_TIMEOUT_S: Final = 2.5
"""For one round trip: shorter than the lock's life, since a Redis that is stopped keeps its connections open."""

Command = Sequence[str | bytes]

_FENCED: Final = Path(__file__).with_name("fenced.lua").read_text()
_RELEASE: Final = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"


class RebuildLock:
    """A lock that was taken; `take` makes one, `kept` looks after it."""

    def __init__(self, connection: RedisConnection, key: str, token: str) -> None:
        self._connection = connection
        self._key = key
        self._token = token

    @classmethod
    async def take(cls, connection: RedisConnection, key: str) -> RebuildLock | None:
        """The lock, or None while it is another's."""
        token = secrets.token_hex(8)
        taken = await connection.execute("SET", key, token, "NX", "PX", LOCK_MS)
        return cls(connection, key, token) if taken else None

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Hold it, also while reading elsewhere takes longer than its life, and give it back."""
        beating = asyncio.create_task(self._beat())
        try:
            yield
        finally:
            beating.cancel()
            with suppress(ConnectionError, TimeoutError, hiredis.HiredisError):
                # What is lost with the connection expires by itself.
                await self._execute("EVAL", _RELEASE, 1, self._key, self._token)

    async def write(self, commands: Sequence[Command]) -> None:
        """Run commands, none of them unless the lock is still ours.

        Raises NotReady when it is not.
        """
        flat: list[bytes | str | int] = []
        for command in commands:
            flat.append(len(command))
            flat += command
        if not await self._execute("EVAL", _FENCED, 1, self._key, self._token, LOCK_MS, *flat):
            raise NotReady("the lock on rebuilding Redis was lost: another server goes on")

    async def _beat(self) -> None:
        with suppress(ConnectionError, TimeoutError, hiredis.HiredisError, NotReady):
            # Whoever writes next notices what went wrong here.
            while True:
                await asyncio.sleep(LOCK_MS / 3000)
                await self.write(())

    async def _execute(self, *command: bytes | str | int) -> Any:
        async with asyncio.timeout(STEP_TIMEOUT_S):
            return await self._connection.execute(*command)
