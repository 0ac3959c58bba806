"""GET /openapi.json: OpenAPI 3.1, made at start of the types and limits that requests are checked with.

Each operation lists every status it can answer with; what no operation can list (405, 404 of other paths, what the
parser refuses by itself) stands in `info.description`. Pure: knows no connection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from server.bodies import Alive, Change, ProblemDocument, Readiness, Result
from server.database import TOP_LIMIT
from server.keys import default_board
from server.pages import Entity
from server.subscription import LIMITS, MAX_NAMED

OPENAPI_PATH: Final = "/openapi.json"
MAX_IDEMPOTENCY_KEY: Final = 128
API_VERSION: Final = "1"
"""Of what clients may rely on; the program has a version of its own."""

_DESCRIPTION: Final = """\
Errors are `application/problem+json` (RFC 9457). On every path: another method is 405 with `Allow`, OPTIONS is 204
(CORS preflight); any other path is 404; a path and query of more than 8192 bytes are 414. Every answer that may change
has `Cache-Control: no-store`, and files have an `ETag`. Watching the board live is described in docs/live.md and
docs/asyncapi.yaml.

What is no request of HTTP/1.0 or HTTP/1.1 is refused before there is an operation to ask, and the connection ends:
400; 417 for an expectation other than 100-continue; 431 for more than 48 header lines or 16 KiB of them; 501 for a
Transfer-Encoding other than chunked; 505. Headers whose names have more than letters, digits and hyphens are not read.
Methods that are not of RFC 9110 and 5789 are 404, in HTML."""

Json = dict[str, Any]

_TEXT: Final = {"schema": {"type": "string"}}
_WHOLE: Final = {"schema": {"type": "integer", "minimum": 1}}
_HEADERS: Final[dict[str, Json]] = {
    "Accept-Encoding": {"description": "What a body may be encoded in.", "schema": {"const": "identity"}},
    "Allow": {"description": "The methods there are.", **_TEXT},
    "ETag": {"description": "Changes with the content.", **_TEXT},
    "Idempotent-Replayed": {
        "description": "This is the answer kept for the Idempotency-Key: nothing was counted now.",
        "schema": {"const": "true"},
    },
    "RateLimit": {"description": "What is left, and seconds until there is more.", **_TEXT},
    "RateLimit-Policy": {"description": "Updates at once (q) and the window in seconds (w).", **_TEXT},
    "Retry-After": {"description": "Seconds to wait.", **_WHOLE},
    "Scoreboard-Source": {
        "description": "`database`: Redis cannot be read, this is from the database.",
        "schema": {"const": "database"},
    },
    "Sec-WebSocket-Version": {"description": "Of the protocol (RFC 6455).", "schema": {"const": "13"}},
    "Upgrade": {"description": "The protocol expected.", "schema": {"const": "websocket"}},
    "WWW-Authenticate": {"description": "What token is expected (RFC 6750).", **_TEXT},
    "X-Request-Id": {"description": "What the log calls this request.", **_TEXT},
}
_NOT_ALWAYS: Final = ("Idempotent-Replayed", "Scoreboard-Source", "RateLimit", "RateLimit-Policy")


def document(boards: Sequence[str], files: Mapping[str, str]) -> bytes:
    """The description as JSON; `files` are the content types of the live page's files, by path."""
    types = (Change, Result, Entity, Alive, Readiness, ProblemDocument)
    _, schemas = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    board = {"type": "string", "enum": list(boards), "default": default_board(tuple(boards))}
    schemas["Change"]["properties"]["board"] = {"$ref": "#/components/schemas/Board"}
    schemas["Board"] = board
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {"title": "Scoreboard", "version": API_VERSION, "description": _DESCRIPTION},
            "paths": _paths(files),
            "components": {
                "schemas": schemas,
                "headers": {name: {"required": name not in _NOT_ALWAYS, **each} for name, each in _HEADERS.items()},
                "securitySchemes": {"token": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}},
            },
        }
    )


def _paths(files: Mapping[str, str]) -> Json:
    board = _query("board", "Which board.", {"$ref": "#/components/schemas/Board"})
    length = {"type": "integer", "minimum": 1, "maximum": TOP_LIMIT, "default": 10}
    rows = {"type": "array", "maxItems": TOP_LIMIT, "items": _ref("Entity")}
    paths = {
        "/update-score": {"post": _update()},
        "/leaderboard": _readable(
            "leaderboard",
            "The first players of a board, highest score first.",
            {
                "200": _answer("The rows.", "application/json", rows, "Scoreboard-Source"),
                "400": _problem("`limit` is out of range."),
                "404": _problem("No such board."),
                "503": _problem("Neither Redis nor the database can be read.", "Retry-After"),
            },
            [_query("limit", "How many rows.", length), board],
        ),
        "/healthz": _readable("healthz", "The process is alive.", {"200": _json("Alive", "It is.")}),
        "/readyz": _readable(
            "readyz",
            "What works.",
            {
                "200": _json("Readiness", "At least reading works."),
                "503": _json("Readiness", "Draining, or nothing can be read.", "Retry-After"),
            },
        ),
        "/metrics": _readable(
            "metrics",
            "Measurements for Prometheus.",
            {"200": _answer("Its text format.", "text/plain; version=0.0.4; charset=utf-8", {"type": "string"})},
        ),
        "/live-updates": {"get": _live(board)},
        OPENAPI_PATH: _readable("openapi", "This.", _file("application/json", {"type": "object"})),
    }
    for path, content_type in files.items():
        paths[path] = _readable(f"file {path}", "Part of the live page.", _file(content_type, {}))
    for operations in paths.values():
        operations["options"] = {"summary": "CORS preflight.", "responses": {"204": _answer("What is allowed.")}}
    return paths


def _update() -> Json:
    key = {"type": "string", "pattern": rf"^[\x21-\x7e]{{0,{MAX_IDEMPOTENCY_KEY}}}$"}
    return {
        "operationId": "updateScore",
        "summary": "Add to a player's score.",
        "security": [{"token": []}],
        "parameters": [
            {
                "name": "Idempotency-Key",
                "in": "header",
                "description": "Makes it safe to send the same update again. An empty one counts as none.",
                "schema": key,
            }
        ],
        "requestBody": {"required": True, "content": {"application/json": {"schema": _ref("Change")}}},
        "responses": {
            "200": _json("Result", "Applied once, and kept.", "Idempotent-Replayed"),
            "400": _problem("Not JSON, a field is missing, of the wrong type or out of range."),
            "401": _problem("No token, or one that is not valid.", "WWW-Authenticate"),
            "403": _problem("The token may not write that player.", "WWW-Authenticate"),
            "404": _problem("No such board."),
            "408": _problem("The body took too long to arrive."),
            "413": _problem("The body is over 16 KiB."),
            "414": _TOO_LONG,
            "415": _problem("The body has a Content-Encoding.", "Accept-Encoding"),
            "422": _problem("The Idempotency-Key came with another payload before."),
            "429": _problem("Too many updates or bad tokens.", "Retry-After", "RateLimit", "RateLimit-Policy"),
            "500": _problem("A fault of ours; `detail` has the id it is logged with."),
            "503": _problem(
                "Redis cannot be written. `type` tells: `not-applied` may be retried freely, `outcome-unknown` only "
                "with an Idempotency-Key.",
                "Retry-After",
            ),
        },
    }


def _live(board: Json) -> Json:
    names = {"type": "string", "description": f"At most {MAX_NAMED} player ids, separated by commas."}
    return {
        "operationId": "liveUpdates",
        "summary": "A WebSocket: docs/asyncapi.yaml.",
        "parameters": [
            board,
            _query("limit", "Length of the list.", {"enum": list(LIMITS), "default": LIMITS[0]}),
            _query("scores", "Which players' changes.", {"enum": ["all", "none"], "default": "all"}),
            _query("players", "Players to follow by name.", names),
        ],
        "responses": {
            "101": _answer("The connection is a WebSocket now."),
            "400": _problem("A parameter is out of range, or the handshake is none of RFC 6455."),
            "403": _problem("Pages of that origin may not watch."),
            "404": _problem("No such board."),
            "414": _TOO_LONG,
            "426": _problem(
                "This was no WebSocket handshake, or one of another version.", "Upgrade", "Sec-WebSocket-Version"
            ),
            "500": _problem("A fault of ours; `detail` has the id it is logged with."),
            "503": _problem("Restarting, or too many connections.", "Retry-After"),
        },
    }


def _readable(operation: str, summary: str, responses: Json, parameters: Sequence[Json] = ()) -> Json:
    """GET and HEAD, which answers the same without a body."""
    responses = {
        **responses,
        "414": _TOO_LONG,
        "500": _problem("A fault of ours; `detail` has the id it is logged with."),
    }
    heads = {
        status: {name: part for name, part in answer.items() if name != "content"}
        for status, answer in responses.items()
    }
    shared = {"summary": summary, "parameters": list(parameters)}
    return {
        "get": {"operationId": operation, **shared, "responses": responses},
        "head": {"operationId": f"{operation} head", **shared, "responses": heads},
    }


def _file(content_type: str, schema: Json) -> Json:
    known = _answer("The client has it already.", "", None, "ETag")
    return {"200": _answer("The file.", content_type, schema, "ETag"), "304": known}


def _query(name: str, description: str, schema: Json) -> Json:
    return {"name": name, "in": "query", "description": description, "schema": schema}


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(name: str, description: str, *headers: str) -> Json:
    return _answer(description, "application/json", _ref(name), *headers)


def _problem(description: str, *headers: str) -> Json:
    return _answer(description, "application/problem+json", _ref("ProblemDocument"), *headers)


def _answer(description: str, content_type: str = "", schema: Json | None = None, *headers: str) -> Json:
    answer: Json = {"description": description, "headers": {}}
    for name in (*headers, "X-Request-Id"):
        answer["headers"][name] = {"$ref": f"#/components/headers/{name}"}
    if content_type:
        answer["content"] = {content_type: {"schema": schema}}
    return answer


_TOO_LONG: Final = _problem("Path and query are over 8192 bytes.")
