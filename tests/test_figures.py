"""Limits that stand in several places are the same in all: in C, in Python, and in what is written about them."""

from __future__ import annotations

import re

import pytest

from server.events import BOARD_NAME
from server.routes import MAX_BODY_BYTES
from server.subscription import MAX_MESSAGE_BYTES
from server.uws import _REFUSALS, BODY_TIMEOUT_S, MAX_TARGET_BYTES
from tests.services import ROOT

WIRE = (ROOT / "server/uws_wire.c").read_text()


def of_wire(name: str) -> int:
    """A limit of server/uws_wire.c."""
    return int(re.findall(rf"enum {{ {name} = (\d+) }};", WIRE)[0])


def kib(size_bytes: int) -> str:
    return f"{size_bytes // 1024} KiB"


def test_c_and_python_know_the_same_limits_of_a_request() -> None:
    assert of_wire("MAX_TARGET") == MAX_TARGET_BYTES
    (head,) = (refusal.detail for refusal in _REFUSALS if refusal.status == 431)
    lines, size_bytes = of_wire("MAX_HEAD_LINES"), of_wire("MAX_HEAD")
    assert head == f"expected at most {lines} header lines, and {size_bytes} bytes of them"


HEAD = kib(of_wire("MAX_HEAD"))
WRITTEN = {
    "README.md": [
        f"More than {of_wire('MAX_HEAD_LINES')} headers, or {HEAD} of them, get 431",
        f"a path and query over {MAX_TARGET_BYTES} bytes get 414",
        f"| 408 | the body took more than {BODY_TIMEOUT_S:g} s",
        f"| 413 | a body over {kib(MAX_BODY_BYTES)} |",
        f"up to {kib(of_wire('MAX_WAITING'))} of them",
    ],
    "docs/live.md": [
        f"Path and query may have {MAX_TARGET_BYTES} bytes",
        f"Address and headers, cookies included, may have {HEAD} together",
        f"A message has at most {kib(MAX_MESSAGE_BYTES)}",
    ],
    "docs/security.md": [
        f"over {MAX_TARGET_BYTES} bytes 414",
        f"body over {kib(MAX_BODY_BYTES)}",
        f"a message over {kib(MAX_MESSAGE_BYTES)}",
        f"at most {HEAD} of a head that is not complete, and {kib(of_wire('MAX_WAITING'))} of requests",
    ],
    "docs/asyncapi.yaml": [f'{{type: string, pattern: "^{BOARD_NAME.pattern}$"', f"{kib(MAX_MESSAGE_BYTES)} each"],
    "server/openapi.py": [f"{of_wire('MAX_HEAD_LINES')} header lines or {HEAD} of them", f"{MAX_TARGET_BYTES} bytes"],
}


@pytest.mark.parametrize("document", WRITTEN)
def test_figures_that_are_written_down_are_those_of_the_code(document: str) -> None:
    text = (ROOT / document).read_text()
    for words in WRITTEN[document]:
        assert words in text


def test_every_test_that_the_page_on_security_names_is_there() -> None:
    page = (ROOT / "docs/security.md").read_text()
    tests = "".join(path.read_text() for path in sorted((ROOT / "tests").glob("test_*.py")))
    there = set(re.findall(r"^def (test_\w+)\(", tests, re.MULTILINE))
    named = set(re.findall(r"`(test_\w+)`", page))
    assert named
    assert named <= there
    assert all((ROOT / path).exists() for path in re.findall(r"`(tests/\w+\.py)`", page))
