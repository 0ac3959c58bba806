"""Asks Redis for its time, for the ages that a part without a connection to Redis tells."""

from __future__ import annotations

import logging
import time
from typing import Final

import redis

from server.config import Settings
from server.redis_clock import RedisClock
from sync.topology import connect_to, keys_in_use

ASK_AGAIN_S: Final = 60.0

_log = logging.getLogger("sync.redis_time")


class RedisTime:
    """Keeps a clock right, for whoever reads it now and then; of several masters, the first one's time is asked for."""

    def __init__(self, settings: Settings, clock: RedisClock) -> None:
        self._settings = settings
        self._clock = clock
        self._ask_at_s = 0.0

    def ask(self) -> None:
        """Set the clock, unless that was tried a moment ago; without an answer it goes on as it is."""
        if time.monotonic() < self._ask_at_s:
            return
        self._ask_at_s = time.monotonic() + ASK_AGAIN_S
        try:
            with connect_to(self._settings, keys_in_use(self._settings)[0]) as client:
                asked_s = time.monotonic()
                self._clock.learn(client.time(), asked_s, time.monotonic())
        except redis.RedisError as error:
            _log.debug("Redis does not tell its time: %s", error)
