"""What `scoreboard dev` says of its parts while they work: what is behind or refused, and when that is over.

Pure: it is told what there is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

BEHIND_AFTER_S: Final = 5.0
"""Age of the oldest change that waits at which that is worth a line."""

AGAIN_AFTER_S: Final = 15.0
"""How often a line says how things stand, while they are not well."""


class Watch:
    """Remembers what was said, so that a trouble is told when it begins, now and then, and when it is over."""

    def __init__(self) -> None:
        self._behind = False
        self._refused = ""
        self._say_again_at_s = 0.0

    def look(self, now_s: float, entries: int, oldest_s: float, refused: str) -> Iterator[str]:
        """The lines to say: `entries` wait in Redis, the oldest for `oldest_s`; `refused` is why updates get 503."""
        if oldest_s > BEHIND_AFTER_S:
            if not self._behind or now_s >= self._say_again_at_s:
                self._say_again_at_s = now_s + AGAIN_AFTER_S
                waits = f"{entries} batches of changes wait in Redis, the oldest for {oldest_s:.0f} s"
                yield f"Behind: {waits}. Nothing is lost."
            self._behind = True
        elif self._behind and oldest_s < BEHIND_AFTER_S / 2:
            self._behind = False
            yield "No longer behind."
        if refused and not self._refused:
            yield f"Updates get 503: {refused}"
        elif self._refused and not refused:
            yield "Updates are taken again."
        self._refused = refused
