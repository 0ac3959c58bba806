"""A lease in Redis: one process at a time has it, and loses it unless it keeps renewing it.

It keeps two relays from doing the same work twice; it is no fence, since a holder that was paused wakes up
believing in it. So what is done under it must be harmless when done twice. Knows nothing of that work.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import redis

LEASE_MS: Final = 2000
"""How long a killed holder keeps others waiting."""

RENEW_EVERY_S: Final = LEASE_MS / 1000 / 4

_RENEW: Final = Path(__file__).with_name("renew_lease.lua").read_text()
_RELEASE: Final = Path(__file__).with_name("release_lease.lua").read_text()


class Lease:
    """The claim of one holder, known by its `token`, to the lease at `key`. Every method raises redis.RedisError."""

    def __init__(self, client: redis.Redis, key: str, token: str) -> None:
        self._client = client
        self._key = key
        self._token = token
        self._renew = client.register_script(_RENEW)
        self._release = client.register_script(_RELEASE)

    def hold(self) -> bool:
        """Renew the lease, or take it if it is free; False when another process has it."""
        if self._renew(keys=[self._key], args=[self._token, LEASE_MS]):
            return True
        return bool(self._client.set(self._key, self._token, nx=True, px=LEASE_MS))

    def release(self) -> None:
        """Give it back, so that the next one need not wait."""
        self._release(keys=[self._key], args=[self._token])
