"""Demo players: a small tournament, played over HTTP like any other game client does.

`Tournament` is pure and decides who scores, how much and when; `DemoPlayers` posts it from a thread of its own. Knows
nothing of how the server works.
"""

from __future__ import annotations

import http.client
import json
import logging
import random
import threading
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

PLAYERS: Final = (
    "Nova", "Kestrel", "Zephyr", "Onyx", "Juniper", "Rook", "Vesper", "Halcyon", "Bishop", "Lyra", "Magpie", "Quill",
)  # fmt: skip

MATCH_S: Final = 150.0
FINALE_S: Final = 30.0
"""The end of a match: the first FINALISTS fight for the title, and points count double."""

FINALISTS: Final = 4
CEREMONY_S: Final = 8.0
"""How long the result stands before the next match begins at zero."""

STROKE_S: Final = 0.1
"""Between two points of a duel, on average."""

BREATH_S: Final = 0.7
"""Between two duels, on average."""

MOMENTUM: Final = (0.6, 1.0, 1.6)
"""Least, at first and most: who wins a duel gets bolder, who loses one more timid."""

_log = logging.getLogger(__name__)


class Move(NamedTuple):
    """`after_s` behind the last move, `player` scores `delta`."""

    after_s: float
    player: str
    delta: int


class Tournament:
    """Matches without end: duels for a place, with form and momentum, a finale for the title, and back to zero.

    Whoever carries out a move says in `scores` what came of it.
    """

    def __init__(self, players: tuple[str, ...], rng: random.Random) -> None:
        self.scores = dict.fromkeys(players, 0)
        self._players = players
        self._random = rng
        self._moves = self._play()

    def next(self) -> Move:
        """The next move."""
        return next(self._moves)

    def _play(self) -> Iterator[Move]:
        for player in self._players:
            yield Move(STROKE_S, player, 0)  # shows what is left of an earlier start
        while True:
            for player in reversed(self._ranking()):  # the champion last
                if self.scores[player]:
                    yield Move(STROKE_S, player, -self.scores[player])
            yield from self._match()
            yield Move(CEREMONY_S, self._ranking()[0], 0)

    def _match(self) -> Iterator[Move]:
        self._form = {player: self._random.uniform(0.8, 1.25) for player in self._players}
        self._momentum = dict.fromkeys(self._players, MOMENTUM[1])
        played_s = 0.0
        while played_s < MATCH_S:
            is_finale = played_s >= MATCH_S - FINALE_S
            for move in self._duel(*self._opponents(is_finale), 2 if is_finale else 1):
                played_s += move.after_s
                yield move

    def _opponents(self, is_finale: bool) -> tuple[str, str]:
        """Somebody who attacks, and somebody one to three places ahead."""
        ranking = self._ranking()
        if is_finale:
            ranking = ranking[:FINALISTS]
        place = self._random.randrange(1, len(ranking))
        return ranking[place], ranking[max(0, place - self._random.choice((1, 1, 2, 3)))]

    def _duel(self, attacker: str, defender: str, worth: int) -> Iterator[Move]:
        pair, won = (attacker, defender), {attacker: 0, defender: 0}
        breath_s = self._random.expovariate(1 / BREATH_S)
        for _ in range(self._random.randint(4, 10)):
            [player] = self._random.choices(pair, [self._boldness(each, worth) for each in pair])
            if self._random.random() < 0.3:  # the others do not stand still meanwhile
                player = self._random.choice(self._players)
            delta = self._delta(player) * worth
            if player in won:
                won[player] += delta
            yield Move(breath_s + self._random.expovariate(1 / STROKE_S), player, delta)
            breath_s = 0.0
        winner, loser = sorted(pair, key=lambda each: won[each], reverse=True)
        least, _, most = MOMENTUM
        self._momentum[winner] = min(most, self._momentum[winner] * 1.25)
        self._momentum[loser] = max(least, self._momentum[loser] * 0.8)

    def _boldness(self, player: str, worth: int) -> float:
        # Who is behind has nothing to lose; so nobody runs away.
        behind = max(self.scores.values()) - self.scores[player]
        return self._form[player] * self._momentum[player] * (1 + behind / (300 * worth))

    def _delta(self, player: str) -> int:
        if self._random.random() < 0.03 and self.scores[player] >= 20:
            return -10  # a foul
        return self._random.choice((5, 5, 10, 10, 15, 25))

    def _ranking(self) -> list[str]:
        return sorted(self._players, key=lambda player: (self.scores[player], player), reverse=True)


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
        while True:
            move = self._tournament.next()
            if self._stopping.wait(move.after_s):
                return
            body = json.dumps({"playerId": move.player, "scoreDelta": move.delta})
            headers = {"Authorization": f"Bearer {self._tokens[move.player]}", "Content-Type": "application/json"}
            connection.request("POST", "/update-score", body, headers)
            answer = connection.getresponse()
            said = answer.read()
            if answer.status == 200:
                self._tournament.scores[move.player] = json.loads(said)["newScore"]
            elif answer.status not in (429, 503):
                _log.warning("demo players: %s was answered %d: %s", move.player, answer.status, said.decode())
                self._stopping.wait(5)
