"""What schemathesis is not to send: headers that do not survive the way to the server as they were meant."""

from __future__ import annotations

import re
from typing import Any

import schemathesis

# The parser takes no other names, though RFC 9110 has more (docs/security.md).
NAME = re.compile(r"[0-9A-Za-z-]+")

VALUE = re.compile(r"(|[!-~]|[!-~].*[!-~])", re.DOTALL)


@schemathesis.hook
def filter_case(_context: Any, case: Any) -> bool:
    """Whether every header has a name that is read, and a value with ASCII at both ends: the parser strips the rest."""
    headers = (case.headers or {}).items()
    return all(NAME.fullmatch(name) and VALUE.fullmatch(str(value)) for name, value in headers)
