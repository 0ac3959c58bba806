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


class ProblemType(enum.StrEnum):
    """The last part of every problem `type` there is; /openapi.json lists them."""

    INVALID_REQUEST = "invalid-request"
    UNAUTHORIZED = "unauthorized"
    FORBIDDEN = "forbidden"
    NOT_FOUND = "not-found"
    METHOD_NOT_ALLOWED = "method-not-allowed"
    REQUEST_TIMEOUT = "request-timeout"
    BODY_TOO_LARGE = "body-too-large"
    TARGET_TOO_LONG = "target-too-long"
    ENCODING_NOT_SUPPORTED = "encoding-not-supported"
    EXPECTATION_FAILED = "expectation-failed"
    IDEMPOTENCY_KEY_REUSED = "idempotency-key-reused"
    UPGRADE_REQUIRED = "upgrade-required"
    RATE_LIMITED = "rate-limited"
    HEADERS_TOO_LARGE = "headers-too-large"
    INTERNAL_ERROR = "internal-error"
    NOT_IMPLEMENTED = "not-implemented"
    NOT_APPLIED = "not-applied"
    OUTCOME_UNKNOWN = "outcome-unknown"
    UNAVAILABLE = "unavailable"
    VERSION_NOT_SUPPORTED = "version-not-supported"
    TOO_MANY_CONNECTIONS = "too-many-connections"


USUAL_TYPES: Final = {
    400: ProblemType.INVALID_REQUEST,
    401: ProblemType.UNAUTHORIZED,
    403: ProblemType.FORBIDDEN,
    404: ProblemType.NOT_FOUND,
    405: ProblemType.METHOD_NOT_ALLOWED,
    408: ProblemType.REQUEST_TIMEOUT,
    413: ProblemType.BODY_TOO_LARGE,
    414: ProblemType.TARGET_TOO_LONG,
    415: ProblemType.ENCODING_NOT_SUPPORTED,
    417: ProblemType.EXPECTATION_FAILED,
    422: ProblemType.IDEMPOTENCY_KEY_REUSED,
    426: ProblemType.UPGRADE_REQUIRED,
    429: ProblemType.RATE_LIMITED,
    431: ProblemType.HEADERS_TOO_LARGE,
    500: ProblemType.INTERNAL_ERROR,
    501: ProblemType.NOT_IMPLEMENTED,
    503: ProblemType.NOT_APPLIED,
    505: ProblemType.VERSION_NOT_SUPPORTED,
}
"""What a problem of each status is where nothing else is said."""


class Problem(ScoreboardError):
    """An answer of `application/problem+json` (RFC 9457).

    `kind` defaults to the one usual for the status.
    `headers` are (name, value) pairs; `close` ends the connection behind the answer.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        kind: ProblemType | None = None,
        headers: tuple[tuple[str, str], ...] = (),
        close: bool = False,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.kind = kind or USUAL_TYPES[status]
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
    return Problem(503, detail, kind=ProblemType.OUTCOME_UNKNOWN, headers=retry)


class CloseCode(enum.IntEnum):
    """WebSocket close codes this server sends (RFC 6455, section 7.4.1)."""

    # Reconnect, with jitter.
    GOING_AWAY = 1001
    TRY_AGAIN_LATER = 1013
    # Do not reconnect with the same behaviour.
    PROTOCOL_ERROR = 1002
    INVALID_DATA = 1007
    POLICY_VIOLATION = 1008
    MESSAGE_TOO_BIG = 1009
