"""The JSON that goes over HTTP: what routes decode and encode, and what /openapi.json says of it.

Limits stand in `extra_json_schema`, which only describes: routes check them, in words that name the field and what
came. Knows no HTTP.
"""

from __future__ import annotations

import re
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


# A number of RFC 8259, section 6, that is not spelled as an integer.
_DECIMAL: Final = re.compile(rb"(-?)(0|[1-9][0-9]*)(?:\.([0-9]+))?(?:[eE]([+-]?)([0-9]+))?")
_MOST_DIGITS: Final = len(str(MAX_SCORE))


def whole_number(text: bytes) -> int | None:
    """The integer that `text` spells in any way of RFC 8259, exactly; None when it spells none.

    An integer with more digits than MAX_SCORE comes as MAX_SCORE + 1 or its negative. No double is involved, and no
    large power of ten is worked out.
    """
    match = _DECIMAL.fullmatch(text)
    if match is None:
        return None
    sign, whole, fraction = match[1], match[2], match[3] or b""
    digits = (whole + fraction).lstrip(b"0")
    if not digits:
        return 0
    significant = digits.rstrip(b"0")
    # No body holds a fraction of a million digits, so of a larger exponent only the sign matters.
    exponent = min(int((match[5] or b"").lstrip(b"0")[:7] or b"0"), 1_000_000)
    power = (-exponent if match[4] == b"-" else exponent) - len(fraction) + len(digits) - len(significant)
    if power < 0:
        return None
    if len(significant) + power > _MOST_DIGITS:
        return -MAX_SCORE - 1 if sign else MAX_SCORE + 1
    return int(sign + significant + b"0" * power)


class Change(msgspec.Struct, rename="camel", gc=False):
    """The body of POST /update-score."""

    player_id: PlayerName
    score_delta: Points
    board: str | msgspec.UnsetType = msgspec.UNSET


class SpelledChange(msgspec.Struct, rename="camel", gc=False):
    """A Change whose number is still text, for what msgspec does not take for an integer."""

    player_id: str
    score_delta: msgspec.Raw
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
