"""What a key of Redis should be, and which keys are something else.

The error of a script does not name the key that it failed at. Knows no key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

import hiredis

from server.redis_connection import RedisConnection


class Kind(NamedTuple):
    """A type of Redis: its name, and a cheap command, without and with its key, that any other type refuses."""

    name: str
    command: str
    arguments: tuple[str, ...] = ()


STRING: Final = Kind("a string", "GET")
HASH: Final = Kind("a hash", "HGET", ("",))
SORTED_SET: Final = Kind("a sorted set", "ZCARD")
STREAM: Final = Kind("a stream", "XLEN")


class WrongType(NamedTuple):
    """A key that is something else."""

    key: str
    expected: Kind

    def __str__(self) -> str:
        return f"the key {self.key} is of another type: expected {self.expected.name}"


def is_wrong_type(error: hiredis.ReplyError) -> bool:
    """Whether a command was refused because its key is something else."""
    return str(error).startswith("WRONGTYPE")


async def wrong_types(connection: RedisConnection, expected: Mapping[str, Kind]) -> list[WrongType]:
    """Those keys that are there and not what is expected.

    Raises hiredis.ReplyError, ConnectionError and TimeoutError.
    """
    found = []
    for key, kind in expected.items():
        try:
            await connection.execute(kind.command, key, *kind.arguments)
        except hiredis.ReplyError as error:
            if not is_wrong_type(error):
                raise
            found.append(WrongType(key, kind))
    return found
