"""Demo players: a small tournament, played over HTTP like any other game client does.

`Tournament` is pure and decides who scores; `DemoPlayers` posts it from a thread of its own. Knows nothing of how
the server works.
"""

from __future__ import annotations

import http.client
import json
import logging
import random
import threading
from collections.abc import Callable
from typing import Final

PLAYERS: Final = (
    "Nova", "Kestrel", "Zephyr", "Onyx", "Juniper", "Rook", "Vesper", "Halcyon", "Bishop", "Lyra", "Magpie", "Quill",
)  # fmt: skip
UPDATES_PER_SECOND: Final = 20
ROUND_UPDATES: Final = 300
"""Updates in a round; each deals the form of the day anew."""

_log = logging.getLogger(__name__)


class Tournament:
    """Who scores next, and how much: form changes from round to round, and who is on a run stays on it a while."""

    def __init__(self, players: tuple[str, ...], rng: random.Random) -> None:
        self._players = players
        self._random = rng
        self._totals = dict.fromkeys(players, 0)
        self._form: list[float] = []
        self._run = 0
        self._updates = 0

    def next(self) -> tuple[str, int]:
        """(player, delta) of the next change."""
        if self._updates % ROUND_UPDATES == 0:
            self._form = [self._random.uniform(0.5, 2.0) for _ in self._players]
        self._updates += 1
        if self._run == 0:
            self._scorer = self._random.choices(self._players, self._chances())[0]
            self._run = self._random.choice((1, 1, 1, 2, 3))
        self._run -= 1
        delta = self._delta()
        self._totals[self._scorer] += delta
        return self._scorer, delta

    def _chances(self) -> list[float]:
        # Who is behind attacks more, so that the field stays close and places change hands.
        best = max(self._totals.values()) or 1
        return [
            form * (1.5 - self._totals[player] / best) for player, form in zip(self._players, self._form, strict=True)
        ]

    def _delta(self) -> int:
        draw = self._random.random()
        if draw < 0.04 and self._totals[self._scorer] >= 10:
            return -10  # a foul
        if draw > 0.97:
            return 50
        return self._random.choice((5, 5, 10, 10, 15, 20, 25))


class DemoPlayers:
    """Posts a tournament to the server at `host`:`port` until told to stop."""

    def __init__(self, host: str, port: int, token_for: Callable[[str], str]) -> None:
        self._address = (host, port)
        self._tokens = {player: token_for(player) for player in PLAYERS}
        self._tournament = Tournament(PLAYERS, random.Random())  # noqa: S311 (a game, not a secret)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._play, name="demo players", daemon=True)

    def start(self) -> None:
        """Let them play."""
        self._thread.start()

    def leave(self) -> None:
        """Let them end by themselves, soon."""
        self._stopping.set()

    def stop(self) -> None:
        """Send them home; returns when the last request has been answered."""
        self.leave()
        if self._thread.ident is not None:
            self._thread.join(timeout=5)

    def _play(self) -> None:
        while not self._stopping.is_set():
            connection = http.client.HTTPConnection(*self._address, timeout=5)
            try:
                self._play_over(connection)
            except (OSError, http.client.HTTPException) as error:
                _log.debug("demo players: %s", error)  # the server restarts: whoever runs it says so
                self._stopping.wait(0.5)
            finally:
                connection.close()

    def _play_over(self, connection: http.client.HTTPConnection) -> None:
        while not self._stopping.wait(random.expovariate(UPDATES_PER_SECOND)):
            player, delta = self._tournament.next()
            body = json.dumps({"playerId": player, "scoreDelta": delta})
            headers = {"Authorization": f"Bearer {self._tokens[player]}", "Content-Type": "application/json"}
            connection.request("POST", "/update-score", body, headers)
            answer = connection.getresponse()
            detail = answer.read()
            if answer.status not in (200, 429, 503):
                _log.warning("demo players: %s was answered %d: %s", player, answer.status, detail.decode())
                self._stopping.wait(5)
