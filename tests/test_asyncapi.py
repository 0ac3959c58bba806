"""docs/asyncapi.yaml says what goes over the WebSocket: real messages, held against its schemas."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError

from server.errors import CloseCode
from server.events import MAX_PLAYER, MAX_SCORE
from server.messages import list_message, skipped_message
from server.subscription import LIMITS, MAX_MESSAGE_BYTES, MAX_NAMED, Ping, decode_message
from tests.alone import server_alone
from tests.client import new_player, post
from tests.services import ROOT, ServerProcess
from tests.wire import Wire

DOCUMENT = yaml.safe_load((ROOT / "docs/asyncapi.yaml").read_text())
SCHEMAS = DOCUMENT["components"]["schemas"]


def check(message: dict[str, Any]) -> str:
    """Hold a message against the schema of its type; returns the type."""
    schema = {"$ref": f"#/components/schemas/{message['type']}", "components": DOCUMENT["components"]}
    Draft202012Validator(schema).validate(message)
    return str(message["type"])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with server_alone(tmp_path_factory.mktemp("asyncapi")) as process:
        yield process


@pytest.mark.redis
def test_messages_of_a_connection_are_as_described(server: ServerProcess) -> None:
    player = new_player()
    assert post(server, player, MAX_SCORE).status == 200
    seen = set()
    with Wire(server.port) as wire:
        assert wire.upgrade(f"/live-updates?players={player}").status == 101
        wire.send_text(b"nonsense")
        wire.send_text(b'{"type":"ping"}')
        wanted = {"leaderboardUpdate", "scoreUpdate", "status", "error", "pong"}
        while not seen >= wanted:
            opcode, payload = wire.frame()
            assert opcode == 1
            seen.add(check(json.loads(payload)))
        later = new_player()
        assert post(server, later, 5).status == 200
        while later not in payload.decode():  # without Kafka, lists are read once a second
            _, payload = wire.frame()
            check(json.loads(payload))
        subscribe = {"type": "subscribe", "players": [later]}
        assert check(subscribe) == "subscribe"
        wire.send_text(json.dumps(subscribe).encode())
        while json.loads(payload) != {"type": "scoreUpdate", "board": "main", "playerId": later, "newScore": 5}:
            _, payload = wire.frame()
            check(json.loads(payload))


def test_rare_messages_are_as_described() -> None:
    whole = json.loads(list_message("main", 7, [("x" * MAX_PLAYER, -MAX_SCORE)], 12, resync=True))
    assert (check(whole), whole["resync"], whole["delayMs"]) == ("leaderboardUpdate", True, 12)
    assert check(json.loads(skipped_message(40))) == "scoreUpdatesSkipped"


@pytest.mark.parametrize(
    "message",
    [
        {"type": "leaderboardUpdate", "board": "main", "seq": 1},
        {"type": "scoreUpdate", "board": "main", "playerId": "", "newScore": 5},
        {"type": "scoreUpdate", "board": "main", "playerId": "a", "newScore": 2**53},
        {"type": "status", "live": 1},
        {"type": "status", "live": True, "more": 1},
        {"type": "subscribe", "players": "a"},
    ],
)
def test_other_messages_are_not(message: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        check(message)


def test_what_a_client_may_send_is_what_is_decoded() -> None:
    for kind in ("subscribe", "unsubscribe"):
        message = {"type": kind, "players": ["ann"]}
        assert check(message) == kind
        decoded = decode_message(json.dumps(message).encode())
        assert not isinstance(decoded, Ping)
        assert decoded.players == ["ann"]
    assert check({"type": "ping"}) == "ping"
    assert isinstance(decode_message(b'{"type":"ping"}'), Ping)
    with pytest.raises(msgspec.DecodeError):
        decode_message(b'{"type":"status","live":true}')


def test_limits_are_those_of_the_server() -> None:
    query = DOCUMENT["channels"]["liveUpdates"]["bindings"]["ws"]["query"]["properties"]
    assert tuple(query["limit"]["enum"]) == LIMITS
    assert SCHEMAS["leaderboardUpdate"]["properties"]["topScores"]["maxItems"] == LIMITS[-1]
    assert SCHEMAS["player"]["maxLength"] == MAX_PLAYER
    assert SCHEMAS["subscribe"]["properties"]["players"]["maxItems"] == MAX_NAMED
    assert f"{MAX_MESSAGE_BYTES // 1024} KiB each" in DOCUMENT["operations"]["follow"]["summary"]


def test_every_close_code_is_told() -> None:
    told = DOCUMENT["operations"]["watch"]["summary"] + (ROOT / "docs/live.md").read_text()
    for code in CloseCode:
        assert told.count(str(int(code))) >= 2, code
    assert (SCHEMAS["score"]["minimum"], SCHEMAS["score"]["maximum"]) == (-MAX_SCORE, MAX_SCORE)


def references(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        for name, value in part.items():
            if name == "$ref":
                yield value
            else:
                yield from references(value)
    elif isinstance(part, list):
        for value in part:
            yield from references(value)


def test_every_reference_leads_somewhere() -> None:
    found = list(references(DOCUMENT))
    assert len(found) > 20
    for reference in found:
        part = DOCUMENT
        for name in reference.removeprefix("#/").split("/"):
            part = part[name]
