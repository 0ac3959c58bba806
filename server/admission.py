"""How many may watch at once: in total, and from one address.

Pure: knows no socket. A count is given up with `leave`, once for each `enter`.
"""

from __future__ import annotations

from typing import Final

from server.errors import Problem, ProblemType

RETRY_AFTER_S: Final = 5


class Admission:
    """Counts connections; a limit of 0 is none."""

    def __init__(self, most: int, most_per_address: int) -> None:
        self.connections = 0
        self._most = most
        self._most_per_address = most_per_address
        self._by_address: dict[str, int] = {}

    def check_total(self) -> None:
        """Raises Problem 503 when nobody else may watch."""
        if self._most and self.connections >= self._most:
            raise _full(f"expected at most {self._most} connections in total (LIVE_MAX_CONNECTIONS)")

    def check_address(self, address: str) -> None:
        """Raises Problem 503 when nobody else may watch from there."""
        if self._most_per_address and self._by_address.get(address, 0) >= self._most_per_address:
            raise _full(f"expected at most {self._most_per_address} connections from {address} (LIVE_MAX_PER_IP)")

    def enter(self, address: str | None) -> None:
        """One more from there; None is nowhere, and counts in total only."""
        self.connections += 1
        if address is not None:
            self._by_address[address] = self._by_address.get(address, 0) + 1

    def leave(self, address: str | None) -> None:
        """One less from there."""
        self.connections -= 1
        if address is None:
            return
        left = self._by_address[address] - 1
        if left:
            self._by_address[address] = left
        else:
            del self._by_address[address]


def _full(detail: str) -> Problem:
    headers = (("Retry-After", str(RETRY_AFTER_S)),)
    return Problem(503, detail, kind=ProblemType.TOO_MANY_CONNECTIONS, headers=headers, close=True)
