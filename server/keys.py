"""Every Redis key, and nothing else: no other module spells one.

Ids come from outside, so `:` and `%` in them are percent-encoded: no two pairs of ids share a key.
Keys of the board `main` are bare; another board's stand behind `board:{name}:`. In a Redis Cluster each board belongs
to one of TAGS hash tags, and a tag has everything that is not a board's own once more: so all keys of one script call
share a slot.
"""

from __future__ import annotations

import re
from binascii import crc_hqx
from typing import Final, Protocol

MAIN_BOARD = "main"

TAGS: Final = 16
SLOTS: Final = 16384


def tag_of(board: str) -> str:
    """The hash tag that a board has in a Redis Cluster: a hexadecimal digit, the same for good."""
    return f"{crc_hqx(board.encode(), 0) % TAGS:x}"


def default_board(boards: tuple[str, ...]) -> str:
    """The board that is meant where none is named."""
    return MAIN_BOARD if MAIN_BOARD in boards else boards[0]


def encode_id(raw: str) -> str:
    """An id as it may stand between colons."""
    if ":" in raw or "%" in raw:
        return raw.replace("%", "%25").replace(":", "%3A")
    return raw


def idempotency_name(subject: str, key: str) -> str:
    """An idempotency key as its owner's own: no two subjects share one."""
    return f"{encode_id(subject)}:{encode_id(key)}"


class BoardKeys:
    """The keys of one board."""

    __slots__ = ("_player_prefix", "leaderboard", "name")

    def __init__(self, prefix: str, board: str) -> None:
        scope = prefix if board == MAIN_BOARD else f"{prefix}board:{board}:"
        self.name = board
        self.leaderboard = f"{scope}leaderboard"
        self._player_prefix = f"{scope}player:"

    def score(self, player: str) -> str:
        """The string that holds one player's score."""
        return f"{self._player_prefix}{encode_id(player)}:score"


class BoardsKeys(Protocol):
    """Knows the keys of every board, wherever it is."""

    def board(self, name: str) -> BoardKeys:
        """The keys of the board `name`."""


class Keys:
    """The keys that all boards of one deployment share, or those of one hash tag, and the way to each board's own."""

    __slots__ = (
        "_boards", "answer", "answer_count", "epoch_taken", "of_boards", "outbox", "prefix", "ratelimit", "ready",
        "rebuild_lock", "relay_lease", "tag",
    )  # fmt: skip

    def __init__(self, prefix: str = "", tag: str = "") -> None:
        """`tag` is one of `tag_of`, or "" outside of a cluster, where all boards are together."""
        self.tag = tag
        if tag:
            prefix = f"{prefix}{{{tag}}}:"
        self.prefix = prefix
        self._boards: dict[str, BoardKeys] = {}
        # A number is appended by the script: one hash per span of time, subject to theoretical arrival time in µs.
        self.ratelimit = f"{prefix}ratelimit:"
        # Followed by `idempotency_name`: the answer kept for it.
        self.answer = f"{prefix}idempotency:"
        # A number is appended by the script: one hash per span of time, subject to how many answers are kept for it.
        self.answer_count = f"{prefix}idempotency-count:"
        self.outbox = f"{prefix}outbox"
        self.ready = f"{prefix}scoreboard:ready"
        # Every key that a rebuild makes anew: boards and scores, whoever is on them.
        self.of_boards = re.compile(
            rb"%s(board:[^:]+:)?(leaderboard|player:[^:]+:score)" % re.escape(prefix.encode())
        )  # fmt: skip
        # The last epoch that anybody has begun to mend Redis with, whether or not the marker ever got it.
        self.epoch_taken = f"{prefix}scoreboard:epoch-taken"
        self.rebuild_lock = f"{prefix}scoreboard:rebuild-lock"
        self.relay_lease = f"{prefix}scoreboard:relay-lease"

    def board(self, name: str) -> BoardKeys:
        """The keys of the board `name`."""
        keys = self._boards.get(name)
        if keys is None:
            keys = self._boards[name] = BoardKeys(self.prefix, name)
        return keys

    def session(self, session_id: str) -> str:
        """Number and reply of the last batch of one server's session."""
        return f"{self.prefix}session:{session_id}"

    def holds(self, board: str) -> bool:
        """Whether a board belongs here."""
        return not self.tag or tag_of(board) == self.tag

    @property
    def slot(self) -> int:
        """The slot of all these keys, in a cluster (Redis Cluster specification, "Hash tags")."""
        return crc_hqx(self.tag.encode(), 0) % SLOTS


class TaggedKeys:
    """The keys of a deployment in a Redis Cluster, by hash tag."""

    __slots__ = ("by_tag",)

    def __init__(self, prefix: str, boards: tuple[str, ...]) -> None:
        """`prefix` holds no braces; tags that no board of `boards` has are not in use."""
        self.by_tag = {tag: Keys(prefix, tag) for tag in sorted({tag_of(board) for board in boards})}

    def board(self, name: str) -> BoardKeys:
        """The keys of the board `name`."""
        return self.by_tag[tag_of(name)].board(name)
