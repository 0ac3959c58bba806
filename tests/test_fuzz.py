"""Bytes that nobody meant: decoders answer or refuse, and a real server goes on answering others.

FUZZ_EXAMPLES=200000 pytest tests/test_fuzz.py takes minutes instead of seconds; docs/security.md says what came out.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from server import events, routes, subscription
from server.errors import Problem
from server.events import MAX_PLAYER, MAX_SCORE, BadEvent
from tests.alone import server_alone
from tests.client import board, get, new_player, post, token
from tests.services import ServerProcess
from tests.wire import Wire, request_bytes

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "200"))
fuzz = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=140) | st.just("\ud800")
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner), max_leaves=8
)


def objects(*fields: str) -> st.SearchStrategy[bytes]:
    """JSON with these fields, of any type, whole or with bytes changed."""
    made = st.fixed_dictionaries({}, optional=dict.fromkeys(fields, anything)).map(json.dumps).map(str.encode)
    return made | st.builds(_harm, made, st.integers(0, 200), st.binary(max_size=3)) | st.binary(max_size=300)


def _harm(text: bytes, at: int, by: bytes) -> bytes:
    return text[: at % (len(text) + 1)] + by + text[(at + 1) % (len(text) + 1) :]


def refused(decode: Callable[[Any], Any], value: Any, *statuses: int) -> bool:
    """Whether it is refused, and then with one of these statuses and something to read."""
    try:
        decode(value)
    except Problem as problem:
        refusal = problem
    else:
        return False
    assert refusal.status in statuses
    assert json.loads(refusal.body())["detail"]
    return True


@fuzz
@given(objects("playerId", "scoreDelta", "board"))
def test_any_body_is_a_change_or_400(body: bytes) -> None:
    if not refused(routes.parse_change, body, 400):
        change = routes.parse_change(body)
        assert 1 <= len(change.player_id) <= MAX_PLAYER
        assert -MAX_SCORE <= change.score_delta <= MAX_SCORE
        change.player_id.encode()


@fuzz
@given(objects("type", "players") | objects("players").map(lambda text: text.replace(b"{", b'{"type":"subscribe",', 1)))
def test_any_message_of_a_watcher_is_understood_or_refused(text: bytes) -> None:
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError):
        message = subscription.decode_message(text)
        if not isinstance(message, subscription.Ping):
            subscription.check_players(set(message.players))


@fuzz
@given(st.text(max_size=200), st.sampled_from(["", "limit=", "board=", "players=", "scores=", "limit=5&board=%"]))
def test_any_query_is_understood_or_refused(text: str, before: str) -> None:
    sent = before + text.encode("utf-8", "surrogatepass").decode("latin-1")
    refused(_page, sent, 400, 404)
    refused(_watcher, sent, 400, 404)


def _page(query: str) -> Any:
    return routes.parse_page(query, ("main",), "main")


def _watcher(query: str) -> Any:
    return subscription.parse_query(query, ("main",))


@fuzz
@given(st.binary(max_size=200))
def test_any_idempotency_key_is_taken_or_refused(raw: bytes) -> None:
    if not refused(routes.parse_idempotency_key, raw, 400):
        assert routes.parse_idempotency_key(raw).encode() == raw


@fuzz
@given(objects("eventId", "board", "playerId", "scoreDelta", "newScore", "at"))
def test_any_record_is_an_event_or_refused(value: bytes) -> None:
    with contextlib.suppress(BadEvent):
        assert events.decode_event(value).version


def _packed(value: Any) -> bytes:
    """The value in MessagePack, or nothing where that cannot hold it: half a surrogate pair, integers over 64 bits."""
    try:
        return msgspec.msgpack.encode(value)
    except (UnicodeEncodeError, OverflowError):
        return b""


@fuzz
@example(_packed([float("inf"), "a"]))  # it was no BadEvent
@given(st.binary(max_size=200) | anything.map(_packed))
def test_any_outbox_entry_is_a_batch_or_refused(payload: bytes) -> None:
    with contextlib.suppress(BadEvent):
        events.events_of_entry("1-0", payload)
    with contextlib.suppress(BadEvent):
        events.memories_of_entry(payload, events.MAX_BATCH)


# ---------------------------------------------------------------------- a real server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with server_alone(tmp_path_factory.mktemp("fuzz")) as process:
        yield process


def requests(rng: random.Random) -> list[bytes]:
    """Good ones, to be harmed."""
    bearer = f"Bearer {token('fuzz')}"
    body = json.dumps({"playerId": "fuzz", "scoreDelta": 1}).encode()
    chunked = b"POST /update-score HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
    return [
        request_bytes("POST", "/update-score", body, Authorization=bearer, Idempotency_Key=str(rng.random())),
        request_bytes("GET", "/leaderboard?limit=5&board=main", Accept_Encoding="gzip"),
        request_bytes("GET", rng.choice(["/", "/style.css", "/openapi.json", "/readyz", "/metrics", "/none"])),
        request_bytes("HEAD", "/") + request_bytes("OPTIONS", "/update-score"),
        chunked,
        rng.randbytes(rng.randrange(1, 600)),
    ]


def harmed(rng: random.Random) -> bytes:
    """Some requests behind each other, cut, repeated, with bytes changed."""
    data = bytearray(b"".join(rng.choices(requests(rng), k=rng.randrange(1, 4))))
    for _ in range(rng.randrange(4)):
        at = rng.randrange(max(1, len(data)))
        kind = rng.randrange(4)
        if kind == 0 and data:
            data[at] = rng.randrange(256)
        elif kind == 1:
            data[at:at] = rng.choice([b"\r\n", b"\0", b":", b" ", b"\xff" * 9, b"a" * 5000, rng.randbytes(9)])
        elif kind == 2:
            del data[at : at + rng.randrange(1, 40)]
        else:
            del data[max(1, at) :]
    return bytes(data)


def send_in_pieces(wire: Wire, rng: random.Random, data: bytes) -> None:
    while data:
        length = rng.choice([1, 7, 100, len(data)])
        wire.send(data[:length])
        data = data[length:]


def test_any_bytes_on_a_connection_leave_the_server_answering(server: ServerProcess) -> None:
    rng, whole = random.Random(0 if EXAMPLES <= 200 else None), 0
    for number in range(EXAMPLES * 2):
        with contextlib.suppress(OSError), Wire(server.port) as wire:
            send_in_pieces(wire, rng, harmed(rng))
            whole += 1
            if number % 10 == 0:
                wire.is_silent(0.01)
            if number % 3 == 0:
                wire.reset()
        if number % 50 == 0:
            assert_serves(server)
    assert_serves(server)
    assert whole > EXAMPLES, "most were sent to their end"


def test_any_frames_on_a_websocket_leave_the_server_answering(server: ServerProcess) -> None:
    rng, whole = random.Random(1 if EXAMPLES <= 200 else None), 0
    texts = [b'{"type":"subscribe","players":["a"]}', b'{"type":"unsubscribe","players":[]}', b"{", b"\xff\xfe", b""]
    for number in range(EXAMPLES):
        with contextlib.suppress(OSError), Wire(server.port) as wire:
            assert wire.upgrade("/live-updates?scores=none").status == 101
            for _ in range(rng.randrange(1, 6)):
                if rng.random() < 0.6:
                    wire.send_text(rng.choice(texts))
                else:  # reserved bits and opcodes, no mask, lengths that lie
                    wire.send(rng.randbytes(rng.randrange(1, 40)))
            whole += 1
            if number % 3 == 0:
                wire.reset()
    assert_serves(server)
    assert whole > EXAMPLES / 4, "the others were closed on the way"


def assert_serves(server: ServerProcess) -> None:
    assert server.running, server.output_tail()
    player = new_player()
    assert post(server, player, 5).json() == {"playerId": player, "newScore": 5}
    assert board(server)[player] == 5
    assert get(server, "/readyz").status == 200
    log = server.output_tail(200)
    assert "Traceback" not in log
    assert "fault" not in log
