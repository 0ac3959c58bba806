"""A server with a route for every way to hurt server.uws; tests/test_uws.py runs it as a child process.

`python -m tests.uws_app PORT [gc] [patient] [plain]`; with `gc` the collector is forced every 20 ms. A patient one
gives a connection 2 s for its first request, and itself 5 s to answer; others do the opposite. A plain one has no C.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from server import uws, uws_native
from server.answers import OK
from server.errors import CloseCode, Problem
from server.uws import Request, Server, Socket
from server.uws_native import Flight, Post

MAX_BODY_BYTES = 16_384
MAX_BACKPRESSURE_BYTES = 1 << 20
TIMEOUT_S = 2.0
PATIENCE_S = 5.0
GC_INTERVAL_S = 0.02
GRACE_S = 5.0
TOPIC = b"all"
CHUNK = b"x" * 65_536


class Events:
    """The WebSocket route: text messages are commands, and `seen` remembers what they led to."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.seen: dict[str, Any] = {"drained": 0, "after_close": [], "flooded": [], "large": 0, "said": 0}

    def accept(self, request: Request) -> str:
        if request.query == "refuse":
            raise Problem(403, "refused")
        if request.query == "raise":
            raise ValueError("accept raises")
        return request.query

    def opened(self, connection: Socket) -> None:
        connection.subscribe(TOPIC)
        if connection.state == "raise-open":
            raise ValueError("opened raises")

    def received(self, connection: Socket, text: bytes) -> None:
        command, _, rest = text.partition(b" ")
        if command == b"echo":
            connection.send(rest)
        elif command == b"publish":
            self.server.publish(TOPIC, rest)
        elif command == b"leave":
            connection.unsubscribe(TOPIC)
        elif command == b"flood":
            statuses = [int(connection.send(CHUNK)) for _ in range(int(rest))]
            self.seen["flooded"] = [statuses, connection.buffered_bytes]
        elif command == b"end":
            connection.end(CloseCode.POLICY_VIOLATION, b"asked for")
            self.try_everything(connection)
        elif command == b"dismiss":
            connection.dismiss(CloseCode.POLICY_VIOLATION, b"asked for")
            self.try_everything(connection)
        else:
            raise ValueError("received raises")

    def drained(self, connection: Socket) -> None:
        self.seen["drained"] += 1

    def closed(self, connection: Socket) -> None:
        self.try_everything(connection)

    def try_everything(self, connection: Socket) -> None:
        """What must be safe on a connection that is gone."""
        connection.subscribe(TOPIC)
        connection.unsubscribe(TOPIC)
        connection.end(CloseCode.GOING_AWAY, b"again")
        connection.dismiss(CloseCode.GOING_AWAY, b"again")
        self.seen["after_close"].append([connection.send(b"late").name, connection.buffered_bytes])


async def serve(port: int, options: list[str]) -> int:
    """Run until SIGTERM."""
    request_s, headers_s = (PATIENCE_S, TIMEOUT_S) if "patient" in options else (TIMEOUT_S, PATIENCE_S)
    if "plain" in options:
        uws_native.LIBRARY = Path("/nonexistent")  # type: ignore[misc]
    if library := os.environ.get("UWS_NATIVE"):
        uws_native.LIBRARY = Path(library)  # type: ignore[misc]
    body_s = uws.BODY_TIMEOUT_S if "slow-bodies" in options else TIMEOUT_S
    server = Server(request_timeout_s=request_s, body_timeout_s=body_s, headers_within_s=headers_s)
    events = Events(server)
    loop = asyncio.get_running_loop()
    held: list[Request] = []

    def echo(request: Request) -> None:
        request.read_body(MAX_BODY_BYTES, lambda request: request.answer(b"200 OK", echoed(request)))

    def echoed(request: Request | Post) -> bytes:
        return b"%f" % (loop.time() - request.received_s) if request.body == b"age" else request.body

    def raise_behind_body(request: Request) -> None:
        request.read_body(MAX_BODY_BYTES, raise_at_once)

    def raise_at_once(request: Request) -> None:
        raise ValueError("a handler raises")

    def raise_problem(request: Request) -> None:
        raise Problem(400, "a handler refuses", headers=(("Retry-After", "7"),))

    def raise_behind_answer(request: Request) -> None:
        request.answer(b"200 OK", b'"first"')
        raise ValueError("a handler raises behind its answer")

    def twice(request: Request) -> None:
        answered = [request.answer(b"200 OK", b'"first"'), request.answer(b"200 OK", b'"second"')]
        assert answered == [True, False]

    def later(request: Request) -> None:
        held.append(request)
        loop.call_later(float(request.query), request.answer, b"200 OK", b'"late"')

    def later_twice(request: Request) -> None:
        for _ in range(2):
            loop.call_later(float(request.query), request.answer, b"200 OK", b'"late"')

    def without_body(request: Request) -> None:
        request.answer(b"204 No Content", None, b"")

    def large(request: Request) -> None:
        events.seen["large"] += 1
        request.answer(OK, CHUNK)

    def never(request: Request) -> None:
        held.append(request)

    flights = itertools.count(1)
    taken: list[int] = []

    def share(request: Request) -> None:
        server.share(request.target, request.query)
        request.answer(OK, b'"alone"')

    def board(flight: Flight) -> None:
        body, (command, _, seconds) = b"%d" % next(flights), flight.context.partition("=")

        def answer() -> None:
            flight.answer(OK, body)

        def depart_and_answer() -> None:
            flight.depart()
            loop.call_later(float(seconds), answer)

        if command == "now":
            answer()
        elif command == "raise":
            raise ValueError("a handler raises")
        elif command == "large":
            events.seen["large"] += 1
            flight.answer(OK, CHUNK)
        elif command == "refuse":
            flight.problem(Problem(400, "a handler refuses", headers=(("Retry-After", "7"),)))
        elif command == "twice":
            answer()
            answer()
        elif command == "later":
            loop.call_later(float(seconds), answer)
        elif command == "departs":
            loop.call_soon(depart_and_answer)

    def take(posts: list[Post]) -> None:
        waiting = server.waiting
        assert waiting is not None
        taken.append(len(posts))
        echo_them = []
        for post in posts:
            if post.body == b"said":
                fields = [post.id, post.authorization, post.idempotency_key, post.forwarded_for, post.peer.encode()]
                post.answer(OK, json.dumps([field.decode() for field in fields]).encode())
            elif post.body == b"raise":
                post.fail(ValueError("a handler raises"))
            elif post.body == b"refuse":
                post.problem(Problem(400, "a handler refuses", headers=(("Retry-After", "7"),)))
            elif post.body.startswith(b"later"):
                for _ in range(2):
                    loop.call_later(float(post.body[5:]), post.answer, OK, b'"late"')
            elif post.body == b"repeat":  # answers, and answers again when its place has gone to somebody else
                loop.call_soon(post.answer, OK, b'"first"')
                for number in range(100):
                    loop.call_later(number / 100, post.answer, OK, b'"second"')
            elif post.body != b"never":
                echo_them.append(post)
        waiting.answer_posts(echo_them, [echoed(post) for post in echo_them], OK)

    def said(request: Request) -> None:
        events.seen["said"] += 1
        fields = {"method": request.method, "query": request.query, "peer": request.peer}
        fields["header"] = request.header(b"x-test").decode()
        fields["joined"] = request.joined_header(b"x-test").decode()
        request.answer(b"200 OK", json.dumps(fields).encode())

    def state(request: Request) -> None:
        if request.query == "collect":
            gc.collect()
        collections = gc.get_stats()[2]["collections"]
        fields = {"pid": os.getpid(), "collections": collections, "pending": len(server.pending) - 1}
        fields |= {"idle": server.waiting is None or server.waiting.is_empty, "taken": taken}
        fields |= {"sockets": len(server.sockets), "states": len(server._states), **events.seen}
        request.answer(b"200 OK", json.dumps(fields).encode())

    def unknown(request: Request) -> None:
        raise Problem(404, "no such path")

    for path, handler in (
        ("/raise", raise_at_once),
        ("/problem", raise_problem),
        ("/raise-behind-answer", raise_behind_answer),
        ("/twice", twice),
        ("/later", later),
        ("/later-twice", later_twice),
        ("/never", never),
        ("/large", large),
        ("/without-body", without_body),
        ("/said", said),
        ("/state", state),
    ):
        server.route(path, {"GET": handler, "HEAD": handler})
    server.route("/echo", {"POST": echo})
    server.route("/shared", {"GET": share, "HEAD": share}, on_flight=board)
    server.route("/posts", {"POST": echo}, on_posts=take, max_body_bytes=MAX_BODY_BYTES, reads_forwarded=True)
    server.route("/raise-behind-body", {"POST": raise_behind_body})
    server.websocket(
        "/ws",
        events,
        max_message_bytes=1024,
        max_backpressure_bytes=MAX_BACKPRESSURE_BYTES,
        idle_timeout_s=8,
    )
    server.route("/*", {"*": unknown})
    server.listen("127.0.0.1", port)
    if "gc" in options:
        gc.set_threshold(100)

        def collect() -> None:
            gc.collect()
            loop.call_later(GC_INTERVAL_S, collect)

        collect()
    await uws.stop_signal()
    await server.drain(GRACE_S, b"restarting")
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    uws.run(serve(int(sys.argv[1]), sys.argv[2:]))
