"""The ledger: what was acknowledged, as four numbers an update, in memory and in a file.

Knows neither clients nor stores.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


def player_name(number: int) -> str:
    """The id of a player."""
    return f"player{number}"


class Acknowledged(NamedTuple):
    """An update that was answered 200; `update` is its number and, as text, its Idempotency-Key."""

    update: int
    player: int
    delta: int
    new_score: int


class Ledger:
    """Acknowledged updates, in the order of their answers."""

    def __init__(self) -> None:
        self._numbers = array("q")

    def __len__(self) -> int:
        return len(self._numbers) // 4

    def __iter__(self) -> Iterator[Acknowledged]:
        numbers = iter(self._numbers)
        return (Acknowledged(*four) for four in zip(numbers, numbers, numbers, numbers, strict=True))

    def add(self, update: int, player: int, delta: int, new_score: int) -> None:
        """Write one down."""
        self._numbers.extend((update, player, delta, new_score))

    def scores(self) -> dict[str, int]:
        """What each player's score has to be."""
        totals: dict[int, int] = {}
        for _, player, delta, _ in self:
            totals[player] = totals.get(player, 0) + delta
        return {player_name(player): total for player, total in totals.items()}

    def save(self, path: Path) -> None:
        """Write it to a file, for another process of this machine."""
        with path.open("wb") as file:
            self._numbers.tofile(file)

    @classmethod
    def load(cls, path: Path) -> Ledger:
        """Read what `save` wrote."""
        ledger = cls()
        ledger._numbers.frombytes(path.read_bytes())
        return ledger
