"""Records and outbox entries that no relay and no server of ours writes: whoever reads them has to go on.

Knows no reader.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import confluent_kafka
import msgspec
import redis as redis_client

from server.config import Settings
from server.events import MAX_AT_MS, encode_event
from tests.sync_parts import event

Headers = list[tuple[bytes, bytes | None]]


class Odd(NamedTuple):
    """A record that is no event, and where it differs from one."""

    value: bytes | None
    headers: Headers


def good(player: str = "ann", ms: int = 1000) -> bytes:
    """The value of a record that is an event."""
    return encode_event(event(player, ms))


def changed(**fields: Any) -> bytes:
    """The same but for `fields`."""
    return json.dumps(json.loads(good()) | fields).encode()


def _deep(begin: bytes, end: bytes) -> bytes:
    return good()[:-1] + b',"more":' + begin * 100_000 + b"1" + end * 100_000 + b"}"


_V: Final = (b"v", b"1")
_VALUES: Final = (
    None,
    b"",
    b"\xff",
    b"null",
    _deep(b"[", b"]"),
    _deep(b'{"a":', b"}"),
    good().replace(b":1000}", b":" + b"9" * 5000 + b"}"),
    changed(board="b" * 9000),
    changed(board="no board"),
    changed(playerId="p" * 9000),
    changed(playerId="a\0b"),
    changed(playerId="XX").replace(b"XX", b"\\ud800"),
    changed(playerId="XX").replace(b"XX", b"\xff\xfe"),
    changed(scoreDelta=2**63),
    changed(newScore=-(10**300)),
    changed(eventId="1" * 5000),
    changed(eventId=f"1000-{2**60}-0"),
    changed(eventId=f"{MAX_AT_MS + 1}-0-0", at=MAX_AT_MS + 1),
    changed(eventId=f"{10**17}-0-0", at=10**17),
)
_HEADERS: Final = (
    (b"v", b"\xff" * 10_000),
    (b"v", None),
    (b"epoch", b"9" * 5000),
    (b"epoch", b"9" * 19),
    (b"epoch", b"\xff"),
    (b"fence", b"9" * 5000),
    (b"fence", b"9" * 18),
    (b"fence", None),
    (b"tag", b"t" * 9000),
    (b"tag", b"\xff"),
    (b"idempotency", b"f" * 16 + b"\xff\xfe"),
    (b"idempotency", b"f" * 100_000),
    (b"idempotency", b""),
    (b"\xff\xfe", b"a name that is no text"),
)
ODD: Final = (
    *(Odd(value, [_V]) for value in _VALUES),
    *(Odd(good("odd"), [header, _V]) for header in _HEADERS),
)
"""Not one of them is an event."""


def put_odd_records(settings: Settings, records: Sequence[Odd] = ODD, partition: int = 0) -> None:
    """Put these into one partition of the topic, as a client of the C library can: the other takes only text."""
    producer = _Producer(settings.kafka_brokers)
    for record in records:
        producer.produce(settings.kafka_topic, partition, record)
    producer.flush()


class _Producer:
    """librdkafka's, as far as it is needed here."""

    def __init__(self, brokers: str) -> None:
        beside = Path(f"{Path(confluent_kafka.__file__).parent}.libs")
        self._library = ctypes.CDLL(str(next(beside.glob("librdkafka-*.so*"))))
        for name in ("rd_kafka_conf_new", "rd_kafka_new", "rd_kafka_headers_new"):
            getattr(self._library, name).restype = ctypes.c_void_p
        said = ctypes.create_string_buffer(512)
        conf = ctypes.c_void_p(self._library.rd_kafka_conf_new())
        for name, value in ((b"bootstrap.servers", brokers.encode()), (b"log_level", b"2")):
            self._library.rd_kafka_conf_set(conf, name, value, said, ctypes.c_size_t(len(said)))
        made = self._library.rd_kafka_new(0, conf, said, ctypes.c_size_t(len(said)))  # 0 is a producer
        assert made, said.value
        self._producer = ctypes.c_void_p(made)

    def produce(self, topic: str, partition: int, record: Odd) -> None:
        """Put one record into the queue."""
        headers = ctypes.c_void_p(self._library.rd_kafka_headers_new(ctypes.c_size_t(len(record.headers))))
        for name, value in record.headers:
            size = ctypes.c_ssize_t(len(value or b""))
            self._library.rd_kafka_header_add(headers, name, ctypes.c_ssize_t(len(name)), value, size)
        tags = {"end": 0, "topic": 1, "partition": 3, "value": 4, "flags": 7, "headers": 10}
        error = self._library.rd_kafka_producev(
            self._producer,
            *(tags["topic"], topic.encode()),
            *(tags["partition"], ctypes.c_int(partition)),
            *(tags["value"], record.value, ctypes.c_size_t(len(record.value or b""))),
            *(tags["flags"], 2),  # RD_KAFKA_MSG_F_COPY
            *(tags["headers"], headers),
            tags["end"],
        )
        assert error == 0, f"librdkafka's error {error}"

    def flush(self) -> None:
        """Wait until all have been taken."""
        assert self._library.rd_kafka_flush(self._producer, 10_000) == 0
        self._library.rd_kafka_destroy(self._producer)


def _entry(*fields: Any) -> bytes:
    return msgspec.msgpack.encode(fields)


ODD_ENTRIES: Final[tuple[dict[str, bytes], ...]] = (
    {"something": b"else"},
    {"batch": b"\x91" * 100_000 + b"\xc0"},
    {"batch": _entry("main", "odd", 1, 10**18)},
    {"batch": _entry("main", "odd\0", 1, 1)},
    {"batch": _entry("main", "o" * 9000, 1, 1)},
    {"batch": _entry("b" * 9000, "odd", 1, 1)},
    {"batch": _entry("main", "odd", 1, 1).replace(b"odd", b"\xed\xa0\x80")},
    {"batch": _entry("main", *["odd", 1, 1] * 30_000)},
    {"batch": _entry("main", "odd", 1, 1), "memory": b"\xff"},
    {"batch": _entry("main", "odd", 1, 1), "memory": _entry(7, "f" * 20)},
    {"batch": _entry("main", "odd", 1, 1), "memory": _entry(-1, "f" * 20)},
    {"batch": _entry("main", "odd", 1, 1), "memory": _entry(0, "f" * 100_000)},
    {"batch": _entry("main", "odd", 1, 1), "memory": _entry(0, "f" * 20).replace(b"ff", b"\xff\xff")},
)
"""Fields of outbox entries; not one of them is a batch of ours."""


def owe_odd_entries(redis: redis_client.Redis, key: str = "outbox") -> list[str]:
    """Put them all into an outbox, and behind them a batch under an id that is not of our time; their ids."""
    odd: list[tuple[dict[str, bytes], str]] = [(fields, "*") for fields in ODD_ENTRIES]
    odd.append(({"batch": _entry("main", "odd", 1, 1)}, f"{2**63}-{2**64 - 1}"))
    return [redis.xadd(key, fields, id=entry_id).decode() for fields, entry_id in odd]  # type: ignore[arg-type]
