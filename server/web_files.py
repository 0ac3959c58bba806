"""The live page's files: read, filled in and compressed once at the start, answered from memory.

Knows of HTTP what a file needs (encodings, validators, the page's policy) and nothing of sockets or scores.
"""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path
from typing import Final

_WEB: Final = Path(__file__).with_name("web")
_INDEX: Final = "index.html"
_BOARDS: Final = b'<meta name="boards" content="">'
_TYPES: Final = {
    ".css": b"text/css; charset=utf-8",
    ".html": b"text/html; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".svg": b"image/svg+xml; charset=utf-8",
}

# 'self' covers ws: and wss: to the same host (CSP 3); Safari before 15.4 does not see it that way, and allowing
# `ws: wss:` for its sake would allow every host. Trusted Types make the browser refuse to turn text into markup.
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)

# Every file is asked for again and answered with 304: a page never runs with one old file among new ones.
_HEADERS: Final = (
    "\r\nCache-Control: no-cache\r\nVary: Accept-Encoding\r\nX-Content-Type-Options: nosniff"
    f"\r\nReferrer-Policy: no-referrer\r\nContent-Security-Policy: {POLICY}"
).encode()


class WebFile:
    """One file, in two encodings; each has a validator of its own, as strong ones must (RFC 9110, 8.8.1)."""

    def __init__(self, path: str, content_type: bytes, content: bytes) -> None:
        self.path = path
        self.content_type = content_type
        self._plain = content
        self._gzip = gzip.compress(content, mtime=0)  # the same bytes, so the same validator, at every start
        digest = hashlib.sha256(content).hexdigest()[:20]
        self._plain_tag = f'"{digest}"'.encode()
        self._gzip_tag = f'"{digest}-gzip"'.encode()

    def answer(self, accept_encoding: bytes, if_none_match: bytes) -> tuple[bytes, bytes | None]:
        """(status line with headers, body) for these request headers; no body when the client has it already."""
        body, tag, encoding = self._plain, self._plain_tag, b""
        if _accepts_gzip(accept_encoding):
            body, tag, encoding = self._gzip, self._gzip_tag, b"\r\nContent-Encoding: gzip"
        headers = b"\r\nETag: " + tag + _HEADERS
        if _matches(if_none_match, tag):
            return b"304 Not Modified" + headers, None
        return b"200 OK" + headers + encoding, body


def load(boards: tuple[str, ...], default_board: str) -> list[WebFile]:
    """Every file of the page; index.html at `/`, with the boards there are in it, the default one first."""
    names = [default_board, *(board for board in boards if board != default_board)]
    files = []
    for file in sorted(_WEB.iterdir()):
        content, path = file.read_bytes(), f"/{file.name}"
        if file.name == _INDEX:
            assert _BOARDS in content, f"expected {_BOARDS.decode()} in {_INDEX}"
            # Filled in here rather than asked for: one request less before the first row, and no endpoint to cache.
            content, path = content.replace(_BOARDS, _BOARDS.replace(b'""', f'"{",".join(names)}"'.encode())), "/"
        files.append(WebFile(path, _TYPES[file.suffix], content))
    return files


def _accepts_gzip(accept_encoding: bytes) -> bool:
    for each in accept_encoding.lower().split(b","):
        coding, _, weight = each.replace(b" ", b"").partition(b";q=")
        if coding == b"gzip":
            return weight.strip(b"0.") != b"" or not weight
    return False


def _matches(if_none_match: bytes, tag: bytes) -> bool:
    """Weakly, as If-None-Match is compared (RFC 9110, 13.1.2)."""
    tags = [each.strip().removeprefix(b"W/") for each in if_none_match.split(b",")]
    return tag in tags or b"*" in tags
