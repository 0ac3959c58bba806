"""Everything that can go wrong and be said out loud.

    ScoreboardError
    ├── ConfigError          the environment is wrong: the process does not start
    ├── UwsError             uWebSockets cannot run here, or the port is taken
    ├── NotReady             Redis cannot be trusted yet (policy, database away); tried again
    ├── TopicChanged         the Kafka topic is not the one that the stored offsets belong to
    └── Problem              an HTTP answer (RFC 9457)

WebSocket close codes stand at the end, split by what a client should do next. Knows no other module.
"""

from __future__ import annotations

import enum
import http
from typing import Final

import msgspec


class ScoreboardError(Exception):
    """The root of the errors this project raises on purpose."""


class ConfigError(ScoreboardError):
    """The environment asks for something impossible; the message names each variable."""


class UwsError(ScoreboardError):
    """uWebSockets cannot run on this machine, or cannot have the port it was given."""


class NotReady(ScoreboardError):
    """Redis may not be written yet; the message says why and what has to change."""


class TopicChanged(ScoreboardError):
    """The topic was made anew, so the offsets in the database mean nothing for it."""


_PROBLEM_TYPES: Final = {
    400: "invalid-request",
    401: "unauthorized",
    403: "forbidden",
    404: "not-found",
    405: "method-not-allowed",
    408: "request-timeout",
    413: "body-too-large",
    414: "target-too-long",
    415: "encoding-not-supported",
    417: "expectation-failed",
    422: "idempotency-key-reused",
    426: "upgrade-required",
    429: "rate-limited",
    431: "headers-too-large",
    500: "internal-error",
    501: "not-implemented",
    503: "not-applied",
    505: "version-not-supported",
}

PROBLEM_KINDS: Final = (*_PROBLEM_TYPES.values(), "outcome-unknown", "unavailable")
"""The last part of every problem `type` there is."""


class Problem(ScoreboardError):
    """An answer of `application/problem+json` (RFC 9457).

    `kind` is the last part of the problem `type`; it defaults to the one usual for the status.
    `headers` are (name, value) pairs; `close` ends the connection behind the answer.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        kind: str | None = None,
        headers: tuple[tuple[str, str], ...] = (),
        close: bool = False,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.kind = kind or _PROBLEM_TYPES[status]
        self.headers = headers
        self.close = close

    @property
    def title(self) -> str:
        """The status in words."""
        return http.HTTPStatus(self.status).phrase

    def body(self) -> bytes:
        """The JSON document of RFC 9457."""
        return msgspec.json.encode(
            {
                "type": f"urn:scoreboard:{self.kind}",
                "title": self.title,
                "status": self.status,
                "detail": self.detail,
            }
        )


def not_applied(detail: str, retry_after_s: int = 1) -> Problem:
    """503 for an update that certainly did not happen: free to retry."""
    return Problem(503, detail, headers=(("Retry-After", str(retry_after_s)),))


def outcome_unknown(detail: str, retry_after_s: int = 1) -> Problem:
    """503 for an update that may have happened: to be retried only with an Idempotency-Key."""
    retry = (("Retry-After", str(retry_after_s)),)
    return Problem(503, detail, kind="outcome-unknown", headers=retry)


class CloseCode(enum.IntEnum):
    """WebSocket close codes this server sends (RFC 6455, section 7.4.1)."""

    # Reconnect, with jitter.
    GOING_AWAY = 1001
    TRY_AGAIN_LATER = 1013
    # Do not reconnect with the same behaviour.
    POLICY_VIOLATION = 1008
