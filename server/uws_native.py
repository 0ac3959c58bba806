"""Requests that wait in C, in uws_native.c, until Python has something for all of them, and what comes in, which
uws_wire.c puts in order first; they change together.

GETs of the same target share an answer (Flight); POSTs come several at once, and go several at once (Post). Whatever
does not fit goes to server/uws.py one by one, and so does everything where the library was not built.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import secrets
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import cffi
import msgspec

from server.answers import JSON, OK, PROBLEM_JSON, fault, head_of, log_slow, new_id
from server.errors import Problem, UwsError
from server.instruments import LATENCY_BOUNDS_S, Answers

LIBRARY: Final = Path(__file__).with_name("libuws_native.so")
_MAX_HEAD_BYTES: Final = 3900
"""Of an answer's status and header lines, without its id."""

_INTERFACE: Final = 2
_NO_TARGET: Final = -1

_ffi: Final = cffi.FFI()
_ffi.cdef(
    """
    struct route {
        void (*fallback)(void *res, void *req, void *user_data);
        void (*boarding)(int target, int flight);
        bool by_origin;
        bool reads_forwarded;
        uint32_t max_body;
    };
    struct answered {
        uint64_t requests;
        double sum_s;
        double longest_s;
        char longest_id[129];
    };
    int native_interface(void);
    void native_begin(const char *prefix, void (*on_complete)(void));
    int native_places(void);
    int native_responses(uintptr_t *responses);
    int flight_target(const char *text, size_t length);
    void flight_board(void *res, void *req, void *user_data);
    void flight_depart(int number);
    void flight_answer(int number, const char *head, size_t head_length, const char *body, size_t body_length,
                       const char *content_type, size_t content_type_length, bool close_connection,
                       const double *bounds, int bound_count, uint64_t *counts, struct answered *answered);
    void post_begin(void *res, void *req, void *user_data);
    const char *posts_take(size_t *length);
    void posts_answer(const uint64_t *tokens, const uint32_t *body_lengths, int count, const char *head,
                      size_t head_length, const char *bodies, const char *content_type, size_t content_type_length,
                      bool close_connection, const double *bounds, int bound_count, uint64_t *counts,
                      struct answered *answered);
    int posts_open(void);
    uint64_t posts_overdue(int *place, double before_s, bool awaits_body, double *received_s, char *id);
    size_t post_peer(uint64_t token, const char **text);
    void wire_refusal(int status, const char *answer, int length);
    bool wire_begin(void *listen_socket, void (*on_waiting)(void));
    bool wire_answers(void *res);
    void wire_resume(void);
    """
)
_BOUNDS: Final = _ffi.new("double[]", LATENCY_BOUNDS_S)
_answered: Final = _ffi.new("struct answered *")  # one is enough: it is read before the next call
_length: Final = _ffi.new("size_t *")
_text: Final = _ffi.new("const char **")

_log = logging.getLogger(__name__)

OnFlight = Callable[["Flight"], None]
OnPosts = Callable[["list[Post]"], None]


class Host(Protocol):
    """What waits here of the server that the requests come to."""

    draining: bool
    head_lines: bytes
    by_origin: bool
    slow_s: float


class Handler(NamedTuple):
    """For uWebSockets: a function `void(uws_res_t*, uws_req_t*, void*)` and its user data, as addresses."""

    function: int
    user_data: int


def load(uws_library: str) -> Any:
    """The functions above, or None where they were not built; `uws_library` is where uWebSockets' are."""
    if not LIBRARY.exists():
        _log.warning("%s is missing: requests cost half as much again, and unusual ones are not read", LIBRARY)
        return None
    ctypes.CDLL(uws_library, mode=ctypes.RTLD_GLOBAL)  # where the library finds them
    try:
        native = _ffi.dlopen(str(LIBRARY))
        found = native.native_interface()
    except (OSError, AttributeError) as error:
        _log.error("%s cannot be used, install the package anew: %s", LIBRARY.name, error)
        return None
    if found != _INTERFACE:
        _log.error("%s is of another version, %d, install the package anew", LIBRARY.name, found)
        return None
    return native


class Waiting:
    """All that wait in C. There is one per process."""

    def __init__(self, native: Any, host: Host) -> None:
        self._native = native
        self._host = host
        self._flights: dict[int, Flight] = {}
        self._contexts: dict[int, Any] = {}
        self._post_answers = Answers()
        self._kept: list[Any] = []
        self._loop = asyncio.get_running_loop()
        prefix = secrets.token_hex(4).encode() + b"-"
        native.native_begin(prefix, self._callback("void(*)(void)", self._on_complete))
        _running.append(self)

    # ------------------------------------------------------------------ routes

    def flights(self, fallback: int, on_flight: OnFlight, answers: Answers) -> Handler:
        """The handler for GETs of a route; those whose target was not given to `share` go to `fallback`."""

        def board(target: int, number: int) -> None:
            flight = self._flights[number] = Flight(self, number, self._contexts[target], answers)
            try:
                on_flight(flight)
            except Exception as error:
                flight.fail(error)

        boarding = self._callback("void(*)(int, int)", board)
        return self._handler(self._native.flight_board, fallback, boarding, False, 0)

    def posts(
        self, fallback: int, on_posts: OnPosts, answers: Answers, max_body_bytes: int, reads_forwarded: bool
    ) -> Handler:
        """The handler for POSTs of the one route that may have it; `fallback` gets those without a plain body."""
        self._on_posts, self._post_answers = on_posts, answers
        return self._handler(self._native.post_begin, fallback, _ffi.NULL, reads_forwarded, max_body_bytes)

    def share(self, target: bytes, context: Any) -> None:
        """From now on, GETs of `target` share answers; their flights have this `context`."""
        number = self._native.flight_target(target, len(target))
        if number != _NO_TARGET:
            self._contexts[number] = context

    def _handler(self, function: Any, fallback: int, boarding: Any, reads_forwarded: bool, max_body: int) -> Handler:
        fallback = _ffi.cast("void (*)(void *, void *, void *)", fallback)
        route = _ffi.new("struct route *", (fallback, boarding, self._host.by_origin, reads_forwarded, max_body))
        self._kept.append(route)
        return Handler(_address(function), _address(route))

    def _callback(self, signature: str, function: Callable[..., None]) -> Any:
        callback = _ffi.callback(signature, function, onerror=report)
        self._kept.append(callback)
        return callback

    # ------------------------------------------------------------------ the wire: see uws_wire.c

    def watch(self, listen_socket: int, refusals: Sequence[Problem]) -> None:
        """Put in order what comes in on connections to `listen_socket`; what cannot be is answered with `refusals`.

        Raises UwsError where the library is not the one that this was written for.
        """
        for problem in refusals:
            head, body = head_of(problem) + self._host.head_lines, problem.body()
            fields = b"Content-Type: %b\r\nContent-Length: %d\r\nConnection: close" % (PROBLEM_JSON, len(body))
            answer = b"HTTP/1.1 %b\r\n%b\r\n\r\n%b" % (head, fields, body)
            self._native.wire_refusal(problem.status, answer, len(answer))
        on_waiting = self._callback("void(*)(void)", self._on_waiting)
        if not self._native.wire_begin(_ffi.cast("void *", listen_socket), on_waiting):
            raise UwsError("uSockets' handlers cannot be replaced: expected the socketify of constraints.txt")

    def ends(self, res: Any) -> bool:
        """To be asked once before each answer: whether it is the last on its connection."""
        return bool(self._native.wire_answers(res))

    def _on_waiting(self) -> None:
        """A request waits behind one that is being answered now."""
        self._loop.call_soon(self._native.wire_resume)

    # ------------------------------------------------------------------ answers

    def answer_flight(self, number: int, answers: Answers, head: bytes, body: bytes, kind: bytes, close: bool) -> int:
        """Answer all of a flight; how many were still there."""
        host, full = self._host, self._full(head)
        del self._flights[number]
        self._native.flight_answer(
            number, full, len(full), body, len(body), kind, len(kind), close or host.draining,
            _BOUNDS, len(_BOUNDS), _ffi.from_buffer("uint64_t[]", answers.seconds.counts), _answered,
        )  # fmt: skip
        count = _count_answered(answers, head)
        if _answered.longest_s > host.slow_s:
            slowest, others = _ffi.string(_answered.longest_id), f"with {count - 1} others for the same"
            log_slow(slowest, head[:3], _answered.longest_s, others)
        return count

    def answer_posts(
        self, posts: Sequence[Post], bodies: Sequence[bytes], head: bytes, kind: bytes = JSON, *, close: bool = False
    ) -> int:
        """Answer each with its body, see `Request.answer`; how many were still there."""
        host, answers, full = self._host, self._post_answers, self._full(head)
        self._native.posts_answer(
            _ffi.from_buffer("uint64_t[]", array("Q", [post.token for post in posts])),
            _ffi.from_buffer("uint32_t[]", array("I", map(len, bodies))),
            len(posts), full, len(full), b"".join(bodies), kind, len(kind), close or host.draining,
            _BOUNDS, len(_BOUNDS), _ffi.from_buffer("uint64_t[]", answers.seconds.counts), _answered,
        )  # fmt: skip
        count = _count_answered(answers, head)
        if _answered.longest_s > host.slow_s:
            now_s = time.monotonic()
            for post in posts:
                if (seconds := now_s - post.received_s) > host.slow_s:
                    log_slow(post.id, head[:3], seconds, post.parts)
        return count

    def refuse_post(self, post: Post, problem: Problem) -> bool:
        """Answer a POST with a problem document."""
        sent = self.answer_posts([post], [problem.body()], head_of(problem), PROBLEM_JSON, close=problem.close) == 1
        if sent:
            self._post_answers.problems[problem.kind] += 1
        return sent

    def _full(self, head: bytes) -> bytes:
        full = head + self._host.head_lines
        if len(full) > _MAX_HEAD_BYTES:  # C would end the process
            raise UwsError(f"expected status and header lines of at most {_MAX_HEAD_BYTES} bytes, got {len(full)}")
        return full

    def _on_complete(self) -> None:
        """The first POST of this turn of the loop is complete."""
        self._loop.call_soon(self._take_posts)

    def _take_posts(self) -> None:
        packed = self._native.posts_take(_length)
        self._on_posts(_decode_posts(_ffi.unpack(packed, _length[0])))

    # ------------------------------------------------------------------ what the server asks

    def peer(self, post: Post) -> str:
        """Where a POST came from, "" once its client is gone."""
        length = self._native.post_peer(post.token, _text)
        return _ffi.unpack(_text[0], length).decode() if length else ""

    def responses(self) -> list[int]:
        """The addresses of the responses of all that wait here."""
        room = _ffi.new("uintptr_t[]", self._native.native_places())
        count = self._native.native_responses(room)
        return _ffi.unpack(room, count) if count else []

    @property
    def is_empty(self) -> bool:
        """Whether nobody waits."""
        return not self._flights and not self._native.posts_open()

    def sweep(self, bodies_before_s: float, before_s: float, too_slow: Problem, unanswered: TimeoutError) -> None:
        """Refuse POSTs whose body should have come by now, and end what should have been answered."""
        for post in self._overdue(bodies_before_s, awaits_body=True):
            post.problem(too_slow)
        for post in self._overdue(before_s, awaits_body=False):
            post.fail(unanswered)
        for flight in list(self._flights.values()):
            if flight.received_s < before_s:
                flight.fail(unanswered)

    def _overdue(self, before_s: float, *, awaits_body: bool) -> Iterator[Post]:
        place, received_s, name = _ffi.new("int *"), _ffi.new("double *"), _ffi.new("char[129]")
        while token := self._native.posts_overdue(place, before_s, awaits_body, received_s, name):
            yield Post(token, received_s[0], _ffi.string(name), b"", b"", b"", b"")


_running: list[Waiting] = []
"""That of this process: a Post has no room for it."""


class Flight:
    """GETs of one target that share an answer, so that Python runs once for all of them."""

    __slots__ = ("_answers", "_done", "_number", "_waiting", "context", "received_s")

    def __init__(self, waiting: Waiting, number: int, context: Any, answers: Answers) -> None:
        self._waiting = waiting
        self._number = number
        self._answers = answers
        self._done = False
        self.context = context
        """What was given to `share` with their target."""
        self.received_s = time.monotonic()
        """When the first of them was complete."""

    def depart(self) -> None:
        """Take in nobody else: later requests wait for the next flight."""
        if not self._done:
            self._waiting._native.flight_depart(self._number)

    def answer(self, head: bytes, body: bytes, content_type: bytes = JSON, *, close: bool = False) -> int:
        """Answer all of them, see `Request.answer`; how many were still there."""
        if self._done:
            return 0
        count = self._waiting.answer_flight(self._number, self._answers, head, body, content_type, close)
        self._done = True
        return count

    def problem(self, problem: Problem) -> None:
        """Answer all of them with a problem document."""
        if count := self.answer(head_of(problem), problem.body(), PROBLEM_JSON, close=problem.close):
            self._answers.problems[problem.kind] += count

    def fail(self, error: BaseException) -> None:
        """Answer a fault of ours, see `Request.fail`."""
        self.problem(fault(new_id(), error))


class Post(msgspec.Struct, array_like=True, gc=False):
    """A POST with its body; it is best answered together with others, by `Waiting.answer_posts`."""

    token: int
    received_s: float
    """When it was complete, on the monotonic clock."""
    id: bytes
    """What the client calls it (X-Request-Id), or else what we call it."""
    authorization: bytes
    idempotency_key: bytes
    forwarded_for: bytes
    """All of X-Forwarded-For, b"" where that is not wanted."""
    body: bytes
    context: Any = None
    """Whatever the handler needs later."""
    parts: str = ""
    """Where its time went, for the log; there only if it took long."""
    is_writer: bool = False
    """Whether the rate limit of game servers counts."""

    @property
    def peer(self) -> str:
        """The address at the other end of the connection, "" once answered."""
        return _running[-1].peer(self)

    def answer(self, head: bytes, body: bytes, content_type: bytes = JSON, *, close: bool = False) -> bool:
        """Answer this one, see `Request.answer`."""
        return _running[-1].answer_posts([self], [body], head, content_type, close=close) == 1

    def problem(self, problem: Problem) -> bool:
        """Answer with a problem document."""
        return _running[-1].refuse_post(self, problem)

    def fail(self, error: BaseException) -> bool:
        """Answer a fault of ours, see `Request.fail`."""
        return self.problem(fault(self.id, error))


_decode_posts: Final = msgspec.msgpack.Decoder(list[Post]).decode


def _count_answered(answers: Answers, head: bytes) -> int:
    """Count what C has answered just now; how many it were."""
    count: int = _answered.requests
    answers.seconds.sum += _answered.sum_s
    if head is OK:
        answers.ok += count
    elif count:
        answers.by_status[head[:3]] += count
    return count


def _address(pointer: Any) -> int:
    return int(_ffi.cast("uintptr_t", pointer))


def report(exception: type[BaseException], value: BaseException, traceback: Any) -> None:
    """Say what escaped a C callback; cffi would print it to a terminal nobody reads."""
    _log.error("callback failed", exc_info=(exception, value, traceback))
