"""The log: readable lines on a terminal, and a JSON object a line anywhere else. Knows no secret, so it hides none."""

from __future__ import annotations

import datetime
import logging
import sys
import time
from typing import Final, Literal

import msgspec

Format = Literal["auto", "json", "text"]

_TEXT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_encode = msgspec.json.Encoder().encode


def configure(log_format: str = "auto", level: str = "info") -> None:
    """Log to standard error from now on, as LOG_FORMAT and LOG_LEVEL say."""
    if log_format == "auto":
        log_format = "text" if sys.stderr.isatty() else "json"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines() if log_format == "json" else logging.Formatter(_TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """logging: one line, whatever is in the message."""
        time_utc = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line = {
            "time": time_utc.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": record.process,
            "message": record.getMessage(),
        }
        if request_id := getattr(record, "request_id", ""):
            line["requestId"] = request_id
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        try:
            return _encode(line).decode()
        except UnicodeEncodeError:  # half a surrogate pair, out of somebody's JSON
            return _encode({name: _whole(value) for name, value in line.items()}).decode()


def _whole(value: object) -> object:
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


class Sparing:
    """Lets `burst` lines a second through, and counts the rest."""

    def __init__(self, burst: int = 5) -> None:
        self._burst = burst
        self._second = 0
        self._said = 0
        self._left_out = 0

    def admits(self) -> bool:
        """Whether to say one more now."""
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._said = second, 0
        self._said += 1
        if self._said > self._burst:
            self._left_out += 1
            return False
        return True

    def left_out(self) -> int:
        """How many were not said since this was last asked."""
        left_out, self._left_out = self._left_out, 0
        return left_out
