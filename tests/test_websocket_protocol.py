"""What a client of a WebSocket may not do, and what it is told: handshakes and frames without any connection."""

from __future__ import annotations

import os
import random

import pytest

from server.errors import CloseCode, Problem
from server.websocket_protocol import FRAME_BURST, FRAME_INTERVAL_S, FrameCheck, Violation, check_handshake
from tests.wire import frame_bytes as frame

TEXT, BINARY, CONTINUATION, CLOSE, PING, PONG = 1, 2, 0, 8, 9, 10
MOST = 100_000
FOX = "🦊".encode()

HANDSHAKE = {
    b"upgrade": b"websocket",
    b"connection": b"Upgrade",
    b"sec-websocket-version": b"13",
    b"sec-websocket-key": b"dGhlIHNhbXBsZSBub25jZQ==",
}


def shake(**changes: bytes) -> None:
    """Check the handshake of RFC 6455, 1.2, with some headers changed."""
    headers = HANDSHAKE | {name.replace("_", "-").encode(): value for name, value in changes.items()}
    check_handshake(lambda name: headers[name])


def fed(*frames: bytes, most: int = MOST) -> Violation | None:
    """What is wrong with these frames: the same in one piece as in small ones."""
    data = b"".join(frames)
    whole = FrameCheck(most).feed(data, 0.0)
    slow, size = FrameCheck(most), 1 if len(data) < 1000 else 997
    one_by_one = next(filter(None, (slow.feed(data[at : at + size], 0.0) for at in range(0, len(data), size))), None)
    assert (whole and whole[1:]) == (one_by_one and one_by_one[1:])
    return whole


# ---------------------------------------------------------------------- the handshake


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"upgrade": b"WebSocket"},
        {"upgrade": b"h2c, websocket"},
        {"connection": b"keep-alive, Upgrade"},
        {"connection": b"upgrade,Keep-Alive"},
        {"connection": b"UPGRADE"},
        {"sec_websocket_version": b" 13 "},
    ],
)
def test_handshake_is_taken_in_any_spelling(changes: dict[str, bytes]) -> None:
    shake(**changes)


@pytest.mark.parametrize("version", [b"", b"8", b"0", b"12", b"14", b"013", b"13, 8", b"thirteen"])
def test_handshake_of_another_version_is_told_ours(version: bytes) -> None:
    with pytest.raises(Problem, match="Sec-WebSocket-Version: expected 13, got") as refusal:
        shake(sec_websocket_version=version)
    assert refusal.value.status == 426
    assert dict(refusal.value.headers) == {
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Version": "13",
    }


@pytest.mark.parametrize(
    ("changes", "status", "detail"),
    [
        ({"upgrade": b""}, 426, "expected a WebSocket upgrade"),
        ({"upgrade": b"h2c"}, 426, "expected a WebSocket upgrade"),
        ({"upgrade": b"websockets"}, 426, "expected a WebSocket upgrade"),
        ({"connection": b""}, 400, "Connection: expected Upgrade"),
        ({"connection": b"keep-alive"}, 400, "Connection: expected Upgrade"),
        ({"sec_websocket_key": b""}, 400, "Sec-WebSocket-Key: expected 16 bytes in base64"),
        ({"sec_websocket_key": b"dGhlIHNhbXBsZQ=="}, 400, "Sec-WebSocket-Key: expected 16 bytes"),
        ({"sec_websocket_key": b"!!!!!!!!!!!!!!!!!!!!!!=="}, 400, "Sec-WebSocket-Key: expected 16 bytes"),
        ({"sec_websocket_key": "ž".encode() * 12}, 400, "Sec-WebSocket-Key: expected 16 bytes"),
    ],
)
def test_handshake_that_is_none_is_refused(changes: dict[str, bytes], status: int, detail: str) -> None:
    with pytest.raises(Problem, match=detail) as refusal:
        shake(**changes)
    assert refusal.value.status == status


# ---------------------------------------------------------------------- frames


@pytest.mark.parametrize(
    "frames",
    [
        [frame(TEXT, b"hello")],
        [frame(TEXT)],
        [frame(TEXT, b"x" * 125), frame(TEXT, b"x" * 126), frame(TEXT, b"x" * 70_000)],
        [frame(TEXT, "Žižka 🦊".encode())],
        [frame(BINARY, b"\xff\xfe")],
        [frame(TEXT, b"one ", final=False), frame(CONTINUATION, b"two ", final=False), frame(CONTINUATION, b"three")],
        [frame(TEXT, b"one ", final=False), frame(PING, b"\xff"), frame(CONTINUATION, b"two")],
        [frame(TEXT, FOX[:1], final=False), frame(PONG), frame(CONTINUATION, FOX[1:3], final=False),
         frame(CONTINUATION, FOX[3:])],
        [frame(TEXT, b"", final=False), frame(CONTINUATION, b"")],
        [frame(BINARY, b"\xff", final=False), frame(CONTINUATION, b"\xff"), frame(TEXT, b"x")],
        [frame(PING, b"x" * 125), frame(PONG), frame(CLOSE)],
        *([frame(CLOSE, code.to_bytes(2, "big") + "schön".encode())] for code in (1000, 1001, 1011, 1014, 3000, 4999)),
        [frame(TEXT, b"x" * MOST)],
    ],
)  # fmt: skip
def test_frames_of_a_good_client_are_let_through(frames: list[bytes]) -> None:
    assert fed(*frames) is None


@pytest.mark.parametrize(
    ("bad", "code", "reason"),
    [
        (frame(TEXT, b"hi", masked=False), 1002, b"masked"),
        (frame(TEXT, b"", masked=False), 1002, b"masked"),
        (frame(TEXT, b"x" * 70_000, masked=False), 1002, b"masked"),
        (frame(PING, masked=False), 1002, b"masked"),
        (frame(CLOSE, masked=False), 1002, b"masked"),
        *((frame(TEXT, b"x", reserved=bit), 1002, b"reserved") for bit in (0x10, 0x20, 0x40)),
        *((frame(opcode, b"x"), 1002, b"opcode") for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)),
        *((frame(opcode, b"x", final=False), 1002, b"control frame") for opcode in (CLOSE, PING, PONG)),
        *((frame(opcode, b"x" * 126), 1002, b"control frame") for opcode in (CLOSE, PING, PONG)),
        (frame(CONTINUATION, b"x"), 1002, b"rest of the last message"),
        (frame(TEXT, b"x", final=False) + frame(TEXT, b"x"), 1002, b"rest of the last message"),
        (frame(TEXT, b"x", final=False) + frame(BINARY, b"x"), 1002, b"rest of the last message"),
        (frame(TEXT, b"\xff"), 1007, b"UTF-8"),
        (frame(TEXT, FOX[:3]), 1007, b"UTF-8"),
        (frame(TEXT, b"\xed\xa0\x80"), 1007, b"UTF-8"),  # half of a pair
        (frame(TEXT, b"\xc0\x80"), 1007, b"UTF-8"),  # NUL in two bytes
        (frame(TEXT, FOX[:2], final=False) + frame(CONTINUATION, FOX[:2]), 1007, b"UTF-8"),
        (frame(TEXT, FOX[:2], final=False) + frame(CONTINUATION), 1007, b"UTF-8"),
        (frame(CLOSE, b"x"), 1002, b"close code"),
        *(
            (frame(CLOSE, code.to_bytes(2, "big")), 1002, b"close code")
            for code in (0, 999, 1004, 1005, 1006, 1015, 2999, 5000, 65_535)
        ),
        (frame(CLOSE, b"\x03\xe8\xff"), 1007, b"UTF-8"),
        (frame(TEXT, b"x" * (MOST + 1)), 1009, b"at most 100000 bytes"),
        (frame(BINARY, b"x" * (MOST + 1)), 1009, b"at most 100000 bytes"),
        (frame(TEXT, b"x" * MOST, final=False) + frame(CONTINUATION, b"x"), 1009, b"at most 100000 bytes"),
        (bytes([0x81, 0xFF]) + b"\xff" * 12, 1009, b"at most 100000 bytes"),
    ],
)
def test_frame_that_breaks_a_rule_is_told_which(bad: bytes, code: int, reason: bytes) -> None:
    violation = fed(bad)
    assert violation is not None
    assert violation.code == code
    assert reason in violation.reason
    assert len(violation.reason) <= 123  # what fits into a close frame


def test_what_came_before_a_bad_frame_is_still_good() -> None:
    good = frame(TEXT, b"hello") + frame(PING) + frame(TEXT, "Žižka".encode())
    violation = FrameCheck(MOST).feed(good + frame(TEXT, b"hi", masked=False), 0.0)
    assert violation is not None
    assert violation.good_bytes == len(good)
    check = FrameCheck(MOST)
    assert check.feed(good[:-1], 0.0) is None
    violation = check.feed(good[-1:] + frame(TEXT, b"\xff"), 0.0)
    assert violation is not None
    assert violation.good_bytes == 1


def test_too_large_a_message_is_known_by_its_header() -> None:
    check = FrameCheck(MOST)
    violation = check.feed(bytes([0x81, 0xFF]) + (10**9).to_bytes(8, "big") + b"mask", 0.0)
    assert violation == (0, CloseCode.MESSAGE_TOO_BIG, b"expected a message of at most 100000 bytes")


def test_any_cut_of_a_good_stream_is_good() -> None:
    chance = random.Random(12)
    for _ in range(200):
        frames: list[bytes] = []
        for _ in range(chance.randint(1, 6)):
            text = ("ž🦊a" * chance.choice((0, 1, 20, 100)))[: chance.randint(0, 300)].encode()
            at = chance.randint(0, len(text))
            frames.append(frame(TEXT, text[:at], final=False))
            if chance.random() < 0.5:
                frames.append(frame(PING, os.urandom(chance.randint(0, 125))))
            frames.append(frame(CONTINUATION, text[at:]))
        data, check = b"".join(frames), FrameCheck(MOST)
        while data:
            at = chance.randint(1, len(data))
            assert check.feed(data[:at], 0.0) is None
            data = data[at:]


@pytest.mark.parametrize("opcode", [PING, PONG, TEXT])
def test_frames_without_end_are_too_many(opcode: int) -> None:
    check, one = FrameCheck(MOST), frame(opcode)
    assert check.feed(one * (FRAME_BURST - 1), 100.0) is None
    later_s = 100.0 + 5 * FRAME_INTERVAL_S
    assert check.feed(one * 5, later_s) is None, "expected five to be forgiven meanwhile"
    violation = check.feed(one * 5, later_s)
    assert violation is not None
    assert violation[1:] == (CloseCode.POLICY_VIOLATION, b"too many frames")
