"""What `scoreboard dev` shows: what runs where, and a line to paste. Pure: it starts nothing and asks nobody."""

from __future__ import annotations

import json
import shlex
import time
import urllib.parse
from pathlib import Path
from typing import Any, Final

import jwt

from server.config import Settings

EXAMPLE_PLAYER: Final = "player123"
TOKEN_TTL_S: Final = 30 * 24 * 3600

Row = tuple[str, str, str]
"""(what, where, remark)"""


def screen(url: str, rows: list[Row], settings: Settings, data: Path) -> str:
    """The one screen; `data` is where the embedded stores keep theirs."""
    wide = max(len(where) for _, where, _ in rows)
    lines = ["", f"The scoreboard is live: {url}/", ""]
    lines += [f"  {what:<12}{where:<{wide}}  {remark}" for what, where, remark in rows]
    lines += ["", "Servers of your own instead: REDIS_HOST and REDIS_PORT, KAFKA_BROKERS, DATABASE_URL.", ""]
    lines += _curl(url, settings)
    lines += ["", f"Ctrl-C stops everything. The board is kept in {data}.", ""]
    return "\n".join(lines)


def _curl(url: str, settings: Settings) -> list[str]:
    if not signing_algorithm(settings):
        return ["No token is shown, for JWT_ALGORITHMS has none that a shared secret can sign."]
    body = json.dumps({"playerId": EXAMPLE_PLAYER, "scoreDelta": 5})
    headers = (f"Authorization: Bearer {token(settings, EXAMPLE_PLAYER)}", "Content-Type: application/json")
    words = ["curl", f"{url}/update-score", *(word for header in headers for word in ("-H", header)), "-d", body]
    return [f"Play as {EXAMPLE_PLAYER}:", "", shlex.join(words)]


def signing_algorithm(settings: Settings) -> str:
    """The algorithm to sign with; empty when the server takes none that a shared secret can sign."""
    return next((name for name in settings.jwt_algorithms if name.startswith("HS")), "")


def token(settings: Settings, subject: str) -> str:
    """A token for `subject` that a server with these settings accepts."""
    assert settings.jwt_secret is not None
    now_s = int(time.time())
    claims: dict[str, Any] = {"sub": subject, "iat": now_s, "exp": now_s + TOKEN_TTL_S}
    if settings.jwt_audience:
        claims["aud"] = settings.jwt_audience
    if settings.jwt_issuer:
        claims["iss"] = settings.jwt_issuer
    return jwt.encode(claims, settings.jwt_secret, algorithm=signing_algorithm(settings))


def without_password(url: str) -> str:
    """The URL as it may be shown."""
    parts = urllib.parse.urlsplit(url)
    if parts.password is None:
        return url
    return parts._replace(netloc=parts.netloc.replace(f":{parts.password}@", ":…@")).geturl()
