"""Every Redis key, and nothing else: no other module spells one.

Ids come from outside, so `:` and `%` in them are percent-encoded: no two pairs of ids share a key.
Keys of the board `main` are bare; another board's stand behind `board:{name}:`.
"""

from __future__ import annotations

import re

MAIN_BOARD = "main"


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


class Keys:
    """The keys that all boards of one deployment share, and the way to each board's own."""

    __slots__ = (
        "_boards", "answer", "answer_count", "of_boards", "outbox", "prefix", "ratelimit", "ready",
        "rebuild_lock", "relay_lease",
    )  # fmt: skip

    def __init__(self, prefix: str = "") -> None:
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
