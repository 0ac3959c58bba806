"""Waiting: until somebody asks us to stop, and through the outage of a service.

Knows no service; whoever uses it says what is away and what went wrong.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import Final

FIRST_DELAY_S: Final = 0.1
LONGEST_DELAY_S: Final = 3.0
GRACE_S: Final = 0.7
"""What an answer that is waited for still gets after the request to stop: it mostly comes."""

_LOOK_EVERY_S: Final = 0.05


class Stopped(Exception):
    """We were asked to stop while a service was waited for."""


class Stop:
    """A request to stop: made once, from a signal handler or another thread, and looked at often."""

    def __init__(self) -> None:
        self.requested = False
        self._requested_s = 0.0

    def request(self, *_: object) -> None:
        """Ask; takes and ignores what a signal handler is given."""
        if not self.requested:
            self._requested_s = time.monotonic()
            self.requested = True

    def heed(self, _waited_s: float = 0.0) -> None:
        """Raise Stopped if the request is older than GRACE_S; called by what waits for an answer."""
        if self.requested and time.monotonic() - self._requested_s >= GRACE_S:
            raise Stopped

    def wait(self, duration_s: float) -> bool:
        """Sleep that long, or until the request comes; says whether it came."""
        deadline = time.monotonic() + duration_s
        while not self.requested:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                break
            time.sleep(min(left_s, _LOOK_EVERY_S))
        return self.requested


class Outage:
    """A service that may be away: logged when it goes and when it is back, not at every try in between.

    One that answers, but refuses what it is asked for, is called that, also when it was away before.
    """

    def __init__(self, service: str, log: logging.Logger, is_refusal: Callable[[object], bool] | None = None) -> None:
        """`is_refusal` tells which errors are the service's answers."""
        self._service = service
        self._log = log
        self._is_refusal = is_refusal or (lambda _: False)
        self._began_at: float | None = None
        self._refused = False
        self._delay_s = FIRST_DELAY_S

    @property
    def goes_on(self) -> bool:
        """Whether the service did not answer, or refused, when it was last needed."""
        return self._began_at is not None

    def failed(self, error: object) -> float:
        """Note a try that failed; returns the seconds to wait before the next, with jitter."""
        refused = self._is_refusal(error)
        if self._began_at is None or (refused and not self._refused):
            self._began_at = self._began_at or time.monotonic()
            self._refused = refused
            does = "refuses, trying on" if refused else "does not answer, trying on"
            self._log.warning("%s %s: %s", self._service, does, str(error).strip())
        delay_s = self._delay_s
        self._delay_s = min(2 * delay_s, LONGEST_DELAY_S)
        return delay_s * random.uniform(0.5, 1.0)  # noqa: S311 (jitter, not a secret)

    def over(self) -> None:
        """Note that the service answered."""
        if self._began_at is not None:
            self._log.info("%s answers again after %.1f s", self._service, time.monotonic() - self._began_at)
            self._began_at = None
            self._refused = False
            self._delay_s = FIRST_DELAY_S
