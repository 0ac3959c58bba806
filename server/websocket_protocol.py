"""What RFC 6455 asks of a client and uWebSockets does not look at, or answers by cutting the connection.

uWebSockets takes a handshake for any version and without an Upgrade header, reads an unmasked frame as if it were
masked, and ends the connection without a close frame for whatever else is wrong. So its clients saw 1006, which tells
them to connect again. Pure: knows no socket and no clock.
"""

from __future__ import annotations

import base64
import codecs
import struct
from collections.abc import Callable
from typing import Final, NamedTuple

from server.budget import Budget
from server.errors import CloseCode, Problem

VERSION: Final = "13"
KEY_BYTES: Final = 16

FRAME_INTERVAL_S: Final = 0.01
FRAME_BURST: Final = 1000
"""Frames of one client, pings and fragments too: a hundred a second on the long run, a thousand at once."""

_CONTINUATION, _TEXT, _BINARY, _CLOSE, _PING, _PONG = 0, 1, 2, 8, 9, 10
_OPCODES: Final = frozenset({_CONTINUATION, _TEXT, _BINARY, _CLOSE, _PING, _PONG})
_FINAL, _RESERVED, _OPCODE, _CONTROL, _MASKED, _LENGTH = 0x80, 0x70, 0x0F, 0x08, 0x80, 0x7F
_MASK_BYTES: Final = 4
_MAX_HEADER_BYTES: Final = 14
_MAX_CONTROL_BYTES: Final = 125

_new_decoder: Final = codecs.getincrementaldecoder("utf-8")


# ---------------------------------------------------------------------- the handshake


def check_handshake(joined_header: Callable[[bytes], bytes]) -> None:
    """Check the headers of a GET that should become a WebSocket (RFC 6455, 4.2.1).

    `joined_header` gives all values of a header. Raises Problem 400 or 426.
    """
    if b"websocket" not in _tokens(joined_header(b"upgrade")):
        raise upgrade_required("expected a WebSocket upgrade")
    if b"upgrade" not in _tokens(joined_header(b"connection")):
        raise Problem(400, "Connection: expected Upgrade among its values")
    version = joined_header(b"sec-websocket-version").strip().decode("latin-1")
    if version != VERSION:
        raise upgrade_required(f"Sec-WebSocket-Version: expected {VERSION}, got {version[:40]!r}")
    if not _is_key(joined_header(b"sec-websocket-key").strip()):
        raise Problem(400, f"Sec-WebSocket-Key: expected {KEY_BYTES} bytes in base64")


def upgrade_required(detail: str) -> Problem:
    """426, which names the protocol and its version (RFC 9110, 15.5.22 and 7.8; RFC 6455, 4.2.2)."""
    headers = (("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Version", VERSION))
    return Problem(426, detail, headers=headers)


def _tokens(value: bytes) -> set[bytes]:
    return {each.strip().lower() for each in value.split(b",")}


def _is_key(value: bytes) -> bool:
    try:
        return len(base64.b64decode(value, validate=True)) == KEY_BYTES
    except ValueError:
        return False


# ---------------------------------------------------------------------- frames


class Violation(NamedTuple):
    """Why a connection has to be closed; only the first `good_bytes` of what was fed may be read by anybody else."""

    good_bytes: int
    code: CloseCode
    reason: bytes


class _Broken(Exception):
    """A frame that ends the connection: (code, reason)."""


class FrameCheck:
    """Follows the frames of one client, which may be cut anywhere, and keeps none of them."""

    __slots__ = (
        "_budget", "_close_payload", "_decoder", "_header", "_is_final", "_is_open", "_is_text", "_left", "_mask",
        "_max_bytes", "_message_bytes", "_opcode",
    )  # fmt: skip

    def __init__(self, max_message_bytes: int) -> None:
        self._max_bytes = max_message_bytes
        self._header = b""  # the beginning of a header that is not all there
        self._left = 0  # of the payload that is being read
        self._mask = b""
        self._opcode = _CONTINUATION
        self._is_final = True
        self._is_open = False  # whether a message has begun and not ended
        self._is_text = False
        self._message_bytes = 0
        self._decoder: codecs.IncrementalDecoder | None = None
        self._close_payload = b""
        self._budget = Budget()

    def feed(self, data: bytes, now_s: float) -> Violation | None:
        """What is wrong with the next bytes of the connection; after a violation it must not be fed again."""
        at = begin = 0
        try:
            while at < len(data):
                if self._left:
                    at = self._payload(data, at)
                    continue
                begin = at
                at = self._begin(data, at, now_s)
        except _Broken as broken:
            code, reason = broken.args
            return Violation(begin, code, reason)
        return None

    def _begin(self, data: bytes, at: int, now_s: float) -> int:
        """Read a header; where its payload begins."""
        kept = len(self._header)
        header = self._header + data[at : at + _MAX_HEADER_BYTES - kept]
        if len(header) < 2:
            self._header = header
            return len(data)
        first, second = header[0], header[1]
        if kept < 2:
            self._check_first_bytes(first, second)
        short = second & _LENGTH
        size = 2 + {126: 2, 127: 8}.get(short, 0) + _MASK_BYTES
        if len(header) < size:
            self._header = header
            return len(data)
        self._header = b""
        if not self._budget.spend(FRAME_INTERVAL_S, FRAME_BURST * FRAME_INTERVAL_S, now_s):
            raise _Broken(CloseCode.POLICY_VIOLATION, b"too many frames")
        length = short
        if short == 126:
            (length,) = struct.unpack_from(">H", header, 2)
        elif short == 127:
            (length,) = struct.unpack_from(">Q", header, 2)
        self._mask = header[size - _MASK_BYTES : size]
        self._left = length
        self._open(first & _OPCODE, bool(first & _FINAL), length)
        if not length:
            self._end()
        return at + size - kept

    def _check_first_bytes(self, first: int, second: int) -> None:
        opcode = first & _OPCODE
        if not second & _MASKED:
            raise _protocol_error(b"expected a masked frame")
        if first & _RESERVED:
            raise _protocol_error(b"expected no reserved bit: there are no extensions")
        if opcode not in _OPCODES:
            raise _protocol_error(b"expected an opcode of RFC 6455, got %d" % opcode)
        if opcode & _CONTROL and (not first & _FINAL or second & _LENGTH > _MAX_CONTROL_BYTES):
            raise _protocol_error(b"expected a control frame in one piece of at most 125 bytes")
        if not opcode & _CONTROL and (opcode == _CONTINUATION) != self._is_open:
            raise _protocol_error(b"expected the rest of the last message, or a new one after it")

    def _open(self, opcode: int, is_final: bool, length: int) -> None:
        self._opcode, self._is_final = opcode, is_final
        if opcode & _CONTROL:
            return
        if opcode != _CONTINUATION:
            self._message_bytes, self._is_text = 0, opcode == _TEXT
        self._is_open = True
        self._message_bytes += length
        if self._message_bytes > self._max_bytes:
            raise _Broken(CloseCode.MESSAGE_TOO_BIG, b"expected a message of at most %d bytes" % self._max_bytes)

    def _payload(self, data: bytes, at: int) -> int:
        """Read on in a payload; where it ends, or the data does."""
        end = min(len(data), at + self._left)
        part = data[at:end]
        self._left -= len(part)
        if self._opcode == _CLOSE:
            self._close_payload += _unmasked(part, self._mask)
        elif self._is_text and not self._opcode & _CONTROL:
            self._decode(_unmasked(part, self._mask), is_last=not self._left and self._is_final)
        turn = len(part) % _MASK_BYTES
        self._mask = self._mask[turn:] + self._mask[:turn]
        if not self._left:
            self._end()
        return end

    def _end(self) -> None:
        if self._opcode == _CLOSE:
            _check_close(self._close_payload)
        elif not self._opcode & _CONTROL and self._is_final:
            self._is_open = False
            if self._decoder is not None and self._decoder.getstate()[0]:  # its last frame was empty
                raise _Broken(CloseCode.INVALID_DATA, b"expected UTF-8")

    def _decode(self, text: bytes, *, is_last: bool) -> None:
        if self._decoder is None:
            self._decoder = _new_decoder()
        try:
            self._decoder.decode(text, is_last)
        except UnicodeDecodeError:
            raise _Broken(CloseCode.INVALID_DATA, b"expected UTF-8") from None


def _protocol_error(reason: bytes) -> _Broken:
    return _Broken(CloseCode.PROTOCOL_ERROR, reason)


def _check_close(payload: bytes) -> None:
    """Check a close frame's code and reason (RFC 6455, 5.5.1 and 7.4; the registry has 1012 to 1014 since)."""
    if not payload:
        return
    code = int.from_bytes(payload[:2], "big")
    if len(payload) < 2 or not (1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999):
        raise _protocol_error(b"expected a close code that may be sent")
    try:
        payload[2:].decode()
    except UnicodeDecodeError:
        raise _Broken(CloseCode.INVALID_DATA, b"expected UTF-8") from None


def _unmasked(part: bytes, mask: bytes) -> bytes:
    length = len(part)
    repeated = (mask * (length // _MASK_BYTES + 1))[:length]
    return (int.from_bytes(part, "little") ^ int.from_bytes(repeated, "little")).to_bytes(length, "little")
