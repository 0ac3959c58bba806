"""Fences in Kafka's log: which records still count after Redis has lost what they tell of.

A relay may deliver what it read from Redis after that Redis lost it, and after the log was read to give Redis back
what was missing. So each record carries the epoch of the Redis that its relay read, and whoever verifies Redis raises
the epoch, then writes a fence of that epoch into every partition. What stands before the fence is given back to
Redis and counts; behind it, an event of an older epoch counts for nobody. A relay that is overtaken by an epoch sends
what the outbox still holds once more, so nothing that Redis has is left out.

Pure: knows no Kafka client.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from server.events import BadEvent

EPOCH_HEADER: Final = "epoch"
"""Of an event: the epoch of the Redis it was read from, in digits. One without it always counts."""

FENCE_HEADER: Final = "fence"
"""Of a record that is a fence and no event: its epoch, in digits."""

Headers = Iterable[tuple[str, object]] | None


class Fences:
    """The fences that one reader of the log has met, by partition; it has to read each partition in order."""

    __slots__ = ("epochs", "void")

    def __init__(self, epochs: Mapping[int, int] | None = None) -> None:
        """`epochs` are those of the last fences before the places where reading begins."""
        self.epochs = dict(epochs or {})
        """By partition, the epoch of the last fence; none for 0."""
        self.void = 0
        """Events that did not count."""

    def begin(self, epochs: Mapping[int, int]) -> None:
        """Read these partitions from another place on, behind fences of these epochs."""
        self.epochs |= epochs

    def admits(self, partition: int, headers: Headers) -> bool:
        """Whether the next record of a partition is an event that counts.

        Raises BadEvent for an epoch that is no number.
        """
        for name, value in headers or ():
            if name == EPOCH_HEADER:
                if _digits(name, value) < self.epochs.get(partition, 0):
                    self.void += 1
                    return False
            elif name == FENCE_HEADER:
                # A server that was slow may write its fence behind that of a later epoch.
                self.epochs[partition] = max(_digits(name, value), self.epochs.get(partition, 0))
                return False
        return True


def _digits(name: str, value: object) -> int:
    if not isinstance(value, bytes) or not value.isdigit():
        raise BadEvent(f"header {name}: expected digits, got {value!r}")
    return int(value)
