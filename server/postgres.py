"""Connecting to PostgreSQL: what every connection of every command has in common.

What DATABASE_URL says, and libpq's environment (PGOPTIONS, PGSSLMODE, PGPASSFILE and the rest), counts for every
command alike. We only fill in what nobody said. Nothing here needs a session of our own, so that a pooler may hand
each transaction to another one: no startup `options`, no SET, no statement that is prepared in the server.
"""

from __future__ import annotations

import os
from typing import Any, Final

from psycopg.conninfo import conninfo_to_dict

CONNECT_WITHIN_S: Final = 5
"""For one host; a name with several addresses, or several hosts, gets as much for each."""

# A host that vanished is noticed within 20 s of silence; the sender of a statement notices it after as long.
_DEFAULTS: Final[dict[str, Any]] = {
    "keepalives": 1,
    "keepalives_idle": 5,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}


def parameters(database_url: str, role: str) -> dict[str, Any]:
    """The keyword arguments of every `connect`; `role` is the application's name, where none was given.

    Raises psycopg.ProgrammingError for a URL that libpq cannot read.
    """
    given = conninfo_to_dict(database_url)
    defaults: dict[str, Any] = {"fallback_application_name": role}
    # A service file has defaults of its own, and libpq lets ours, being explicit, win over them.
    if "service" not in given and "PGSERVICE" not in os.environ:
        defaults |= _DEFAULTS
        if "PGCONNECT_TIMEOUT" not in os.environ:
            defaults["connect_timeout"] = CONNECT_WITHIN_S
    # Names of players are any text at all, whatever encoding the environment prefers.
    return {**defaults, **given, "client_encoding": "UTF8", "prepare_threshold": None}
