"""One function per endpoint: what comes in is checked here, and what goes out is put into words here.

An update takes this way: `update_scores`, those that arrived together (or `update_score`, one that came alone, and then
its body) → `_submit` → Scores → `on_outcomes`.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Coroutine
from typing import Any, Final

import msgspec
import psycopg

from server.answers import JSON, NO_STORE, OK
from server.auth import Authenticator, Caller, ClientAddress, FailureLimit
from server.batches import IdempotencyKey, Outcome, fingerprint
from server.bodies import Change, Result, SpelledChange, whole_number
from server.config import Settings
from server.database import TOP_LIMIT, Database
from server.errors import Problem, ProblemType, not_applied
from server.events import CONTROL_CHARACTERS, MAX_PLAYER, MAX_SCORE
from server.instruments import CONTENT_TYPE, Metrics
from server.keys import default_board, idempotency_name
from server.live import Live
from server.openapi import MAX_IDEMPOTENCY_KEY, OPENAPI_PATH, document
from server.pages import page_json
from server.queries import query_fields
from server.scores import Scores
from server.shards import Shards
from server.uws import Handler, Request, Server
from server.uws_native import Flight, Post
from server.web_files import WEB, WebFile, read_files
from server.websocket_protocol import check_handshake, upgrade_required

MAX_BODY_BYTES: Final = 16 * 1024
PREFLIGHT_S: Final = 7200
LONGEST_TARGET: Final = 128
"""Longest path and query to remember, in bytes: any that is asked for in earnest is shorter."""

LONGEST_VALUE: Final = 256
"""Of a field of a query, encoded: a board's name has 64 characters."""

_VISIBLE_ASCII: Final = re.compile(rb"[\x21-\x7e]+")
_VARY: Final = b"\r\nVary: Origin"
_EXPOSED: Final = "Retry-After, RateLimit, RateLimit-Policy, Idempotent-Replayed, X-Request-Id"
_ANY_ORIGIN: Final = f"\r\nAccess-Control-Allow-Origin: *\r\nAccess-Control-Expose-Headers: {_EXPOSED}".encode()
# The last six are what tracing, monitoring and HTTP libraries add by themselves. A browser drops a request that has a
# header which the preflight does not name.
_ALLOWED_HEADERS: Final = (
    b"Authorization, Content-Type, Idempotency-Key, X-Request-Id, X-Requested-With, Cache-Control, "
    b"traceparent, tracestate, baggage, sentry-trace"
)
_REPLAYED: Final = b"200 OK\r\nIdempotent-Replayed: true"
_FROM_DATABASE: Final = b"200 OK\r\nScoreboard-Source: database"


_decode_change = msgspec.json.Decoder(Change).decode
_decode_spelled = msgspec.json.Decoder(SpelledChange).decode
_encode = msgspec.json.Encoder().encode


class Routes:
    """The endpoints; `register` puts them into a server."""

    def __init__(self, settings: Settings, authenticator: Authenticator, database: Database) -> None:
        self._settings = settings
        self._authenticator = authenticator
        self._database = database
        self._client = ClientAddress(settings.trusted_proxies)
        self._failures = FailureLimit(settings.auth_failures_per_minute)
        self._boards = frozenset(settings.boards)
        self._default_board = default_board(settings.boards)
        self._pages: dict[bytes, tuple[str, int]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._by_address = settings.rate_limit_by == "ip"
        self._needs_forwarded = self._client.needs_header
        self.scores: Scores | Shards
        self.live: Live

    def register(self, server: Server, scores: Scores | Shards, live: Live, metrics: Metrics) -> None:
        """Add every route."""
        self._server, self.scores, self.live, self._metrics = server, scores, live, metrics
        server.slow_s = self._settings.slow_request_s
        server.by_origin = "*" not in self._settings.cors_origins
        server.head_lines = NO_STORE + (_VARY if server.by_origin else _ANY_ORIGIN)
        self._route(
            "/update-score", {"POST": self.update_score},
            on_posts=self.update_scores, max_body_bytes=MAX_BODY_BYTES, reads_forwarded=self._needs_forwarded,
        )  # fmt: skip
        self._route("/leaderboard", {"GET": self.leaderboard, "HEAD": self.leaderboard}, on_flight=self.leaderboard_for)
        for path, handler in (("/healthz", self.healthz), ("/readyz", self.readyz)):
            self._route(path, {"GET": handler, "HEAD": handler})
        if not self._settings.metrics_port:
            self._route("/metrics", {"GET": self.show_metrics, "HEAD": self.show_metrics})
        files = read_files(WEB, self._settings.boards)
        types = {path: file.content_type.decode() for path, file in files.items()}
        files[OPENAPI_PATH] = WebFile(document(self._settings.boards, types), JSON)
        for path, file in files.items():
            self._route(path, {"GET": file.answer, "HEAD": file.answer})
        self._route("/live-updates", {}, upgrade=True)
        server.route("/*", {"*": self._with_cors(self.unknown)})

    # ------------------------------------------------------------------ endpoints

    def update_score(self, request: Request) -> None:
        """POST /update-score"""
        refuse_encoding(request.joined_header(b"content-encoding"))
        forwarded_for = request.joined_header(b"x-forwarded-for") if self._needs_forwarded else b""
        request.context = (request.header(b"authorization"), request.header(b"idempotency-key"), forwarded_for)
        request.read_body(MAX_BODY_BYTES, self._submit_alone)

    def _submit_alone(self, request: Request) -> None:
        self._submit(request, *request.context)

    def update_scores(self, posts: list[Post]) -> None:
        """POST /update-score, several at once."""
        submit = self._submit
        for post in posts:
            try:
                submit(post, post.authorization, post.idempotency_key, post.forwarded_for)
            except Problem as problem:
                post.problem(problem)
            except Exception as error:
                post.fail(error)
        self.scores.flush()  # all of this turn are here

    def _submit(self, request: Request | Post, authorization: bytes, raw_key: bytes, forwarded_for: bytes) -> None:
        caller = self._caller(request, authorization, forwarded_for)
        change = parse_change(request.body)
        board = self._default_board if change.board is msgspec.UNSET else change.board
        if board not in self._boards:
            raise Problem(404, f"board: expected one of {', '.join(self._settings.boards)}, got {board[:80]!r}")
        player, delta = change.player_id, change.score_delta
        if not self._authenticator.may_write(caller, player):
            raise _forbidden(caller, player)
        subject = self._address(request, forwarded_for) if self._by_address else caller.subject
        key = None
        if raw_key:
            name = idempotency_name(caller.subject, parse_idempotency_key(raw_key))
            key = IdempotencyKey(name, fingerprint(board, player, delta), "" if caller.is_writer else caller.subject)
        request.context = player
        if caller.is_writer:
            request.is_writer = True
        self.scores.submit(board, player, delta, subject, 2 if caller.is_writer else 1, request, key)

    def on_outcomes(self, requests: list[Request | Post], results: list[int]) -> None:
        """Scores: updates were decided; `results` are (outcome, value) of each, flat."""
        posts: list[Post] = []
        bodies: list[bytes] = []
        pairs = iter(results)
        try:
            for request, outcome, value in zip(requests, pairs, pairs, strict=True):
                if outcome == Outcome.APPLIED and type(request) is Post:
                    posts.append(request)
                    bodies.append(_encode(Result(request.context, value)))
                else:
                    self._on_outcome(request, outcome, value)
        finally:
            if posts and self._server.waiting is not None:
                self._server.waiting.answer_posts(posts, bodies, OK)

    def _on_outcome(self, request: Request | Post, outcome: int, value: int) -> None:
        if outcome == Outcome.APPLIED:
            request.answer(OK, _encode(Result(request.context, value)))
        elif outcome == Outcome.REPLAYED:
            request.answer(_REPLAYED, _encode(Result(request.context, value)))
        elif outcome == Outcome.LIMITED:
            self.on_problem(request, self._limited(value, is_writer=request.is_writer))
        elif outcome == Outcome.OUT_OF_RANGE:
            detail = f"scoreDelta: expected a resulting |score| of at most {MAX_SCORE}; the score is {value}"
            self.on_problem(request, Problem(400, detail))
        elif outcome == Outcome.REUSED:
            self.on_problem(request, Problem(422, "Idempotency-Key: expected the payload it came with before"))
        elif outcome == Outcome.CROWDED:
            allowed, ttl_s = self._settings.idempotency_max_per_subject, self._settings.idempotency_ttl_s
            detail = f"Idempotency-Key: expected at most {allowed} different ones in {ttl_s} s"
            self.on_problem(request, Problem(429, detail, headers=(("Retry-After", "60"),)))
        else:
            self.on_problem(request, not_applied("the board is damaged and being rebuilt"))

    def on_problem(self, request: Request | Post, problem: Problem) -> None:
        """Scores: an update was refused."""
        request.problem(problem)

    def leaderboard(self, request: Request) -> None:
        """GET /leaderboard"""
        target = request.target
        page = self._pages.get(target)
        if page is None:
            page = parse_page(request.query, self._settings.boards, self._default_board)
            if len(target) <= LONGEST_TARGET:
                if len(self._pages) >= TOP_LIMIT:
                    self._pages.clear()  # what is asked for in earnest comes again
                self._pages[target] = page
                self._server.share(target, page)
        request.context = page
        self.scores.read_page(*page, request)

    def leaderboard_for(self, flight: Flight) -> None:
        """GET /leaderboard for targets that were asked for before."""
        board, limit = flight.context
        self.scores.read_page(board, limit, flight)

    def on_page(self, reader: Request | Flight, page: bytes | None) -> None:
        """Scores: a page was read, or Redis cannot be read."""
        if page is None:
            self._spawn(self._leaderboard_from_database(reader))
            return
        reader.answer(OK, page)

    async def _leaderboard_from_database(self, reader: Request | Flight) -> None:
        board, limit = reader.context
        try:
            page = page_json(await self._database.top(board, limit))
        except (psycopg.Error, OSError, TimeoutError):
            detail = "neither Redis nor the database can be read now"
            reader.problem(Problem(503, detail, kind=ProblemType.UNAVAILABLE, headers=(("Retry-After", "1"),)))
            return
        reader.answer(_FROM_DATABASE, page)

    def healthz(self, request: Request) -> None:
        """GET /healthz: the process is alive."""
        request.answer(OK, b'{"alive":true}')

    def readyz(self, request: Request) -> None:
        """GET /readyz: what works; 503 while draining or when boards cannot even be read."""
        self._spawn(self._readyz(request))

    async def _readyz(self, request: Request) -> None:
        scores, live = self.scores, self.live
        write: dict[str, Any] = {"ok": scores.epoch is not None and not scores.outbox_full}
        if not write["ok"]:
            write["detail"] = scores.reason or "the outbox is full: is the relay or Kafka down?"
        read: dict[str, Any] = {"ok": True, "source": "redis"}
        if scores.epoch is None:
            read["source"] = "database"
            try:
                await self._database.top(self._default_board, 1)
            except (psycopg.Error, OSError, TimeoutError) as error:
                read = {"ok": False, "detail": f"neither Redis nor the database can be read: {type(error).__name__}"}
        ready = read["ok"] and not self._server.draining
        body = {"ready": ready, "draining": self._server.draining, "read": read, "write": write}
        body["live"] = {"ok": live.is_live, **({"detail": live.trouble} if live.trouble else {})}
        head = OK if ready else b"503 Service Unavailable\r\nRetry-After: 1"
        request.answer(head, _encode(body))

    def show_metrics(self, request: Request) -> None:
        """GET /metrics"""
        request.answer(OK, self._metrics.text(), CONTENT_TYPE)

    def unknown(self, request: Request) -> None:
        """Any other path."""
        if request.method == "OPTIONS":
            self._preflight(request)
        else:
            raise Problem(404, "no such path: see the README for what there is")

    # ------------------------------------------------------------------ shared steps

    def _route(
        self, path: str, handlers: dict[str, Handler], *, upgrade: bool = False, **together: Any
    ) -> None:  # fmt: skip
        allowed = ", ".join([*(("GET", "HEAD") if upgrade else handlers), "OPTIONS"])

        def other_method(request: Request) -> None:
            if request.method == "OPTIONS":
                self._preflight(request)
            elif upgrade and request.method in ("GET", "HEAD"):
                if request.method == "GET":
                    check_handshake(request.joined_header)
                raise upgrade_required("expected a WebSocket upgrade")
            else:
                raise Problem(405, f"expected one of {allowed}", headers=(("Allow", allowed),))

        cors = {method: self._with_cors(handler) for method, handler in {**handlers, "*": other_method}.items()}
        self._server.route(path, cors, **together)

    def _with_cors(self, handler: Handler) -> Handler:
        """Let browsers of the allowed origins see the answer; `*` is the same for all and set once."""
        origins = frozenset(self._settings.cors_origins)
        if "*" in origins:
            return handler

        def handle(request: Request) -> None:
            origin = request.header(b"origin").decode("latin-1")
            if origin in origins:
                lines = f"\r\nAccess-Control-Allow-Origin: {origin}\r\nAccess-Control-Expose-Headers: {_EXPOSED}"
                request.head_lines += lines.encode()
            handler(request)

        return handle

    @staticmethod
    def _preflight(request: Request) -> None:
        request.answer(
            b"204 No Content\r\nAccess-Control-Allow-Methods: GET, HEAD, POST, OPTIONS"
            b"\r\nAccess-Control-Allow-Headers: %b"
            b"\r\nAccess-Control-Max-Age: %d" % (_ALLOWED_HEADERS, PREFLIGHT_S),
            None,
            b"",
        )

    def _caller(self, request: Request | Post, authorization: bytes, forwarded_for: bytes) -> Caller:
        try:
            return self._authenticator.caller(authorization)
        except Problem as problem:
            if not authorization:
                raise
            wait_s = self._failures.failed(self._address(request, forwarded_for), time.monotonic())
            if not wait_s:
                raise
            detail = f"too many bad tokens from this address; the last one: {problem.detail}"
            headers = (("Retry-After", str(int(wait_s) + 1)),)
            raise Problem(429, detail, headers=headers, close=True) from problem

    def _address(self, request: Request | Post, forwarded_for: bytes) -> str:
        return self._client.of(request.peer, forwarded_for.decode("latin-1"))

    def _limited(self, wait_us: int, *, is_writer: bool) -> Problem:
        """429 with the fields of draft-ietf-httpapi-ratelimit-headers, as they are for players or for game servers."""
        settings, wait_s = self._settings, -(-wait_us // 1_000_000)
        rate, burst = settings.rate_limit_per_second, settings.rate_limit_burst
        if is_writer:
            rate, burst = settings.rate_limit_writers_per_second, settings.rate_limit_writers_burst
        window_s = max(1, round(burst / (rate or 1)))
        return Problem(
            429,
            f"expected at most {rate:g} updates a second, {burst} at once",
            headers=(
                ("Retry-After", str(wait_s)),
                ("RateLimit-Policy", f'"updates";q={burst};w={window_s}'),
                ("RateLimit", f'"updates";r=0;t={wait_s}'),
            ),
        )

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def refuse_encoding(content_encoding: bytes) -> None:
    """Raises Problem 415 for a body that is compressed."""
    if content_encoding.strip().lower() not in (b"", b"identity"):
        came = content_encoding[:40].decode("latin-1")
        # RFC 9110, 15.5.16: the answer says what would have been taken.
        accepted = (("Accept-Encoding", "identity"),)
        raise Problem(415, f"Content-Encoding: expected none, got {came!r}", headers=accepted)


def parse_change(body: bytes) -> Change:
    """The change in a request's body.

    Raises Problem 400, naming the field, what was expected and what came.
    """
    try:
        change = _decode_change(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        change = _change_of_decimal(body, error)
    player, delta = change.player_id, change.score_delta
    if not 1 <= len(player) <= MAX_PLAYER:
        raise Problem(400, f"playerId: expected 1 to {MAX_PLAYER} characters, got {len(player)}")
    if not player.isprintable() and CONTROL_CHARACTERS.search(player):
        raise Problem(400, f"playerId: expected no control characters, got {player!r}")
    if not -MAX_SCORE <= delta <= MAX_SCORE:
        raise Problem(400, _out_of_range(str(delta)[:40]))
    return change


def _change_of_decimal(body: bytes, failure: Exception) -> Change:
    """The change of a body that `_decode_change` did not take, if only for how it spells an integer: 5.0, 5e0, 50e-1.

    Raises Problem 400, for `failure` if it was another.
    """
    try:
        spelled = _decode_spelled(body)
        delta = whole_number(bytes(spelled.score_delta))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        delta = None
    if delta is None:
        raise Problem(400, _decode_failure(failure)) from failure
    if abs(delta) > MAX_SCORE:
        raise Problem(400, _out_of_range(bytes(spelled.score_delta)[:40].decode())) from failure
    return Change(spelled.player_id, delta, spelled.board)


def _out_of_range(came: str) -> str:
    return f"scoreDelta: expected an integer from -{MAX_SCORE} to {MAX_SCORE}, got {came}"


def parse_idempotency_key(raw: bytes) -> str:
    """The key in an Idempotency-Key header.

    Raises Problem 400.
    """
    if len(raw) > MAX_IDEMPOTENCY_KEY or not _VISIBLE_ASCII.fullmatch(raw):
        shown = raw[:40].decode("latin-1")
        raise Problem(
            400, f"Idempotency-Key: expected 1 to {MAX_IDEMPOTENCY_KEY} visible ASCII characters, got {shown!r}"
        )
    return raw.decode("ascii")


def _decode_failure(error: Exception) -> str:
    """msgspec says `Expected …, got … - at `$.field``: the field comes first here."""
    said, _, path = str(error).partition(" - at `$")
    if isinstance(error, msgspec.ValidationError):
        field = path.strip("`.") or "body"
        if said == "Integer value out of range":
            said = f"expected an integer from -{MAX_SCORE} to {MAX_SCORE}, got a larger one"
        return f"{field}: {said[:1].lower()}{said[1:]}"
    return f"body: expected JSON, got something else: {said}"


def parse_page(query: str, boards: tuple[str, ...], default_board: str) -> tuple[str, int]:
    """(board, limit) of `?limit=10&board=main`.

    Raises Problem 400 or 404.
    """
    fields = query_fields(query, LONGEST_VALUE)
    limit, board = fields.get("limit", "10"), fields.get("board", default_board)
    if not re.fullmatch("[0-9]{1,4}", limit) or not 1 <= int(limit) <= TOP_LIMIT:
        raise Problem(400, f"limit: expected an integer from 1 to {TOP_LIMIT}, got {limit[:80]!r}")
    if board not in boards:
        raise Problem(404, f"board: expected one of {', '.join(boards)}, got {board[:80]!r}")
    return board, int(limit)


def _forbidden(caller: Caller, player: str) -> Problem:
    challenge = 'Bearer realm="scoreboard", error="insufficient_scope", scope="scores:write"'
    return Problem(
        403,
        f"the token of {caller.subject!r} may not write {player!r}: expected its own playerId, or scope scores:write",
        headers=(("WWW-Authenticate", challenge),),
    )
