"""An HTTP answer as it comes in: what of HTTP/1.1 our own server speaks, for load generators that must be cheap."""

from __future__ import annotations

from typing import NamedTuple


class Answer(NamedTuple):
    """One whole answer; `head` is in lower case."""

    status: int
    head: bytes
    body: bytes


def complete(received: bytes) -> Answer | None:
    """The answer once all of it was received; None before."""
    head_end = received.find(b"\r\n\r\n") + 4
    if head_end < 4:
        return None
    head = received[:head_end].lower()
    length_at = head.find(b"content-length:") + 15
    if len(received) < head_end + int(head[length_at : head.find(b"\r", length_at)]):
        return None
    return Answer(int(head[9:12]), head, received[head_end:])
