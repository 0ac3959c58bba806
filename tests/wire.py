"""HTTP/1.1 and WebSocket frames on a bare socket, for tests that split, pipeline, hang up or do not read.

Knows only the wire; clients that behave are in the standard library and in `websockets`.
"""

from __future__ import annotations

import base64
import dataclasses
import itertools
import json
import os
import socket
import struct
from typing import Any

ADDRESS = "127.0.0.1"
TIMEOUT_S = 10.0
TEXT = 1
PING = 9
PONG = 10


@dataclasses.dataclass
class Answer:
    """One HTTP answer; header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The body, decoded."""
        return json.loads(self.body)


class Wire:
    """One TCP connection to a server on this machine."""

    def __init__(self, port: int, receive_buffer_bytes: int = 0, timeout_s: float = TIMEOUT_S) -> None:
        """`receive_buffer_bytes` bounds what the kernel takes in for a test that does not read."""
        self._socket = socket.socket()
        if receive_buffer_bytes:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        self._socket.settimeout(timeout_s)
        try:
            self._socket.connect((ADDRESS, port))
        except OSError:
            self.close()
            raise
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._unread = b""

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def shut_down(self) -> None:
        """End both directions, for a thread that waits for something to read."""
        self._socket.shutdown(socket.SHUT_RDWR)

    def reset(self) -> None:
        """Hang up rudely: the other side gets a RST."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()

    def send(self, data: bytes) -> None:
        """Send as one segment, as far as TCP has such a thing."""
        self._socket.sendall(data)

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        """Send one request and wait for its answer; `_` in a header's name stands for `-`."""
        self.send(request_bytes(method, path, body, **headers))
        return self.answer(has_body=method != "HEAD")

    def answer(self, *, has_body: bool = True) -> Answer:
        """The next answer; EOFError if the connection ends before it does."""
        while b"\r\n\r\n" not in self._unread:
            self._receive()
        head, _, self._unread = self._unread.partition(b"\r\n\r\n")
        status, *lines = head.decode("latin-1").split("\r\n")
        fields = (line.split(":", 1) for line in lines)
        headers = {name.lower(): value.strip() for name, value in fields}
        length = int(headers.get("content-length", "0")) if has_body else 0
        return Answer(int(status.split(" ")[1]), headers, self._exactly(length))

    @property
    def ended(self) -> bool:
        """Whether the other side closed, without another byte; waits for either."""
        try:
            return self._unread == b"" and self._socket.recv(1) == b""
        except ConnectionError:
            return True

    def is_silent(self, for_s: float) -> bool:
        """Whether nothing comes, and the connection stays, for that long."""
        if self._unread:
            return False
        self._socket.settimeout(for_s)
        try:
            self._receive()
        except TimeoutError:
            return True
        except EOFError:
            return False
        finally:
            self._socket.settimeout(TIMEOUT_S)
        return False

    def upgrade(self, path: str, **more: str) -> Answer:
        """Ask for a WebSocket, with more headers; 101 when there is one now."""
        key = base64.b64encode(os.urandom(16)).decode()
        headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
        return self.request("GET", path, **headers | {"Sec-WebSocket-Key": key} | more)

    def send_text(self, text: bytes) -> None:
        """Send a masked text frame."""
        self.send(frame_bytes(TEXT, text))

    def frame(self) -> tuple[int, bytes]:
        """(opcode, payload) of the next frame that is no ping, which may come at any time; EOFError at the end."""
        opcode, payload = self.any_frame()
        return self.frame() if opcode == PING else (opcode, payload)

    def any_frame(self) -> tuple[int, bytes]:
        """(opcode, payload) of the next frame; EOFError at the end."""
        first, length = self._exactly(2)
        if length == 126:
            (length,) = struct.unpack(">H", self._exactly(2))
        elif length == 127:
            (length,) = struct.unpack(">Q", self._exactly(8))
        return first & 0x0F, self._exactly(length)

    def _exactly(self, length: int) -> bytes:
        while len(self._unread) < length:
            self._receive()
        data, self._unread = self._unread[:length], self._unread[length:]
        return data

    def _receive(self) -> None:
        part = self._socket.recv(1 << 20)
        if not part:
            raise EOFError(f"the connection ended behind {self._unread[:200]!r}")
        self._unread += part


def request_bytes(method: str, path: str, body: bytes | None = None, **headers: str) -> bytes:
    """A request as it goes over the wire; `_` in a header's name stands for `-`."""
    lines = [f"{method} {path} HTTP/1.1", "Host: test"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


MASK = b"\x37\xfa\x21\x3d"
"""Of all frames: a test whose frames differ has another name in each process of a parallel run."""


def frame_bytes(
    opcode: int, payload: bytes = b"", *, final: bool = True, masked: bool = True, reserved: int = 0
) -> bytes:
    """A WebSocket frame as clients send it."""
    length, mask = len(payload), MASK if masked else b""
    short, rest = length, b""
    if length > 0xFFFF:
        short, rest = 127, length.to_bytes(8, "big")
    elif length > 125:
        short, rest = 126, length.to_bytes(2, "big")
    if masked:
        payload = bytes(byte ^ key for byte, key in zip(payload, itertools.cycle(mask), strict=False))
    return bytes([0x80 * final | reserved | opcode, 0x80 * masked | short]) + rest + mask + payload


def once(port: int, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
    """One request over a connection of its own."""
    with Wire(port) as wire:
        return wire.request(method, path, body, **headers)
