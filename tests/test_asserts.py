"""`python -O` leaves asserts out: what must hold is checked by something else."""

from __future__ import annotations

import ast
import subprocess
import sys

from tests.services import ROOT

PROGRAM = """
import asyncio
from server import uws
from server.errors import CloseCode, UwsError
from server.uws_native import Waiting

def refused(action):
    try:
        action()
    except UwsError as error:
        print(error)
        return
    raise SystemExit("nothing was refused")

async def main():
    server = uws.Server()
    request = uws.Request(server, None, None, None)
    refused(lambda: request.header(b"host"))
    refused(lambda: request.joined_header(b"host"))
    refused(lambda: request.target)
    refused(lambda: request.method)
    refused(lambda: uws.Socket(None, None, None).end(CloseCode.GOING_AWAY, b""))
    refused(lambda: server.websocket("/x", None, max_message_bytes=1, max_backpressure_bytes=1, idle_timeout_s=7))
    refused(lambda: server.waiting.answer_posts([], [], b"200 OK" + b"x" * 5000))
    return 0

assert False, "expected python -O"
uws.run(main())
"""


def test_asserts_only_help_the_type_checker() -> None:
    others = [
        f"{file.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        for file in sorted([*ROOT.glob("server/**/*.py"), *ROOT.glob("sync/**/*.py")])
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Assert) and not ast.unparse(node).endswith(" is not None")
    ]
    assert others == []


def test_misuse_of_c_is_refused_without_asserts() -> None:
    done = subprocess.run([sys.executable, "-O", "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 7
    assert "callback failed" not in done.stderr
