"""The files of the live page: read once at start, kept by browsers for as long as they do not change.

Knows paths, types, encodings and what a page may do; nothing of scores.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from server.answers import NO_STORE
from server.errors import ScoreboardError
from server.uws import Request

WEB: Final = Path(__file__).with_name("web")
MAX_LIST_BYTES: Final = 1024
"""Longest Accept-Encoding or If-None-Match to look at, for each part of a list takes time; browsers send 40 bytes."""

BOARDS_MARK: Final = b'<meta name="boards" content="">'
"""What index.html has where the names of the boards belong."""

# A type that is not here is refused at start: with nosniff, a browser would do nothing with such a file. The
# system's own table would do for most, and differs between machines.
_TYPES: Final = {
    ".css": b"text/css; charset=utf-8",
    ".html": b"text/html; charset=utf-8",
    ".ico": b"image/x-icon",
    ".js": b"text/javascript; charset=utf-8",
    ".json": b"application/json",
    ".mjs": b"text/javascript; charset=utf-8",
    ".png": b"image/png",
    ".svg": b"image/svg+xml",
    ".txt": b"text/plain; charset=utf-8",
    ".webmanifest": b"application/manifest+json",
    ".woff2": b"font/woff2",
}

# 'self' covers a WebSocket to the same host (CSP 3). Safari before 15.4 (2022) does not think so and shows no live
# board: naming the host would mean to trust the Host header, or the proxy in front to leave it alone. Trusted Types
# have the browser itself refuse to make markup of a text, whatever the page's script tries.
POLICY: Final = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; font-src 'self'; connect-src 'self'; "
    b"manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    b"require-trusted-types-for 'script'; trusted-types 'none'"
)

# no-cache: kept, but asked for each time; most answers are then a 304, and a new release is seen at once.
_ALWAYS: Final = (
    b"\r\nCache-Control: no-cache\r\nVary: Accept-Encoding\r\nX-Content-Type-Options: nosniff"
    b"\r\nReferrer-Policy: no-referrer\r\nContent-Security-Policy: " + POLICY
)


@dataclasses.dataclass(frozen=True, slots=True)
class Encoded:
    """A file as it is sent: `lines` are header lines of its encoding, each after a CRLF."""

    body: bytes
    etag: bytes
    lines: bytes = b""


class WebFile:
    """One file, plain and, where that is smaller, compressed."""

    def __init__(self, content: bytes, content_type: bytes) -> None:
        self.content_type = content_type
        digest = hashlib.sha256(content).hexdigest()[:32].encode()
        self.plain = Encoded(content, b'"%s"' % digest)
        self.gzipped: Encoded | None = None
        compressed = gzip.compress(content, 9, mtime=0)
        if len(compressed) < len(content):
            # A strong ETag stands for bytes, and these are others.
            self.gzipped = Encoded(compressed, b'"%s-gz"' % digest, b"\r\nContent-Encoding: gzip")

    def answer(self, request: Request) -> None:
        """Answer GET or HEAD: 200, or 304 when the client has it."""
        request.head_lines = request.head_lines.removeprefix(NO_STORE)
        encoded = self.plain
        if self.gzipped and accepts_gzip(request.joined_header(b"accept-encoding")):
            encoded = self.gzipped
        shared = b"\r\nETag: " + encoded.etag + _ALWAYS
        if matches(request.joined_header(b"if-none-match"), encoded.etag):
            request.answer(b"304 Not Modified" + shared, None, b"")
        else:
            request.answer(b"200 OK" + shared + encoded.lines, encoded.body, self.content_type)


def read_files(web: Path, boards: Sequence[str]) -> dict[str, WebFile]:
    """Every file below `web` by its path in a URL; index.html is `/`, and knows the names of the boards.

    Raises ScoreboardError for a file that cannot be served.
    """
    files = {}
    for file in sorted(web.rglob("*")):
        name = file.relative_to(web).as_posix()
        if file.is_dir() or file.name.startswith("."):  # an editor's
            continue
        content_type = _TYPES.get(file.suffix)
        if content_type is None:
            raise ScoreboardError(f"{file}: expected one of {', '.join(_TYPES)}")
        content = file.read_bytes()
        if name == "index.html":
            files["/"] = WebFile(_with_boards(content, boards), content_type)
        else:
            files[f"/{name}"] = WebFile(content, content_type)
    return files


def _with_boards(page: bytes, boards: Sequence[str]) -> bytes:
    if page.count(BOARDS_MARK) != 1:
        raise ScoreboardError(f"index.html: expected one {BOARDS_MARK.decode()}, got {page.count(BOARDS_MARK)}")
    filled = f'<meta name="boards" content="{html.escape(",".join(boards))}">'
    return page.replace(BOARDS_MARK, filled.encode())


def accepts_gzip(accept_encoding: bytes) -> bool:
    """Whether an Accept-Encoding allows gzip (RFC 9110, 12.5.3)."""
    if len(accept_encoding) > MAX_LIST_BYTES:
        return False
    weights = {}
    for each in accept_encoding.lower().split(b","):
        coding, _, weight = each.partition(b";")
        weights[coding.strip()] = weight.replace(b" ", b"")
    asked = weights.get(b"gzip", weights.get(b"*"))
    return asked is not None and not re.fullmatch(rb"q=0(\.0*)?", asked)


def matches(if_none_match: bytes, etag: bytes) -> bool:
    """Whether an If-None-Match names the ETag, weakly or not, among others, or as `*` (RFC 9110, 13.1.2)."""
    if len(if_none_match) > MAX_LIST_BYTES:
        return False
    return if_none_match.strip() == b"*" or etag in re.findall(rb'"[^"]*"', if_none_match)
