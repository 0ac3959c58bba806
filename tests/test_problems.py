"""Whatever the server can answer is listed: each problem raised has a type of the enum, and OpenAPI names it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import msgspec

import server
from server.errors import USUAL_TYPES, Problem, ProblemType
from server.openapi import document

FOLDER = Path(server.__file__).parent


def raised() -> Iterator[tuple[str, ProblemType]]:
    """Where a Problem is made, and of which type it is."""
    for file in sorted(FOLDER.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Problem":
                place = f"{file.name}:{node.lineno}"
                status, *_ = node.args
                kinds = [keyword.value for keyword in node.keywords if keyword.arg == "kind"]
                assert isinstance(status, ast.Constant), f"{place}: expected a status, got {ast.unparse(status)}"
                if not kinds:
                    assert status.value in USUAL_TYPES, f"{place}: expected a status of USUAL_TYPES"
                    yield place, USUAL_TYPES[int(str(status.value))]
                    continue
                (kind,) = kinds
                assert isinstance(kind, ast.Attribute), f"{place}: expected a ProblemType, got {ast.unparse(kind)}"
                assert ast.unparse(kind.value) == "ProblemType", place
                yield place, ProblemType[kind.attr]


def test_every_problem_that_is_raised_has_a_type_that_openapi_names() -> None:
    described = msgspec.json.decode(document(["main"], {}))["components"]["schemas"]["ProblemDocument"]
    named = set(described["properties"]["type"]["enum"])
    found = list(raised())
    assert len(found) > 20
    for place, kind in found:
        assert f"urn:scoreboard:{kind}" in named, place
    assert named == {f"urn:scoreboard:{kind}" for kind in ProblemType}


def test_no_type_is_listed_that_nobody_raises() -> None:
    assert {kind for _, kind in raised()} == set(ProblemType)


def test_type_is_written_as_a_urn() -> None:
    problem = Problem(503, "full", kind=ProblemType.TOO_MANY_CONNECTIONS)
    assert msgspec.json.decode(problem.body())["type"] == "urn:scoreboard:too-many-connections"
    assert msgspec.json.decode(Problem(400, "no").body())["type"] == "urn:scoreboard:invalid-request"
