"""One pipelined connection to Redis: commands go out, replies come to callbacks in the order sent.

The hot path needs two things of a client: no task per command, and commands that leave with everything else of
the same loop turn. This is just that; hiredis parses. Knows nothing of scores, and never reconnects by itself.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final, cast

import hiredis

from server.config import Settings
from server.slots import Address

CONNECT_TIMEOUT_S: Final = 1.0
"""For the handshake; a Redis that is stopped still accepts connections, but never answers."""

REPLY_TIMEOUT_S: Final = 2.5
"""For the reply to one command of `execute`: a Redis that is stopped, or whose host is gone, closes none."""

OnReply = Callable[[Any], None]
"""Takes what Redis said: bytes, int, list or None, a hiredis.ReplyError, or ConnectionError when it never came."""

pack: Final = cast(Callable[[tuple[bytes | str | int, ...]], bytes], hiredis.pack_command)
"""A command as it goes over the wire."""


class RedisConnection(asyncio.Protocol):
    """A connection that is authenticated and ready for commands; `open_connection` makes one."""

    def __init__(self, on_lost: Callable[[RedisConnection], None]) -> None:
        self._on_lost = on_lost
        self._reader = hiredis.Reader()
        self._waiting: deque[OnReply] = deque()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio: connected."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance

    def data_received(self, data: bytes) -> None:
        """asyncio: some bytes of replies."""
        reader, waiting = self._reader, self._waiting
        reader.feed(data)
        # False stands for "not complete yet": RESP2 has no booleans.
        while (reply := reader.gets()) is not False:
            waiting.popleft()(reply)

    def connection_lost(self, error: Exception | None) -> None:
        """asyncio: whoever still waits learns that no reply will come."""
        self._transport = None
        waiting, self._waiting = self._waiting, deque()
        lost = ConnectionError(f"connection to Redis lost: {error or 'closed'}")
        for on_reply in waiting:
            on_reply(lost)
        self._on_lost(self)

    def send(self, command: bytes, on_reply: OnReply) -> None:
        """Send one packed command; `on_reply` is called exactly once."""
        if self._transport is None:
            on_reply(ConnectionError("connection to Redis lost"))
            return
        self._waiting.append(on_reply)
        self._transport.write(command)

    def send_all(self, commands: bytes, on_replies: Iterable[OnReply]) -> None:
        """Send packed commands in one piece; each of `on_replies`, one a command, is called exactly once, in order."""
        if self._transport is None:
            for on_reply in on_replies:
                on_reply(ConnectionError("connection to Redis lost"))
            return
        self._waiting.extend(on_replies)
        self._transport.write(commands)

    def close(self) -> None:
        """Drop the connection at once; whoever waits gets a ConnectionError, in a later loop turn."""
        if self._transport is not None:
            self._transport.abort()

    async def execute(self, *command: bytes | str | int) -> Any:
        """The reply to one command.

        Raises hiredis.ReplyError or ConnectionError, and TimeoutError when none comes for REPLY_TIMEOUT_S.
        """
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def on_reply(reply: Any) -> None:
            if future.done():
                return
            if isinstance(reply, Exception):
                future.set_exception(reply)
            else:
                future.set_result(reply)

        self.send(pack(command), on_reply)
        async with asyncio.timeout(REPLY_TIMEOUT_S):
            return await future


async def open_connection(
    settings: Settings, on_lost: Callable[[RedisConnection], None], address: Address | None = None
) -> RedisConnection:
    """Connect and authenticate, at `address` rather than where the settings say.

    Raises OSError, TimeoutError or hiredis.ReplyError.
    """
    loop = asyncio.get_running_loop()
    host, port = address or (settings.redis_host, settings.redis_port)
    async with asyncio.timeout(CONNECT_TIMEOUT_S):
        _, connection = await loop.create_connection(lambda: RedisConnection(on_lost), host, port, ssl=_tls(settings))
        try:
            if settings.redis_password:
                await connection.execute("AUTH", settings.redis_username or "default", settings.redis_password)
            await connection.execute("CLIENT", "SETNAME", "scoreboard-server")
        except BaseException:
            connection.close()
            raise
    return connection


def _tls(settings: Settings) -> ssl.SSLContext | None:
    """Made anew for each connection, so that certificates can be exchanged while we run."""
    if not settings.redis_tls:
        return None
    context = ssl.create_default_context(cafile=settings.redis_tls_ca_file or None)
    if settings.redis_tls_cert_file:
        context.load_cert_chain(settings.redis_tls_cert_file, settings.redis_tls_key_file)
    return context
