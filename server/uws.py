"""uWebSockets, which only this module, uws_native.py and its C touch: everything else sees Server, Request and Socket.

socketify's wheel carries the library; its Python wrappers are not used, because they keep C pointers alive
through reference cycles and abort the process under load. Here the C side only ever holds an integer token.
Whatever can go wrong in C is made impossible at this border:

* a Request is answered once, or not at all if its client is gone; a handler that raises still answers;
* a Socket drops its pointer in the close callback, so a late send is a value (CLOSED), never a crash;
* a client that breaks WebSocket's rules is told so (server/websocket_protocol.py), where the library just hangs up;
* bodies and waiting times are bounded here, since uWebSockets bounds neither;
* what its parser of 2023 would misread is put in order, or refused, before it sees it (uws_wire.c).

uWebSockets runs on uvloop's own libuv loop: one loop, one epoll, nothing to pump. Three rules follow:
uvloop's libuv is made visible before socketify's library is opened; the loop is never closed (uvloop would take
uWebSockets' handles for its own and crash), so `run` ends the process; Linux only. Knows nothing of scores.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import enum
import logging
import math
import os
import re
import signal
import socket
import struct
import sys
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final, NoReturn, Protocol, cast

import _cffi_backend
import uvloop.loop

from server import listening, uws_native
from server.answers import ID_PREFIX, JSON, OK, PROBLEM_JSON, fault, head_of, log_slow, tokens
from server.errors import CloseCode, Problem, UwsError
from server.instruments import LATENCY_BOUNDS_S, Answers
from server.machine import this_machine, why_unusable
from server.signals import insists, stop_signals
from server.uws_native import OnFlight, OnPosts, Waiting, report
from server.websocket_protocol import FrameCheck, check_handshake

if unusable := why_unusable(*this_machine()):
    raise UwsError(unusable)
if "socketify.native" in sys.modules:
    raise UwsError("socketify's library was opened before uvloop's libuv was made visible")
ctypes.CDLL(uvloop.loop.__file__, mode=ctypes.RTLD_GLOBAL)
if not hasattr(ctypes.CDLL(None), "uv_run"):
    raise UwsError("this uvloop does not export libuv's functions: expected the one in constraints.txt")
try:
    from socketify.native import ffi, lib, library_path
except (ImportError, OSError) as error:
    raise UwsError(f"socketify's library cannot be opened, are it and libuv1 installed? {error}") from error

_log = logging.getLogger(__name__)

SSL: Final = 0
TEXT: Final = 1

BACKLOG: Final = 4096
"""Connections waiting to be accepted; uSockets asks for 512, too few for a reconnect storm."""

SEND_BUFFER_BYTES: Final = 65_536
"""SO_SNDBUF that accepted sockets inherit: it bounds what the kernel buffers for a client that never reads."""

_NO_LINGER: Final = struct.pack("ii", 1, 0)
_SO_ATTACH_FILTER: Final = 26
# Classic BPF over the TCP header: drops a SYN without ACK, the beginning of a connection, and lets all else pass.
_NO_NEW_CONNECTIONS: Final = b"".join(
    struct.pack("HBBI", *instruction)
    for instruction in (
        (0x30, 0, 0, 13),  # load the flags
        (0x54, 0, 0, 0x12),  # of them SYN and ACK
        (0x15, 0, 1, 0x02),  # SYN alone?
        (0x06, 0, 0, 0),  # drop
        (0x06, 0, 0, 0xFFFFFFFF),  # pass
    )
)
EXCLUSIVE_PORT: Final = 1
SHARED_PORT: Final = 0

BODY_TIMEOUT_S: Final = 10.0
"""Longest a body may take to arrive; uWebSockets itself bounds only the pauses in it."""

SWEEP_INTERVAL_S: Final = 0.25
LATE_SWEEP_S: Final = 1.0
"""A sweep that comes so much later than it should finds a process that was stopped: SIGSTOP, a sleeping machine."""
HEADERS_WITHIN_S: Final = 7.5
"""How long a new connection may take to send its first request. uSockets would close it after 8 to 12 s, unless a byte
comes now and then; it looks once in 4 s, so thousands would be closed, and be back, at the same moment."""

HANDSHAKE_S: Final = 0.05
"""How long the port takes no new connection before it closes: those that are being made come through meanwhile."""

LINGER_S: Final = 0.5
"""Longest that open connections without a request hold up the end: one may be on its way."""

MAX_TARGET_BYTES: Final = 8192
"""Longest path and query that a route gets to see: RFC 9110, 4.1, asks for 8000, and decoding has its price."""

DISCARD_BYTES: Final = 4 * 2**20
"""How much of a body that is too large is read and dropped, so that its sender gets to see the 413."""

_poll = ctypes.CDLL(library_path).us_poll_fd
_poll.argtypes, _poll.restype = [ctypes.c_void_p], ctypes.c_int
_on_data_of = ctypes.CDLL(library_path).us_socket_context_on_data
_on_data_of.argtypes, _on_data_of.restype = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p], None
_CONTEXT_WORDS: Final = 32
"""Of uSockets' struct us_socket_context_t, which is smaller: one of them is the handler of incoming data."""
_GOOD_ID: Final = re.compile(rb"[\x21-\x7e]{1,128}")

_TARGET_TOO_LONG: Final = Problem(414, f"expected a path and query of at most {MAX_TARGET_BYTES} bytes, got more")

_REFUSALS: Final = (
    Problem(400, "expected a request of HTTP/1.1 as in RFC 9112, with one Host and a body of the length that it says"),
    _TARGET_TOO_LONG,
    Problem(417, "Expect: expected 100-continue, or no such header"),
    Problem(431, "expected at most 48 header lines, and 16384 bytes of them"),
    Problem(501, "Transfer-Encoding: expected chunked, or no such header; method: expected one of RFC 9110, or PATCH"),
    Problem(505, "expected HTTP/1.1 or HTTP/1.0"),
)
"""What uws_wire.c answers with where there is no request to answer."""

Handler = Callable[["Request"], None]


class SendStatus(enum.IntEnum):
    """What became of a message; BACKPRESSURE means buffered, not lost."""

    BACKPRESSURE = 0
    SENT = 1
    DROPPED = 2
    CLOSED = 3


# Straight to the backend: ffi.cast and ffi.unpack look their types up in Python at each call.
_cast: Final = _cffi_backend.cast
_unpack: Final = _cffi_backend.unpack
_get_header: Final = lib.uws_req_get_header
_get_full_url: Final = lib.uws_req_get_full_url
_wait_for_abort: Final = lib.uws_res_on_aborted
_send: Final = lib.socketify_res_cork_send
_now_s: Final = time.monotonic
_VOID_POINTER: Final = ffi.typeof("void *")
_RESPONSE: Final = ffi.typeof("uws_res_t *")
_METHOD_HANDLER: Final = ffi.typeof("uws_method_handler")
_UINTPTR: Final = ffi.typeof("uintptr_t")
_view_pointer: Final = ffi.new("const char **")  # one is enough: it is read before the next call


def _user_data(token: int) -> Any:
    return _cast(_VOID_POINTER, token)


def _token(user_data: Any) -> int:
    return int(_cast(_UINTPTR, user_data))


def _view(getter: Callable[..., int], *arguments: Any) -> bytes:
    """What a getter of the kind `size_t f(…, const char **)` points at, copied."""
    length = getter(*arguments, _view_pointer)
    return _copy(_view_pointer[0], length)


def _copy(pointer: Any, length: int) -> bytes:
    return cast(bytes, _unpack(pointer, length)) if length else b""


class Request:
    """One HTTP exchange.

    What the request line and headers say must be read before the handler returns; afterwards only `body` and
    `answer` remain. Answering twice, or after the client left, does nothing.
    """

    __slots__ = (
        "_answers", "_given_id", "_limit", "_on_body", "_received", "_req", "_res", "_server", "_user_data",
        "body", "context", "done", "head_lines", "is_head", "is_writer", "parts", "received_s", "token",
    )  # fmt: skip

    _given_id: bytes
    _limit: int
    _received: int
    _user_data: Any
    body: bytes
    """There when `read_body` has it."""
    token: int
    parts: str
    """Where its time went, for the log; there only if it took long."""

    def __init__(self, server: Server, res: Any, req: Any, answers: Answers) -> None:
        self._server = server
        self._answers = answers
        self._res = res
        self._req = req
        self._on_body: Handler | None = None
        self.context: Any = None
        """Whatever the handler needs later."""
        self.done = False
        self.is_writer = False
        """Whether the rate limit of game servers counts."""
        self.is_head = False
        """Whether the method is HEAD: every answer then goes without its body."""
        self.head_lines = server.head_lines
        """Header lines, each after a CRLF, that go with whatever is answered (CORS)."""
        self.received_s = _now_s()
        """When the request was complete, on the monotonic clock."""

    def header(self, name: bytes) -> bytes:
        """The value of the header `name` (lower case), b"" when absent. Only inside the handler."""
        length = _get_header(self._line, name, len(name), _view_pointer)
        return cast(bytes, _unpack(_view_pointer[0], length)) if length else b""

    def joined_header(self, name: bytes) -> bytes:
        """The values of all headers `name`, in order, with commas between (RFC 9110, 5.3). Only inside the handler."""
        _all_headers.clear()
        lib.uws_req_for_each_header(self._line, _on_header, ffi.NULL)
        return b", ".join(value for key, value in _all_headers if key == name)

    @property
    def _line(self) -> Any:
        """uWebSockets' request: C would read freed memory once the handler has returned."""
        if self._req is None:
            raise UwsError("request line and headers are gone once the handler has returned")
        return self._req

    @property
    def id(self) -> bytes:
        """What the client calls this request (X-Request-Id), or else what we call it."""
        return self._given_id or b"%b%x" % (ID_PREFIX, self.token)

    @property
    def method(self) -> str:
        """In upper case. Only inside the handler."""
        return _view(lib.uws_req_get_case_sensitive_method, self._line).decode("latin-1")

    @property
    def target(self) -> bytes:
        """Path and query as sent. Only inside the handler."""
        length = _get_full_url(self._line, _view_pointer)
        return cast(bytes, _unpack(_view_pointer[0], length))

    @property
    def query(self) -> str:
        """The query string as sent, without its question mark. Only inside the handler."""
        return self.target.decode("latin-1").partition("?")[2]

    @property
    def peer(self) -> str:
        """The address at the other end of the connection, "" once answered."""
        return "" if self.done else _view(lib.uws_res_get_remote_address_as_text, SSL, self._res).decode()

    def read_body(self, limit: int, on_body: Handler) -> None:
        """Call `on_body` when all of `body` is there; answers 413 above `limit` bytes and 408 when too slow."""
        self._limit, self._received, self.body = limit, 0, b""
        self._on_body = on_body
        lib.uws_res_on_data(SSL, self._res, _on_data, self._user_data)

    @property
    def awaits_body(self) -> bool:
        """Whether a body was asked for and is not complete yet."""
        return self._on_body is not None

    def answer(self, head: bytes, body: bytes | None, content_type: bytes = JSON, *, close: bool = False) -> bool:
        """Send status line, headers and body in one call to C; False if nobody is left to answer.

        `head` is the status, then any header lines, each after a CRLF: b"200 OK\\r\\nVary: Origin".
        A `body` of None sends none, and no Content-Length. HEAD gets the head of what GET would get.
        """
        if self.done:
            return False
        self.done = True
        server, answers = self._server, self._answers
        server.pending.pop(self.token, None)
        seconds = _now_s() - self.received_s
        # What `Histogram.observe` does, without the call: this is done for each answer there is.
        histogram = answers.seconds
        histogram.counts[bisect_left(LATENCY_BOUNDS_S, seconds)] += 1
        histogram.sum += seconds
        if head is OK:
            answers.ok += 1
        else:
            answers.by_status[head[:3]] += 1
        if seconds > server.slow_s:
            log_slow(self.id, head[:3], seconds, getattr(self, "parts", ""))
        if self._given_id:
            head = b"%b%b\r\nX-Request-Id: %b" % (head, self.head_lines, self._given_id)
        else:  # `id`, in one go
            head = b"%b%b\r\nX-Request-Id: %b%x" % (head, self.head_lines, ID_PREFIX, self.token)
        if self.is_head and body is not None:
            # A body would be taken for the beginning of the next answer.
            head, body = head + b"\r\nContent-Length: %d" % len(body), None
        if body is None:
            server.note_answer(self._res)
        data, length = (ffi.NULL, 0) if body is None else (body, len(body))
        close = (server.waiting is not None and server.waiting.ends(self._res)) or close or server.draining
        _send(SSL, self._res, data, length, head, len(head), content_type, len(content_type), close)
        if not lib.uws_res_has_responded(SSL, self._res):
            # uWebSockets loses a body whose head the kernel did not take at once, but not what it is given then.
            lib.uws_res_end(SSL, self._res, data, length, close)
        return True

    def problem(self, problem: Problem) -> bool:
        """Answer with a problem document."""
        if not self.done:
            self._answers.problems[problem.kind] += 1
        return self.answer(head_of(problem), problem.body(), PROBLEM_JSON, close=problem.close)

    def fail(self, error: BaseException) -> bool:
        """Answer a fault of ours: 500, and the log has the rest under the request's id."""
        return self.problem(fault(self.id, error))

    def guard(self, handler: Handler) -> None:
        """Run `handler`; whatever it raises becomes the answer."""
        try:
            handler(self)
        except Exception as error:
            self._refuse(error)

    def _refuse(self, error: Exception) -> None:
        if isinstance(error, Problem):
            self.problem(error)
        else:
            self.fail(error)

    def forget(self) -> None:
        """The client is gone: the C side has freed the response."""
        self.done = True

    def depart(self) -> None:
        """What a Flight does; this one travels alone."""

    def _begin(self, handler: Handler) -> None:
        # Held before anything is answered: uWebSockets takes an answer that it cannot write for none, and ends the
        # process unless somebody waits for the abort.
        self.token = token = next(tokens)
        self._server.pending[token] = self
        self._user_data = user_data = _cast(_VOID_POINTER, token)
        _wait_for_abort(SSL, self._res, _on_aborted, user_data)
        given = self.header(b"x-request-id")
        self._given_id = given if given and _GOOD_ID.fullmatch(given) else b""
        try:  # as `guard` does
            if _get_full_url(self._req, _view_pointer) > MAX_TARGET_BYTES:
                raise _TARGET_TOO_LONG
            handler(self)
        except Exception as error:
            self._refuse(error)
        self._req = None

    def _receive(self, chunk: bytes, last: bool) -> None:
        if last:
            self.received_s = _now_s()
        if last and not self._received and len(chunk) <= self._limit:  # as nearly always: all of it at once
            self.body = chunk
            self._complete()
            return
        self._received += len(chunk)
        too_large = self._received > self._limit
        self.body = b"" if too_large else self.body + chunk
        if too_large and (last or self._received > DISCARD_BYTES):
            self.problem(Problem(413, f"expected a body of at most {self._limit} bytes, got more", close=True))
        elif last:
            self._complete()

    def _complete(self) -> None:
        on_body, self._on_body = self._on_body, None
        assert on_body is not None
        self.guard(on_body)


class Socket:
    """One WebSocket connection. Every method is safe after its close: it then does nothing."""

    __slots__ = ("_ws", "frames", "state")

    def __init__(self, ws: Any, state: Any, frames: FrameCheck) -> None:
        self._ws = ws
        self.state = state
        self.frames = frames

    def send(self, text: bytes) -> SendStatus:
        """Send one text message."""
        if self._ws is None:
            return SendStatus.CLOSED
        return SendStatus(lib.uws_ws_send(SSL, self._ws, text, len(text), TEXT))

    def subscribe(self, topic: bytes) -> None:
        """Get what is published on `topic` from now on."""
        if self._ws is not None:
            lib.uws_ws_subscribe(SSL, self._ws, topic, len(topic))

    def unsubscribe(self, topic: bytes) -> None:
        """Get no more of `topic`."""
        if self._ws is not None:
            lib.uws_ws_unsubscribe(SSL, self._ws, topic, len(topic))

    @property
    def buffered_bytes(self) -> int:
        """Bytes that wait here because the client does not read them."""
        return 0 if self._ws is None else int(lib.uws_ws_get_buffered_amount(SSL, self._ws))

    def end(self, code: CloseCode, reason: bytes) -> None:
        """Close politely. An empty reason would make uWebSockets do nothing at all."""
        if not reason:
            raise UwsError("expected a reason to close a WebSocket with, got none")
        if self._ws is not None:
            lib.uws_ws_end(SSL, self._ws, int(code), reason, len(reason))

    def dismiss(self, code: CloseCode, reason: bytes) -> None:
        """`end`, for a client that may never read it: what it has not taken in the end is thrown away.

        Otherwise the kernel keeps what is unsent for as long as the client's machine answers its probes.
        """
        if self._ws is not None:
            with socket.socket(fileno=os.dup(_poll(_token(self._ws)))) as connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        self.end(code, reason)

    def _closed(self) -> None:
        self._ws = None


class SocketEvents(Protocol):
    """What a WebSocket route does. Every method runs on the loop and must not block."""

    def accept(self, request: Request) -> Any:
        """The state of the connection to be; raises Problem to refuse it."""

    def opened(self, connection: Socket) -> None:
        """A connection is there."""

    def received(self, connection: Socket, text: bytes) -> None:
        """The client sent a message."""

    def drained(self, connection: Socket) -> None:
        """Some of what was buffered has left."""

    def closed(self, connection: Socket) -> None:
        """The connection is gone, for whatever reason."""


class Server:
    """One uWebSockets app on the running loop: routes, one listening socket, topics.

    There is one per process, since uWebSockets keeps one loop per thread.
    """

    def __init__(
        self,
        request_timeout_s: float = 5.0,
        body_timeout_s: float = BODY_TIMEOUT_S,
        headers_within_s: float = HEADERS_WITHIN_S,
    ) -> None:
        """`request_timeout_s` is the last resort for requests that nobody answers."""
        self.pending: dict[int, Request] = {}
        self.sockets: dict[int, Socket] = {}
        self.draining = False
        self.head_lines = b""
        """Header lines, each after a CRLF, that go with whatever is answered (CORS)."""
        self.by_origin = False
        """Whether an answer depends on the Origin of its request: `head_lines` are those of none. Set before routes."""
        self.slow_s = math.inf
        """An answer that took longer than this is logged."""
        self.answers: dict[str, Answers] = {}
        """What was answered, by route."""
        self._request_timeout_s = request_timeout_s
        self._body_timeout_s = body_timeout_s
        self._headers_within_s = headers_within_s
        self._states: dict[int, Any] = {}
        self._callbacks: list[Any] = []
        self._listening: Any = None
        self._observed: set[int] = set()  # the WebSocket contexts whose frames are looked at
        self._connections: dict[int, float] = {}
        self._new: deque[tuple[int, float]] = deque()
        options = ffi.new("struct us_socket_context_options_t *")
        self._app = lib.uws_create_app(SSL, options[0])
        on_connection = self._keep("void(uws_res_t*, int, void*)", self._count_connection)
        lib.uws_filter(SSL, self._app, on_connection, ffi.NULL)
        native = uws_native.load(library_path)
        self.waiting = Waiting(native, self) if native is not None else None
        """The requests that wait in C, where that was built."""
        _running.append(self)
        self._plan_sweep(self._sweep)

    def route(
        self,
        path: str,
        handlers: Mapping[str, Handler],
        *,
        on_flight: OnFlight | None = None,
        on_posts: OnPosts | None = None,
        max_body_bytes: int = 0,
        reads_forwarded: bool = False,
    ) -> None:
        """Serve `path`: one handler per method; HEAD and others fall to `*` if it is there.

        `on_flight` gets GETs of the targets that were given to `share`, and `on_posts`, which one route may have,
        POSTs with a body of 1 to `max_body_bytes`; handlers get what is left, and all where C was not built.
        """
        methods = {"GET": lib.uws_app_get, "POST": lib.uws_app_post, "HEAD": lib.uws_app_head}
        answers, waiting = self._answers_of(path), self.waiting
        for method, handler in handlers.items():
            register = lib.uws_app_any if method == "*" else methods[method]
            callback, user_data = self._method_callback(method, handler, answers), ffi.NULL
            native = None
            if waiting is not None and method == "GET" and on_flight is not None:
                native = waiting.flights(_token(callback), on_flight, answers)
            elif waiting is not None and method == "POST" and on_posts is not None:
                native = waiting.posts(_token(callback), on_posts, answers, max_body_bytes, reads_forwarded)
            if native is not None:
                callback, user_data = _cast(_METHOD_HANDLER, native.function), _user_data(native.user_data)
            register(SSL, self._app, path.encode(), callback, user_data)

    def share(self, target: bytes, context: Any) -> None:
        """From now on, GETs of `target` share answers, where their route does; their flights have this `context`."""
        if self.waiting is not None:
            self.waiting.share(target, context)

    def _answers_of(self, path: str) -> Answers:
        # What clients ask for is not ours to bound: all that is no route counts as one.
        return self.answers.setdefault("other" if path == "/*" else path, Answers())

    def _method_callback(self, method: str, handler: Handler, answers: Answers) -> Any:
        may_be_head = method in ("HEAD", "*")

        def call(res: Any, req: Any, _user_data: Any) -> None:
            request = Request(self, res, req, answers)
            if may_be_head:
                request.is_head = request.method == "HEAD"
            request._begin(handler)

        return self._keep("void(uws_res_t*, uws_req_t*, void*)", call)

    def _keep(self, signature: str, function: Callable[..., None]) -> Any:
        callback = ffi.callback(signature, function, onerror=report)
        self._callbacks.append(callback)
        return callback

    def _count_connection(self, res: Any, change: int, _user_data: Any) -> None:
        """An HTTP connection was opened (1) or closed (-1); one that becomes a WebSocket leaves in `_upgrade`."""
        token = _token(res)
        if change > 0:
            self._connections[token] = now_s = _now_s()
            self._new.append((token, now_s))
        else:
            self._connections.pop(token, None)

    def _close_silent(self, opened_before_s: float) -> None:
        """Close the connections that have not brought a request since they were opened, before that moment."""
        busy: set[int] | None = None
        while self._new and self._new[0][1] < opened_before_s:
            token, opened_s = self._new.popleft()
            res = _cast(_RESPONSE, token)
            # An answer leaves its length there, one without a body the mark of `note_answer`.
            if self._connections.get(token) != opened_s or lib.uws_res_get_write_offset(SSL, res):
                continue
            if busy is None:
                busy = {_token(request._res) for request in self.pending.values()}
                busy.update(self.waiting.responses() if self.waiting else ())
            if token not in busy:
                lib.uws_res_close(SSL, res)

    def note_answer(self, res: Any) -> None:
        """Remember that a connection had an answer, where that has no body to tell."""
        self._connections[_token(res)] = 0.0

    def _plan_sweep(self, sweep: Callable[[], None]) -> None:
        self._sweep_at_s = time.monotonic() + SWEEP_INTERVAL_S
        self._sweeper = asyncio.get_running_loop().call_later(SWEEP_INTERVAL_S, sweep)

    def _sweep(self) -> None:
        if time.monotonic() > self._sweep_at_s + LATE_SWEEP_S:
            # Whoever woke with us goes first: the deadlines that say what became of a request, and what has come in.
            self._plan_sweep(self._sweep_now)
        else:
            self._sweep_now()

    def _sweep_now(self) -> None:
        self._plan_sweep(self._sweep)
        now_s = time.monotonic()
        self._close_silent(now_s - self._headers_within_s)
        too_slow = Problem(408, f"expected the whole body within {self._body_timeout_s:g} s", close=True)
        unanswered = TimeoutError(f"no answer within {self._request_timeout_s:g} s")
        for request in list(self.pending.values()):
            waited_s = now_s - request.received_s
            if request.awaits_body and waited_s > self._body_timeout_s:
                request.problem(too_slow)
            elif not request.awaits_body and waited_s > self._request_timeout_s:
                request.fail(unanswered)
        if self.waiting is not None:
            self.waiting.sweep(now_s - self._body_timeout_s, now_s - self._request_timeout_s, too_slow, unanswered)

    def websocket(
        self,
        path: str,
        events: SocketEvents,
        *,
        max_message_bytes: int,
        max_backpressure_bytes: int,
        idle_timeout_s: int,
    ) -> None:
        """Serve WebSockets at `path`.

        Publishing to a socket with more than `max_backpressure_bytes` buffered loses the message without a word:
        whoever publishes has to look at `buffered_bytes` first. A client that sends nothing for `idle_timeout_s` is
        cut off, and pinged 16 s earlier (8 s where that is below 32, 4 s where it is below 16). uWebSockets aborts
        on an `idle_timeout_s` outside 0 or 8 to 960.
        """
        if idle_timeout_s and not 8 <= idle_timeout_s <= 960:
            raise UwsError(f"idle_timeout_s: expected 0 or 8 to 960, got {idle_timeout_s}")
        answers = self._answers_of(path)

        def accept_and_upgrade(context: Any) -> Handler:
            def handle(request: Request) -> None:
                if self._listening is None:  # it would never be told to go
                    raise Problem(503, "restarting", headers=(("Retry-After", "1"),), close=True)
                check_handshake(request.joined_header)
                self._observe_frames(context)
                self._upgrade(request, context, events.accept(request))

            return handle

        def upgrade(res: Any, req: Any, context: Any, _user_data: Any) -> None:
            Request(self, res, req, answers)._begin(accept_and_upgrade(context))

        def opened(ws: Any, _user_data: Any) -> None:
            token = _token(lib.uws_ws_get_user_data(SSL, ws))
            frames = FrameCheck(max_message_bytes)
            connection = self.sockets[token] = Socket(ws, self._states.pop(token), frames)
            events.opened(connection)

        def received(ws: Any, text: Any, length: int, _opcode: int, _user_data: Any) -> None:
            connection = self.sockets[_token(lib.uws_ws_get_user_data(SSL, ws))]
            events.received(connection, _copy(text, length))

        def drained(ws: Any, _user_data: Any) -> None:
            connection = self.sockets.get(_token(lib.uws_ws_get_user_data(SSL, ws)))
            if connection is not None:
                events.drained(connection)

        def closed(ws: Any, _code: int, _reason: Any, _length: int, _user_data: Any) -> None:
            connection = self.sockets.pop(_token(lib.uws_ws_get_user_data(SSL, ws)))
            connection._closed()
            events.closed(connection)

        # Filled by hand: socketify's own wrapper sets `drain` to NULL.
        behavior = ffi.new("uws_socket_behavior_t *")
        behavior.maxPayloadLength = max_message_bytes
        behavior.maxBackpressure = max_backpressure_bytes
        behavior.idleTimeout = idle_timeout_s
        behavior.sendPingsAutomatically = True
        behavior.upgrade = self._keep("void(uws_res_t*, uws_req_t*, uws_socket_context_t*, void*)", upgrade)
        behavior.open = self._keep("void(uws_websocket_t*, void*)", opened)
        behavior.message = self._keep("void(uws_websocket_t*, const char*, size_t, uws_opcode_t, void*)", received)
        behavior.drain = self._keep("void(uws_websocket_t*, void*)", drained)
        behavior.close = self._keep("void(uws_websocket_t*, int, const char*, size_t, void*)", closed)
        self._callbacks.append(behavior)
        lib.uws_ws(SSL, self._app, path.encode(), behavior[0], ffi.NULL)

    def _observe_frames(self, context: Any) -> None:
        """See what clients of a WebSocket context send before the library does, and close those that break a rule.

        uSockets has a setter for the handler of incoming data and no getter. The old one is what stood where the new
        one stands once it is set.
        """
        address = _token(context)
        if address in self._observed:
            return

        def hand_on_what_is_good(ws: Any, data: Any, length: int) -> Any:
            connection = self.sockets.get(_token(lib.uws_ws_get_user_data(SSL, ws)))
            if connection is None:  # it was closed, and what still comes is thrown away
                return hand_on(ws, data, length)
            violation = connection.frames.feed(_copy(data, length), _now_s())
            if violation is None:
                return hand_on(ws, data, length)
            if violation.good_bytes:
                hand_on(ws, data, violation.good_bytes)
            connection.end(violation.code, violation.reason)
            return ws

        def received(ws: Any, data: Any, length: int) -> Any:
            try:
                return hand_on_what_is_good(ws, data, length)
            except Exception as error:
                report(type(error), error, error.__traceback__)
                return ws  # without it uSockets would go on with a null pointer

        callback = self._keep("void *(void *, char *, int)", received)
        words = ffi.cast("uintptr_t *", context)
        before = ffi.unpack(words, _CONTEXT_WORDS)
        _on_data_of(SSL, address, _token(callback))
        after = ffi.unpack(words, _CONTEXT_WORDS)
        replaced = [old for old, new in zip(before, after, strict=True) if old != new]
        if len(replaced) != 1 or _token(callback) not in after:
            raise UwsError(f"expected uSockets to keep one handler of incoming data, found {len(replaced)}")
        hand_on = ffi.cast("void *(*)(void *, char *, int)", replaced[0])
        self._observed.add(address)

    def _upgrade(self, request: Request, context: Any, state: Any) -> None:
        token = next(tokens)
        self._states[token] = state
        key = request.header(b"sec-websocket-key")
        protocol = request.header(b"sec-websocket-protocol")
        request.done = True
        request._answers.by_status[b"101"] += 1
        self.pending.pop(request.token, None)
        self._connections.pop(_token(request._res), None)
        user_data = _user_data(token)
        # No extensions are offered: compressing each frame for each socket would cost more than it saves.
        lib.uws_res_upgrade(SSL, request._res, user_data, key, len(key), protocol, len(protocol), b"", 0, context)

    def publish(self, topic: bytes, text: bytes) -> None:
        """Send `text` to every subscriber of `topic`; it leaves in this loop turn."""
        lib.uws_publish(SSL, self._app, topic, len(topic), text, len(text), TEXT, False)

    def listen(self, host: str, port: int, *, shared: bool = False) -> int:
        """Listen, and return the port (a free one for 0).

        Raises UwsError when it cannot. `shared` lets several processes listen on it (SO_REUSEPORT).
        """

        def listening(listen_socket: Any, _config: Any, _user_data: Any) -> None:
            self._listening = listen_socket or None

        callback = self._keep("void(struct us_listen_socket_t*, uws_app_listen_config_t, void*)", listening)
        config = ffi.new("uws_app_listen_config_t *")
        address = ffi.new("char[]", host.encode())
        config.host, config.port = address, port
        config.options = SHARED_PORT if shared else EXCLUSIVE_PORT
        lib.uws_app_listen_with_config(SSL, self._app, config[0], callback, ffi.NULL)
        if self._listening is None:
            raise UwsError(_why_not_listening(host, port, shared))
        if self.waiting is not None:
            self.waiting.watch(_token(self._listening), _REFUSALS)
        with self._listener() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
            listener.listen(BACKLOG)
            bound: int = listener.getsockname()[1]
        return bound

    def _listener(self) -> socket.socket:
        return socket.socket(fileno=os.dup(_poll(_token(self._listening))))

    async def drain(self, grace_s: float, goodbye: bytes, delay_s: float = 0.0) -> None:
        """End without losing a request, within `delay_s` + `grace_s`.

        For `delay_s` only `draining` is set, and every answer closes its connection, so that a proxy which keeps idle
        connections for less than that has none left. Then new connections are refused, every socket is closed
        with 1001 and `goodbye`, and what is under way is answered.
        """
        self.draining = True
        await asyncio.sleep(delay_s)
        await self._stop_listening()
        for connection in list(self.sockets.values()):
            connection.end(CloseCode.GOING_AWAY, goodbye)
        began_s = now_s = time.monotonic()
        while self._is_busy or (self._connections and now_s < began_s + LINGER_S):
            if now_s > began_s + grace_s:
                break
            await asyncio.sleep(0.01)
            now_s = time.monotonic()
        # A few more turns of the loop, so that close frames and last answers leave.
        await asyncio.sleep(0.05)

    @property
    def _is_busy(self) -> bool:
        return bool(self.pending) or (self.waiting is not None and not self.waiting.is_empty)

    async def _stop_listening(self) -> None:
        """Close the listening socket without resetting a connection that its client takes for made.

        The kernel resets what has not been accepted when a socket that listens is closed, and a proxy may not send a
        POST again that it has sent. So connections stop to begin first; who tries meanwhile tries again in a second.
        """
        if self._listening is None:
            return
        program = ctypes.create_string_buffer(_NO_NEW_CONNECTIONS)
        instructions = struct.pack("HL", len(_NO_NEW_CONNECTIONS) // 8, ctypes.addressof(program))
        try:
            with self._listener() as listener:
                listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, instructions)
        except OSError as error:
            _log.warning("connections being made now may be lost: no filter can be attached: %s", error)
        await asyncio.sleep(HANDSHAKE_S)
        listening, self._listening = self._listening, None
        lib.us_listen_socket_close(SSL, listening)


_running: list[Server] = []
"""The server of this process: what the two callbacks below look requests up in."""


def _aborted(_res: Any, user_data: Any) -> None:
    request = _running[-1].pending.pop(_token(user_data), None)
    if request is not None:
        request.forget()


def _data(_res: Any, chunk: Any, length: int, last: bool, user_data: Any) -> None:
    request = _running[-1].pending.get(_token(user_data))
    if request is not None:  # a late chunk of a request that has its answer finds nothing
        request._receive(_copy(chunk, length), last)


_on_aborted: Final = ffi.callback("void(uws_res_t*, void*)", _aborted, onerror=report)
_on_data: Final = ffi.callback("void(uws_res_t*, const char*, size_t, bool, void*)", _data, onerror=report)
_all_headers: list[tuple[bytes, bytes]] = []
"""Of the request that `joined_header` looks at: filled and read within one call."""


def _header(name: Any, name_length: int, value: Any, value_length: int, _user_data: Any) -> None:
    _all_headers.append((_copy(name, name_length), _copy(value, value_length)))


_on_header: Final = ffi.callback("void(const char*, size_t, const char*, size_t, void*)", _header, onerror=report)


def _why_not_listening(host: str, port: int, shared: bool) -> str:
    """uSockets says nothing, so the same is tried once more."""
    try:
        listening.bound(host, port, shared=shared).close()
    except OSError as error:
        return listening.why_not(error, host, port)
    return f"HOST, PORT: expected an address to listen on, got {host!r} and {port}, which could not be had"


def _adopt(loop: asyncio.AbstractEventLoop) -> None:
    """Make uWebSockets run on uvloop's loop."""
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    capsule = uvloop.loop.libuv_get_loop_t_ptr(loop)  # type: ignore[attr-defined] # its stubs leave it out
    lib.uws_get_loop_with_native(_user_data(pointer(capsule, None)))


def run(main: Coroutine[Any, Any, int]) -> NoReturn:
    """Run `main` on uvloop with uWebSockets inside, then end the process with what it returns.

    The process ends here because the loop must never be closed.
    """
    status = 1
    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    _adopt(loop)
    try:
        status = loop.run_until_complete(main)
    except BaseException:
        _log.exception("stopped by an error")
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a terminal may be gone, and what was not said there with it
            stream.flush()
    os._exit(status)


async def stop_signal() -> signal.Signals:
    """Wait for a signal to stop; a second one ends the process at once."""
    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[signal.Signals] = loop.create_future()

    def stop(received: signal.Signals) -> None:
        if not stopped.done():
            stopped.set_result(received)
        elif insists(received):
            os._exit(128 + received)

    for each in stop_signals():
        loop.add_signal_handler(each, stop, each)
    return await stopped
