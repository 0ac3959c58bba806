"""The JSON that goes over HTTP: what routes decode and encode, and what /openapi.json says of it.

Limits stand in `extra_json_schema`, which only describes: routes check them, in words that name the field and what
came. Knows no HTTP.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from server.errors import ProblemType
from server.events import MAX_PLAYER, MAX_SCORE

PLAYER: Final = {"minLength": 1, "maxLength": MAX_PLAYER, "pattern": r"^[^\u0000-\u001f\u007f-\u009f]*$"}
SCORE: Final = {"minimum": -MAX_SCORE, "maximum": MAX_SCORE}

PlayerName = Annotated[
    str, msgspec.Meta(description="No control characters.", examples=["player123"], extra_json_schema=PLAYER)
]
Points = Annotated[int, msgspec.Meta(examples=[5], extra_json_schema=SCORE)]


class Change(msgspec.Struct, rename="camel", gc=False):
    """The body of POST /update-score."""

    player_id: PlayerName
    score_delta: Points
    board: str | msgspec.UnsetType = msgspec.UNSET


class Result(msgspec.Struct, rename="camel", gc=False):
    """A change that was applied."""

    player_id: PlayerName
    new_score: Points


class Alive(msgspec.Struct):
    """The process answers."""

    alive: bool


class Ability(msgspec.Struct, omit_defaults=True):
    """Whether one thing works; `detail` says why not, `source` where from."""

    ok: bool
    detail: str | msgspec.UnsetType = msgspec.UNSET
    source: str | msgspec.UnsetType = msgspec.UNSET


class Readiness(msgspec.Struct):
    """What works."""

    ready: bool
    draining: bool
    read: Ability
    write: Ability
    live: Ability


class ProblemDocument(msgspec.Struct):
    """What went wrong (RFC 9457)."""

    type: Annotated[str, msgspec.Meta(extra_json_schema={"enum": [f"urn:scoreboard:{kind}" for kind in ProblemType]})]
    title: str
    status: Annotated[int, msgspec.Meta(extra_json_schema={"minimum": 400, "maximum": 599})]
    detail: str
