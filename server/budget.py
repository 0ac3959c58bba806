"""How much one connection may do: so much at once, and more again as time passes (GCRA).

Pure: knows no clock, `now_s` is an argument.
"""

from __future__ import annotations


class Budget:
    """Full at first. What is spent comes back a second each second."""

    __slots__ = ("_spent_until_s",)

    def __init__(self) -> None:
        self._spent_until_s = 0.0

    def spend(self, cost_s: float, at_once_s: float, now_s: float) -> bool:
        """Spend `cost_s`; False when more than `at_once_s` is spent and has not come back."""
        self._spent_until_s = max(self._spent_until_s, now_s) + cost_s
        return self._spent_until_s <= now_s + at_once_s
