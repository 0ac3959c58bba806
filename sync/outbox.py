"""The outbox: a Redis stream, read from its beginning and trimmed behind what has been dealt with.

Two connections: on one an XREAD is pending while its owner waits or does other things, the other serves the
rest; both lead to one Redis process. Knows nothing of Kafka, nor of what an entry means beyond its one field.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Final, NamedTuple

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from server.config import Settings
from server.events import MEMORY_FIELD, OUTBOX_FIELD
from server.fences import MOST_DIGITS
from server.keys import Keys
from server.redis_clock import RedisClock
from server.slots import Address

ENTRIES_AT_FIRST: Final = 16
MOST_ENTRIES: Final = 1000
EVENTS_A_READ: Final = 1500
"""What a read should bring: enough to make the round trip cheap, little enough to go on its way soon."""

BYTES_AN_EVENT: Final = 15
_BLOCK_MS: Final = 1000
_BEGINNING: Final = "0-0"
_LAST_SEQ: Final = 2**64 - 1
_TRIM: Final = Path(__file__).with_name("trim_outbox.lua").read_text()


class Entry(NamedTuple):
    """A stream id, `ms-seq`, the bytes of its batch, and those of its memory; None where it has no such field."""

    entry_id: str
    payload: bytes | None
    memory: bytes | None = None


def connect(settings: Settings, address: Address | None = None) -> redis.Redis:
    """A client, of `address` if given, that waits at most two seconds for anything: its owner holds a lease."""
    host, port = address or (settings.redis_host, settings.redis_port)
    return redis.Redis(
        host=host,
        port=port,
        username=settings.redis_username or None,
        password=settings.redis_password or None,
        ssl=bool(settings.redis_tls),
        ssl_ca_certs=settings.redis_tls_ca_file or None,
        ssl_certfile=settings.redis_tls_cert_file or None,
        ssl_keyfile=settings.redis_tls_key_file or None,
        socket_timeout=2,
        socket_connect_timeout=2,
        retry=Retry(NoBackoff(), 0),  # else it would try ten times, and its owner not notice for 26 s
        protocol=2,
        driver_info=None,  # no CLIENT SETINFO: Redis 7.0 does not know it, so no ACL for it can grant it
    )


class Outbox:
    """One outbox, from its beginning. Every method raises redis.RedisError, after which it is of no more use."""

    def __init__(self, client: redis.Redis, keys: Keys) -> None:
        self._client = client
        self._keys = keys
        self._position = _BEGINNING
        self._count = ENTRIES_AT_FIRST
        self._reader = client.connection_pool.get_connection()
        self._asked = False
        self._trim = client.register_script(_TRIM)
        self.epoch = self._read_epoch()
        """Of the Redis that all entries come from; it may rise while they are read."""

    def arrived(self, timeout_s: float) -> list[Entry]:
        """The next entries, in order; none if none came within `timeout_s`."""
        if not self._asked:
            self._ask()
        if not self._reader.can_read(timeout=timeout_s):
            return []
        reply: Any = self._reader.read_response()
        if isinstance(reply, Exception):
            raise reply
        self._asked = False
        entries = [_entry(*raw) for raw in reply[0][1]] if reply else []
        if entries:
            self._position = entries[-1].entry_id
            more = len(entries) == self._count
            self._count = _next_count(entries)
            if more:
                self._ask()  # so that the reply is there when these are dealt with
        return entries

    def trim_through(self, entry_id: str) -> bool:
        """Delete `entry_id` and everything before it; False, and nothing is deleted, when the epoch has risen."""
        keys = self._keys
        return bool(self._trim(keys=[keys.outbox, keys.ready], args=[self.epoch, _after(entry_id)]))

    def length(self) -> int:
        """How many entries there are."""
        return int(self._client.xlen(self._keys.outbox))

    def ask_time(self, clock: RedisClock) -> None:
        """Set a clock by which the ages of entries are told."""
        asked_s = time.monotonic()
        clock.learn(self._client.time(), asked_s, time.monotonic())

    def close(self) -> None:
        """Give up the connections."""
        self._reader.disconnect()  # type: ignore[no-untyped-call]
        self._client.close()

    def _ask(self) -> None:
        self._asked = True
        self._reader.send_command(  # type: ignore[no-untyped-call]
            "XREAD", "COUNT", self._count, "BLOCK", _BLOCK_MS, "STREAMS", self._keys.outbox, self._position
        )

    def _read_epoch(self) -> bytes:
        # Over the connection that entries come by: in a failover, another one may lead to another Redis.
        self._reader.send_command("INFO", "server")  # type: ignore[no-untyped-call]
        read_from = self._reader.read_response().split(b"run_id:")[1].split()[0]
        if read_from != self._client.info("server")["run_id"].encode():
            raise redis.ConnectionError("the connections lead to two different Redis processes")
        self._reader.send_command("HGET", self._keys.ready, "epoch")  # type: ignore[no-untyped-call]
        epoch: bytes | None = self._reader.read_response()
        if epoch is None or not epoch.isdigit() or len(epoch) > MOST_DIGITS:
            raise redis.ConnectionError("Redis has no scoreboard")  # every record with such an epoch would be refused
        return epoch


def _entry(entry_id: bytes, fields: list[bytes]) -> Entry:
    if len(fields) == 2 and fields[0] == OUTBOX_FIELD:
        return Entry(entry_id.decode(), fields[1])
    named = dict(zip(fields[::2], fields[1::2], strict=True))
    return Entry(entry_id.decode(), named.get(OUTBOX_FIELD), named.get(MEMORY_FIELD))


def _next_count(entries: list[Entry]) -> int:
    size_bytes = sum(len(entry.payload or b"") for entry in entries) / len(entries)
    events_an_entry = max(1.0, size_bytes / BYTES_AN_EVENT)
    return max(1, min(MOST_ENTRIES, int(EVENTS_A_READ / events_an_entry)))


def _after(entry_id: str) -> str:
    ms, seq = map(int, entry_id.split("-"))
    return f"{ms}-{seq + 1}" if seq < _LAST_SEQ else f"{ms + 1}-0"
