"""/openapi.json says what the server does: schemathesis asks it, and so do a few requests by hand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from server.database import TOP_LIMIT
from server.events import MAX_PLAYER, MAX_SCORE
from tests.alone import server_alone
from tests.client import get, new_player, post, post_body, token
from tests.services import ROOT, ServerProcess
from tests.wire import Answer, Wire, once

pytestmark = pytest.mark.redis
BOARDS = ("main", "weekly")
SETTINGS = {
    "BOARDS": ",".join(BOARDS),
    "AUTH_FAILURES_PER_MINUTE": "0",
    "RATE_LIMIT_PER_SECOND": "2",
    "RATE_LIMIT_BURST": "3",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with server_alone(tmp_path_factory.mktemp("openapi"), SETTINGS) as process:
        yield process


@pytest.fixture(scope="module")
def document(server: ServerProcess) -> dict[str, Any]:
    return dict(get(server, "/openapi.json").json())


def check(document: dict[str, Any], method: str, path: str, answer: Answer) -> None:
    """Hold an answer against what is said of that operation."""
    said = document["paths"][path][method]["responses"][str(answer.status)]
    for name, reference in said["headers"].items():
        header = document["components"]["headers"][reference["$ref"].rsplit("/", 1)[1]]
        assert not header["required"] or name.lower() in answer.headers, name
    (content_type,) = said["content"]
    assert answer.headers["content-type"] == content_type
    schema = {**said["content"][content_type]["schema"], "components": document["components"]}
    Draft202012Validator(schema).validate(answer.json())


def test_schemathesis_finds_nothing_undocumented(server: ServerProcess, tmp_path: Path) -> None:
    command = [Path(sys.executable).with_name("st"), "--config-file", ROOT / "tests/schemathesis.toml", "run"]
    command += [f"{server.url}/openapi.json", "--phases", "examples,coverage,fuzzing", "--max-examples", "3"]
    command += ["--max-time", "40", "--generation-deterministic", "-H", f"Authorization: Bearer {writer()}"]
    done = subprocess.run(
        list(map(str, command)),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    operations = re.search(r"Selected: (\d+)/\d+\s+Tested: (\d+)", done.stdout)
    assert operations, done.stdout
    assert operations[1] == operations[2] != "0", done.stdout
    assert server.running


def writer() -> str:
    return token("game", "scores:write")


def test_every_status_of_an_update_is_as_described(server: ServerProcess, document: dict[str, Any]) -> None:
    ada, bob = new_player(), new_player()
    bearer = {"Authorization": f"Bearer {writer()}"}
    answers = [
        post(server, bob, subject="game", scope="scores:write"),
        post(server, bob, subject=ada),
        post(server, bob, board="nowhere"),
        post(server, bob, 2**53),
        post_body(server, b"{}"),
        post_body(server, b"{", **bearer),
        post_body(server, b" " * 20_000, **bearer),
        *(
            post_body(
                server, b'{"playerId":"%s","scoreDelta":%d}' % (bob.encode(), delta), **bearer, Idempotency_Key="k"
            )
            for delta in (1, 1, 2)
        ),
        *(post(server, ada) for _ in range(6)),
    ]
    for answer in answers:
        check(document, "post", "/update-score", answer)
    assert {answer.status for answer in answers} == {200, 400, 401, 403, 404, 413, 422, 429}
    assert "idempotent-replayed" in answers[8].headers


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/leaderboard", 200),
        ("/leaderboard?limit=0", 400),
        ("/leaderboard?board=nowhere", 404),
        ("/healthz", 200),
        ("/readyz", 200),
        ("/openapi.json", 200),
        ("/live-updates", 426),
        ("/live-updates?limit=7", 426),
    ],
)
def test_other_answers_are_as_described(
    server: ServerProcess, document: dict[str, Any], path: str, status: int
) -> None:
    answer = get(server, path)
    assert answer.status == status
    check(document, "get", path.partition("?")[0], answer)


@pytest.mark.parametrize(("query", "status"), [("limit=7", 400), ("board=nowhere", 404)])
def test_refused_upgrade_is_as_described(
    server: ServerProcess, document: dict[str, Any], query: str, status: int
) -> None:
    with Wire(server.port) as wire:
        answer = wire.upgrade(f"/live-updates?{query}")
    assert answer.status == status
    check(document, "get", "/live-updates", answer)


def test_limits_are_those_that_are_checked(document: dict[str, Any]) -> None:
    change = document["components"]["schemas"]["Change"]
    assert change["required"] == ["playerId", "scoreDelta"]
    assert change["properties"]["playerId"]["maxLength"] == MAX_PLAYER
    assert change["properties"]["scoreDelta"]["maximum"] == MAX_SCORE == -change["properties"]["scoreDelta"]["minimum"]
    assert document["components"]["schemas"]["Board"]["enum"] == list(BOARDS)
    (limit,) = (each for each in document["paths"]["/leaderboard"]["get"]["parameters"] if each["name"] == "limit")
    assert limit["schema"]["maximum"] == TOP_LIMIT


def test_every_path_answers_each_method_described(server: ServerProcess, document: dict[str, Any]) -> None:
    for path, operations in document["paths"].items():
        for method in operations:
            status = once(server.port, method.upper(), path, b"" if method == "post" else None).status
            assert str(status) in operations[method]["responses"], f"{method} {path}: {status}"


def test_description_is_kept_by_clients(server: ServerProcess) -> None:
    first = get(server, "/openapi.json")
    assert first.headers["content-type"] == "application/json"
    assert get(server, "/openapi.json", If_None_Match=first.headers["etag"]).status == 304


def test_empty_board_is_no_board(server: ServerProcess) -> None:
    """It was the default board in a body, and unknown in a query."""
    assert post(server, new_player(), board="").status == 404
    assert get(server, "/leaderboard?board=").status == 404
