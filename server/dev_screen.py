"""What `scoreboard dev` shows: what runs where, and a line to paste. Pure: it starts nothing and asks nobody."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Final

import psycopg.conninfo

from server.auth import signing_algorithm, token_for
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


def token(settings: Settings, subject: str) -> str:
    """A token for `subject` that a server with these settings accepts."""
    return token_for(settings, subject, ttl_s=TOKEN_TTL_S)


def without_password(url: str) -> str:
    """The address as it may be shown: as libpq reads it, since others find a password's end elsewhere."""
    parts = psycopg.conninfo.conninfo_to_dict(url)
    user, host, port, name = (str(parts.get(key, "")) for key in ("user", "host", "port", "dbname"))
    host = f"[{host}]" if ":" in host and "," not in host else host
    login = f"{user}:…@" if "password" in parts else f"{user}@" if user else ""
    return f"postgresql://{login}{host}{f':{port}' if port else ''}/{name}"
