"""Random requests, cut, pipelined, half-closed and reset, at our C, with everything watched that C does not watch."""

from __future__ import annotations

import os
import random
import re
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.services import ROOT, wait_until
from tests.test_uws import UwsApp
from tests.test_uws_wire import UPGRADE
from tests.wire import TEXT, frame_bytes, request_bytes

SECONDS = 6.0
CONNECTIONS = 150
TARGETS = ["now", "later=0.01", "departs=0.02", "twice", "raise", "refuse", "large"]
BODIES = [b"hello", b"later0.02", b"refuse", b"raise", b"said", b"repeat"]
CHUNKED = b"POST /posts HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
UNUSUAL = [
    CHUNKED + b"5\r\nhello\r\n0\r\n\r\n",
    CHUNKED + b"2;a=b\r\nhe\r\n3\r\nllo\r\n0\r\nX-Sum: 1\r\n\r\n",
    CHUNKED + b"g\r\n",
    CHUNKED.replace(b"chunked", b"gzip"),
    b"POST /posts HTTP/1.0\r\nContent-Length: 5\r\n\r\nhello\r\n",
    b"\r\n\r\nGET http://x/shared?now HTTP/1.1\r\nHost: x\r\nx_y: z\r\nConnection: a, close\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: x\r\nExpect: 100-Continue\r\n\r\n",
    b"GET /shared?now HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * 20_000,
    b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + bytes(12),
    UPGRADE,
    UPGRADE + frame_bytes(TEXT, b"echo hello") + frame_bytes(TEXT, b"x" * 500)[:300],
    UPGRADE + frame_bytes(TEXT, b"echo hello", masked=False),
]


@pytest.fixture
def sanitized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UwsApp]:
    """tests/uws_app.py with its C compiled to be watched."""
    compiler, library = shutil.which("gcc"), tmp_path / "library.so"
    if compiler is None:
        pytest.skip("the sanitizers come with gcc, and there is none")
    runtimes = []
    for name in ("libasan.so", "libubsan.so"):
        runtime = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        if not os.path.isabs(runtime):
            pytest.skip(f"this gcc has no {name}")
        runtimes.append(runtime)
    flags = ["-std=gnu11", "-O1", "-g", "-fsanitize=address,undefined", "-fPIC", "-shared"]
    subprocess.run([compiler, *flags, "-o", library, *sorted(ROOT.glob("server/uws_*.c"))], check=True)
    monkeypatch.setenv("LD_PRELOAD", " ".join(runtimes))
    monkeypatch.setenv("ASAN_OPTIONS", "detect_leaks=0")
    monkeypatch.setenv("UWS_NATIVE", str(library))
    app = UwsApp(tmp_path, "gc")
    app.start()
    monkeypatch.delenv("LD_PRELOAD")
    yield app
    app.stop()


def any_request(rng: random.Random) -> bytes:
    headers = {}
    if rng.random() < 0.3:
        headers["X_Request_Id"] = "".join(chr(rng.randrange(0x21, 0x7F)) for _ in range(rng.randint(1, 140)))
    kind = rng.random()
    if kind < 0.4:
        return request_bytes("GET", f"/shared?{rng.choice(TARGETS)}", **headers)
    if kind < 0.5:
        return request_bytes("GET", f"/shared?now={rng.randrange(3000)}", **headers)
    if kind < 0.85:
        body = rng.choice(BODIES) if rng.random() < 0.8 else b"x" * rng.randint(1, 16_384)
        return request_bytes("POST", "/posts", body, Authorization="x" * rng.choice([0, 10, 5000, 9000]), **headers)
    if kind < 0.9:
        return request_bytes("HEAD", "/shared?now", **headers)
    return rng.choice(UNUSUAL) if kind < 0.97 else rng.randbytes(50)


def test_random_requests_find_no_fault(sanitized: UwsApp) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng, sockets, sent = random.Random(seed), list[socket.socket](), 0
    until_s = time.monotonic() + SECONDS
    while time.monotonic() < until_s:
        while len(sockets) < CONNECTIONS:
            sockets.append(socket.create_connection(("127.0.0.1", sanitized.port)))
            sockets[-1].setblocking(False)
        one = rng.choice(sockets)
        data = any_request(rng)
        if rng.random() < 0.1:
            data = data[: rng.randint(1, len(data))]
        elif rng.random() < 0.1:
            data = b"".join([data, *(any_request(rng) for _ in range(rng.randint(1, 5)))])
        gone = rng.random() < 0.1
        try:
            sent += bool(one.send(data))
            if rng.random() < 0.02:
                one.shutdown(socket.SHUT_WR)
            if rng.random() < 0.5:
                one.recv(65_536)
        except BlockingIOError:
            pass
        except OSError:
            gone = True
        if gone:
            if rng.random() < 0.5:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            one.close()
            sockets.remove(one)
    for one in sockets:
        one.close()
    wait_until(sanitized.has_nothing_left, 10, "a request was left over")
    assert sent > 1000
    log = sanitized.log.read_text(errors="replace")
    assert not re.search("Sanitizer|runtime error|callback failed|AssertionError", log), log[-3000:]
