"""Fences in Kafka's log: which records still count after Redis has lost what they tell of.

A relay may deliver what it read from Redis after that Redis lost it, and after the log was read to give Redis back
what was missing. So each record carries the epoch of the Redis that its relay read, and whoever verifies Redis raises
the epoch, then writes a fence of that epoch into every partition. What stands before the fence is given back to
Redis and counts; behind it, an event of an older epoch counts for nobody. A relay that is overtaken by an epoch sends
what the outbox still holds once more, so nothing that Redis has is left out.

In a Redis Cluster each hash tag (server/keys.py) has an outbox and an epoch of its own. Its events and its fences say
which tag it is, and concern no other's.

Pure: knows no Kafka client.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final

from server.events import BadEvent
from server.keys import TAGS

EPOCH_HEADER: Final = "epoch"
"""Of an event: the epoch of the Redis it was read from, in digits. One without it always counts."""

FENCE_HEADER: Final = "fence"
"""Of a record that is a fence and no event: its epoch, in digits."""

TAG_HEADER: Final = "tag"
"""Of both, in a Redis Cluster: the hash tag that the epoch is of. Without it, it is that of a Redis without tags."""

MOST_DIGITS: Final = 18
"""Of an epoch: the database keeps it as a bigint."""

MOST_FENCE_DIGITS: Final = 17
"""Of a fence's. No clock comes near it, and whatever a fence of ours or of others says, a later epoch can be told."""

_TAGS: Final = {f"{number:x}".encode(): f"{number:x}" for number in range(TAGS)}

Epochs = Mapping[str, int]
"""By hash tag, "" where there are none, the epoch of the last fence; none for 0."""

Headers = Iterable[tuple[str, object]] | None


class Fences:
    """The fences that one reader of the log has met, by partition; it has to read each partition in order."""

    __slots__ = ("epochs", "void")

    def __init__(self, epochs: Mapping[int, Epochs] = MappingProxyType({})) -> None:
        """`epochs` are those of the last fences before the places where reading begins, by partition."""
        self.epochs: dict[int, dict[str, int]] = {}
        """By partition and hash tag, the epoch of the last fence; none for 0."""
        self.void = 0
        """Events that did not count."""
        self.begin(epochs)

    def begin(self, epochs: Mapping[int, Epochs]) -> None:
        """Read these partitions from another place on, behind fences of these epochs."""
        self.epochs |= {partition: dict(by_tag) for partition, by_tag in epochs.items()}

    def highest(self, tag: str) -> int:
        """The latest epoch of any fence of a tag; 0 if none was met."""
        return max((by_tag.get(tag, 0) for by_tag in self.epochs.values()), default=0)

    def admits(self, partition: int, headers: Headers) -> bool:
        """Whether the next record of a partition is an event that counts.

        Raises BadEvent for an epoch that is no number or too large a one, and for a tag that is none.
        """
        tag, epoch, fence = "", None, None
        for name, value in headers or ():
            if name == EPOCH_HEADER:
                epoch = _number(name, value, MOST_DIGITS)
            elif name == FENCE_HEADER:
                fence = _number(name, value, MOST_FENCE_DIGITS)
            elif name == TAG_HEADER:
                tag = _tag(name, value)
        if fence is not None:
            by_tag = self.epochs.setdefault(partition, {})
            # A server that was slow may write its fence behind that of a later epoch.
            by_tag[tag] = max(fence, by_tag.get(tag, 0))
            return False
        if epoch is not None and partition in self.epochs and epoch < self.epochs[partition].get(tag, 0):
            self.void += 1
            return False
        return True


def _number(name: str, value: object, most_digits: int) -> int:
    if not isinstance(value, bytes) or not value.isdigit() or len(value) > most_digits:
        raise BadEvent(f"header {name}: expected digits, {most_digits} at most, got {value!r}")
    return int(value)


def _tag(name: str, value: object) -> str:
    tag = _TAGS.get(value) if isinstance(value, bytes) else None
    if tag is None:
        raise BadEvent(f"header {name}: expected a hexadecimal digit, got {value!r}")
    return tag
