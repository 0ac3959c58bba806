"""The scoreboard beside its peers: the same load on each in turn, A B C D A B C D …, on the same Redis and Kafka.

Whoever is not measured stays idle. A run ends when all that was accepted has reached Kafka, and the scoreboard's has
reached PostgreSQL too, so that nobody works off a backlog during somebody else's turn.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

from bench import duty, wrk
from bench.candidates import Candidate
from bench.processes import Meter
from bench.stack import Stack
from bench.words import say
from tests.services import JWT_SECRET

POST: Final = "POST /update-score"
GET: Final = "GET /leaderboard"
GET_PATH: Final = "/leaderboard?limit=10"
STORES: Final = ("Redis", "relay", "Kafka", "persister", "PostgreSQL")
BEHIND_THE_ANSWER: Final = STORES[1:]
GIVE_UP_AFTER_S: Final = 10.0
"""An event that has not come this long after the one before never will."""

Run = dict[str, Any]


class Comparison:
    """All runs of all candidates."""

    def __init__(self, stack: Stack, candidates: Sequence[Candidate], players: Sequence[str]) -> None:
        self._stack = stack
        self._candidates = candidates
        self._players = len(players)
        self._posts, self._gets = wrk.posts(JWT_SECRET, players), wrk.gets()

    def check(self) -> None:
        """Raises WrongAnswerError unless everybody gives the right answers, and Kafka gets an event for each."""
        for candidate in self._candidates:
            if candidate.persister_paused:
                continue  # the same process as another
            say(f"asking {candidate.name} whether it does its duty")
            before = self._stack.events_in(candidate.topic)
            try:
                accepted = duty.check(candidate.service.url, JWT_SECRET)
            except duty.WrongAnswerError as error:
                raise duty.WrongAnswerError(f"{candidate.name}: {error}") from error
            lost = self._events_lost(candidate.topic, before + accepted)
            if lost:
                raise duty.WrongAnswerError(
                    f"{candidate.name}: expected {accepted} events in Kafka, {lost} are missing"
                )

    def warm_up(self, seconds: int) -> None:
        """Every candidate at both endpoints, before runs of `seconds`; fills its leaderboard.

        wrk starts with the first token each time, so half as long again has met all tokens that a run will send.
        """
        for candidate in self._candidates:
            if not candidate.persister_paused:
                say(f"warming up {candidate.name}")
                self._run(candidate, POST, 64, math.ceil(1.5 * seconds))
                self._run(candidate, GET, 64, 1)

    def rounds(self, rounds: int, seconds: int, connections: Sequence[int]) -> Iterator[Run]:
        """Every candidate once a round, endpoint and number of connections."""
        for number in range(1, rounds + 1):
            for endpoint in (POST, GET):
                for count in connections:
                    say(f"round {number} of {rounds}: {endpoint}, {count} connections")
                    for candidate in self._candidates:
                        if endpoint == POST or not candidate.persister_paused:
                            yield {"round": number} | self._run(candidate, endpoint, count, seconds)

    def _run(self, candidate: Candidate, endpoint: str, connections: int, seconds: int) -> Run:
        stack, reads = self._stack, endpoint == GET
        url = candidate.service.url + (GET_PATH if reads else "")
        before = stack.events_in(candidate.topic)
        with contextlib.ExitStack() as resume:
            if candidate.persister_paused:
                stack.persister.pause()
                resume.callback(stack.persister.resume)
            meter = Meter({"server": candidate.service} | {name: stack.measured[name] for name in STORES})
            load = wrk.run(url, self._gets if reads else self._posts, connections=connections, seconds=seconds)
            used_us, others_percent = meter.used_us(), meter.others_percent()
            lost = 0 if reads else self._events_lost(candidate.topic, before + load.requests - load.refused)
            if candidate.persister_paused:
                used_us |= _pick(meter, BEHIND_THE_ANSWER)
        relayed_s, persisted_s = stack.settle()
        if not reads and not candidate.persister_paused:
            used_us |= _pick(meter, BEHIND_THE_ANSWER)
        requests = max(load.requests, 1)
        return {
            "candidate": candidate.name,
            "endpoint": endpoint,
            "connections": connections,
            "rps": load.per_second,
            "p50_ms": load.p50_us / 1000,
            "p99_ms": load.p99_us / 1000,
            "p999_ms": load.p999_us / 1000,
            "cpu_us_per_request": used_us["server"] / requests,
            "cpu_us_by_process": {name: used / requests for name, used in used_us.items()},
            "errors": load.failed + load.refused + lost + (load.requests == 0),
            "events_lost": lost,
            "settled_after_s": relayed_s + persisted_s,
            "others_percent": others_percent,
        }

    def _events_lost(self, topic: str, expected: int) -> int:
        """How many of `expected` records do not come."""
        seen, deadline_s = self._stack.events_in(topic), time.monotonic() + GIVE_UP_AFTER_S
        while seen < expected and time.monotonic() < deadline_s:
            time.sleep(0.05)
            now = self._stack.events_in(topic)
            if now > seen:
                seen, deadline_s = now, time.monotonic() + GIVE_UP_AFTER_S
        return max(0, expected - seen)


def _pick(meter: Meter, names: Sequence[str]) -> dict[str, float]:
    return {name: used_us for name, used_us in meter.used_us().items() if name in names}
