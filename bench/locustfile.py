"""A load test of a running scoreboard: players who post, watchers who look on, visitors who load the page.

JWT_SECRET=… locust -f bench/locustfile.py --headless -u 100 -r 20 -t 30s -H http://127.0.0.1:8080

Ends with 1, and a sentence for each limit that was missed, else with 0. From the environment, beside JWT_SECRET (and
JWT_AUDIENCE and JWT_ISSUER, where the server has them):

* RAMP=30:100,120:500,150:0   so many users after so many seconds, straight lines between; -u, -r and -t do not count.
* ERROR_PERCENT (0.1): how much of all requests may fail.
* POST_P95_MS, POST_P99_MS, and the same of KEYED, BOARD, PAGE, FILE, CONNECT and LIVE (see ENDPOINTS): `inf` is none.

Each player has a token of its own, made from JWT_SECRET. Mind two things:

* The server closes a keep-alive connection that is idle for 10 s. A user who pauses that long meets a closed
  connection and reports an error that is none, so every wait_time here stays well below.
* 20 updates a second and player are allowed, 40 at once: beyond that 429 is the right answer. It is counted on a line
  of its own, is no failure, and its Retry-After is kept to. To find out what the machine can do, start the server with
  RATE_LIMIT_PER_SECOND=0.

Needs nothing of the server's code: the file may be copied to wherever the load comes from.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import sys
import time
import uuid
from typing import Any, NamedTuple

import gevent
import jwt
import websocket
from locust import FastHttpUser, LoadTestShape, User, between, constant, events, task

TOKEN_TTL_S = 24 * 3600
SECRET = os.environ.get("JWT_SECRET", "")
REQUIRED_CLAIMS = {
    claim: os.environ[variable]
    for claim, variable in (("aud", "JWT_AUDIENCE"), ("iss", "JWT_ISSUER"))
    if os.environ.get(variable)
}
RAMP = [tuple(map(float, point.split(":"))) for point in os.environ.get("RAMP", "").split(",") if point]
BOARD_LIMIT = 10
RETRY_AFTER_MOST_S = 5
"""So that no connection is idle for long."""

if not SECRET:
    sys.exit("JWT_SECRET: expected the server's secret, to make a token for each player")


class Endpoint(NamedTuple):
    """A line of locust's table, and how slow it may be where the environment does not say."""

    method: str
    name: str
    p95_ms: float
    p99_ms: float


ENDPOINTS = {
    "POST": Endpoint("POST", "/update-score", 100, 250),
    "KEYED": Endpoint("POST", "/update-score with Idempotency-Key", 100, 250),
    "BOARD": Endpoint("GET", "/leaderboard", 100, 250),
    "PAGE": Endpoint("GET", "/", 250, 500),
    "FILE": Endpoint("GET", "a file of the page", 250, 500),
    "CONNECT": Endpoint("WS", "from the handshake to the first list", 500, 1000),
    "LIVE": Endpoint("WS", "a list's delayMs", 250, 500),  # from when Redis applied a change until the server sent it
}

_numbers = itertools.count(1)
_run = f"{random.randrange(16**6):06x}"


def authorization(player: str) -> dict[str, str]:
    """The header with a token that may change this player's score."""
    claims = {"sub": player, "exp": int(time.time()) + TOKEN_TTL_S, **REQUIRED_CLAIMS}
    return {"Authorization": f"Bearer {jwt.encode(claims, SECRET, algorithm='HS256')}"}


def base(host: str | None) -> str | None:
    """What the paths of requests are put behind."""
    return host and host.rstrip("/")


def files_of(page: str) -> list[str]:
    """The paths of what a page names, each of them once; they are relative to it."""
    return sorted({f"/{name}" for name in re.findall(r'(?:src|href)="/?([^":]+)"', page)})


def new_name(kind: str) -> str:
    """No two users have the same, in no two runs."""
    return f"{kind}-{_run}-{os.getpid()}-{next(_numbers)}"


class HttpUser(FastHttpUser):
    """Asks a server whose address may end with a slash, as browsers show it, or with the path a proxy serves it at."""

    abstract = True

    def __init__(self, environment: Any) -> None:
        self.host = base(self.host)
        super().__init__(environment)


class Player(HttpUser):
    """Scores every half second, and now and then looks at the board."""

    weight = 8
    wait_time = between(0.1, 1)

    def on_start(self) -> None:
        """Become somebody."""
        self.player = new_name("player")
        self.headers = authorization(self.player)
        self.total: int | None = 0  # None after an update whose outcome is not known

    @task(6)
    def score(self) -> None:
        """POST /update-score"""
        self._post("POST", random.randint(1, 10), self.headers)

    @task(2)
    def score_for_sure(self) -> None:
        """The same with an Idempotency-Key; one in ten is sent twice, as after a lost answer, and counts once."""
        headers = {**self.headers, "Idempotency-Key": str(uuid.uuid4())}
        delta = random.randint(1, 10)
        if self._post("KEYED", delta, headers) and random.random() < 0.1:
            self._post("KEYED", delta, headers, again=True)

    @task(1)
    def look(self) -> None:
        """GET /leaderboard"""
        self.client.get(f"/leaderboard?limit={BOARD_LIMIT}", name=ENDPOINTS["BOARD"].name)

    def _post(self, endpoint: str, delta: int, headers: dict[str, str], *, again: bool = False) -> bool:
        """Whether it was applied; nobody else changes this player's score, so the new one is known beforehand."""
        expected = self.total if self.total is None or again else self.total + delta
        self.total = None
        change = {"playerId": self.player, "scoreDelta": delta}
        name = ENDPOINTS[endpoint].name
        with self.client.post("/update-score", json=change, headers=headers, name=name, catch_response=True) as answer:
            if answer.status_code == 429:
                self.total = expected if again or expected is None else expected - delta
                answer.request_meta["name"] = "/update-score over the rate limit (429)"
                answer.success()
                gevent.sleep(min(RETRY_AFTER_MOST_S, int(answer.headers.get("Retry-After", 1))))
            elif answer.status_code == 200:
                self.total = answer.json()["newScore"]
                if expected not in (None, self.total):
                    answer.failure(f"expected another newScore{' of the repeated update' if again else ''}")
                return True
        return False


class Visitor(HttpUser):
    """Loads the page with all its files, as a browser does that has none of them, then the board once more."""

    weight = 1
    wait_time = between(1, 5)

    @task
    def load(self) -> None:
        """GET /, what it names, /leaderboard"""
        page = self.client.get(ENDPOINTS["PAGE"].name)
        for path in files_of(page.text or ""):
            self.client.get(path, name=ENDPOINTS["FILE"].name)
        self.client.get(f"/leaderboard?limit={BOARD_LIMIT}", name=ENDPOINTS["BOARD"].name)


class Watcher(User):
    """Follows the board over WebSocket, with a token: so all may come from one address."""

    weight = 1
    wait_time = constant(1)  # before connecting again, when the server restarts

    def on_start(self) -> None:
        """Not connected yet."""
        self.socket: websocket.WebSocket | None = None
        self.headers = authorization(new_name("watcher"))

    def on_stop(self) -> None:
        """Leave, without waiting for the server's answer: behind all that it has sent, that may be long."""
        if self.socket is not None:
            self.socket.close(timeout=0)

    @task
    def watch(self) -> None:
        """Read until the connection ends."""
        began_s: float | None = time.perf_counter()
        address = base(self.host).replace("http", "ws", 1) + f"/live-updates?limit={BOARD_LIMIT}&scores=none"
        try:
            self.socket = websocket.create_connection(
                address, timeout=60, header=self.headers, skip_utf8_validation=True
            )
            while True:
                opcode, data = self.socket.recv_data()
                if opcode == websocket.ABNF.OPCODE_CLOSE:
                    code = int.from_bytes(data[:2], "big")
                    if code != 1001:  # that is a restart, to be followed by another connection
                        self._report("CONNECT", 0, error=ConnectionError(f"closed with {code}"))
                    return
                if began_s is not None:
                    self._report("CONNECT", (time.perf_counter() - began_s) * 1000, len(data))
                    began_s = None
                # Not parsed: that would cost more than all the rest.
                _, found, rest = data.partition(b'"delayMs":')
                if found:
                    self._report("LIVE", float(re.split(b"[,}]", rest, maxsplit=1)[0]), len(data))
        except (OSError, websocket.WebSocketException) as error:
            self._report("CONNECT", 0, error=error)

    def _report(self, endpoint: str, took_ms: float, size: int = 0, error: Exception | None = None) -> None:
        method, name, *_ = ENDPOINTS[endpoint]
        self.environment.events.request.fire(
            request_type=method, name=name, response_time=took_ms, response_length=size, exception=error, context={}
        )


class Ramp(LoadTestShape):
    """As many users as RAMP says."""

    abstract = not RAMP

    def tick(self) -> tuple[int, float] | None:
        """locust: (users, how many to start or end a second), or None at the end."""
        now_s = self.get_run_time()
        for (from_s, before), (to_s, after) in itertools.pairwise([(0.0, 0.0), *RAMP]):
            if now_s < to_s:
                users = round(before + (after - before) * (now_s - from_s) / (to_s - from_s))
                return users, max(1, abs(users - self.get_current_user_count()))
        return None


def limit(name: str, default: float) -> float:
    """A limit from the environment."""
    return float(os.environ.get(name, default))


def missed(environment: Any) -> list[str]:
    """A sentence for each limit that was not kept."""
    stats, sentences = environment.stats, []
    total, percent = stats.total, limit("ERROR_PERCENT", 0.1)
    if not total.num_requests:
        sentences.append("expected requests, made none")
    if 100 * total.fail_ratio > percent:
        failed = f"{total.num_failures:,} of {total.num_requests:,}, {100 * total.fail_ratio:.2f} %"
        sentences.append(f"ERROR_PERCENT: expected at most {percent:g} % of the requests to fail, {failed} did")
    for prefix, (method, name, *defaults) in ENDPOINTS.items():
        entry = stats.entries.get((name, method))
        if entry is None:
            continue
        for share, default_ms in zip((95, 99), defaults, strict=True):
            variable = f"{prefix}_P{share}_MS"
            most_ms, took_ms = limit(variable, default_ms), entry.get_response_time_percentile(share / 100)
            if took_ms > most_ms:
                sentences.append(f"{variable}: expected p{share} of {method} {name} <= {most_ms:g} ms, was {took_ms:g}")
    exceptions = environment.runner.exceptions.values() if environment.runner else ()
    sentences += [f"a user failed: {exception['msg']}" for exception in exceptions]
    return sentences


@events.quitting.add_listener
def judge(environment: Any, **_: Any) -> None:
    """Say what was missed; of several processes, the one that has everybody's figures."""
    if environment.parsed_options and environment.parsed_options.worker:
        return
    sentences = missed(environment)
    for sentence in sentences:
        sys.stderr.write(f"MISSED {sentence}\n")
    environment.process_exit_code = 1 if sentences else 0
