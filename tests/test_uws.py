"""Nothing a client does, and nothing a handler does, ends the process or leaves a request without an end.

tests/uws_app.py runs as a real process and is talked to over bare sockets; after each test it must be the same
process, still answering, with nothing left over.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from server.embedded import Service, free_port
from server.supervisor import alive
from tests.services import ROOT, wait_until
from tests.uws_app import CHUNK, MAX_BACKPRESSURE_BYTES, MAX_BODY_BYTES
from tests.wire import PING, Answer, Wire, once, request_bytes

TEXT, CLOSE, PONG = 1, 8, 10
LITTLE_S = 2.0
"""For a busy machine."""
ECHOES = pytest.mark.parametrize("echo", ["/echo", "/posts"])
"""One request at a time, through Python, and several at once, through C."""


class UwsApp(Service):
    """tests/uws_app.py on a free port."""

    def __init__(self, directory: Path, *options: str, port: int | None = None) -> None:
        self.port = port or free_port()
        argv = [sys.executable, "-m", "tests.uws_app", str(self.port), *options]
        super().__init__("uws_app", argv, log=directory / f"uws-{self.port}.log", cwd=ROOT)

    def answers(self) -> bool:
        try:
            return bool(self.state()["pid"] == self.pid)
        except OSError:
            return False

    def state(self) -> Any:
        """What the application knows of itself."""
        return once(self.port, "GET", "/state").json()

    def has_nothing_left(self) -> bool:
        """Whether every request and every socket is over."""
        state = self.state()
        left = state["pending"], state["sockets"], state["states"]
        return (state["pid"], state["idle"], left) == (self.pid, True, (0, 0, 0))

    @property
    def output(self) -> str:
        """All that it said."""
        return self.output_tail(10_000)


@pytest.fixture(scope="module")
def running_app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UwsApp]:
    app = UwsApp(tmp_path_factory.mktemp("uws"), "gc")
    app.start()
    yield app
    app.stop()


@pytest.fixture
def app(running_app: UwsApp) -> Iterator[UwsApp]:
    """The application, whose collector is forced all the time; the same process before and after the test."""
    assert running_app.running, running_app.output_tail()
    yield running_app
    assert running_app.running, running_app.output_tail()
    wait_until(running_app.has_nothing_left, 5, "a request or a socket was left over")


@pytest.fixture
def new_app(tmp_path: Path) -> Iterator[Callable[..., UwsApp]]:
    """Makes an application of the test's own; the collector is left alone."""
    started: list[UwsApp] = []

    def start(*options: str, port: int | None = None) -> UwsApp:
        app = UwsApp(tmp_path, *options, port=port)
        started.append(app)
        app.start()
        return app

    yield start
    for app in started:
        app.stop()


# ---------------------------------------------------------------------- bodies


@ECHOES
def test_bodies_in_many_segments_and_dropped_half_way_survive_forced_collections(app: UwsApp, echo: str) -> None:
    collections = app.state()["collections"]
    bodies = [bytes([65 + number % 26]) * (2_000 + 100 * number) for number in range(48)]
    for _ in range(3):
        wires = [Wire(app.port) for _ in bodies]
        pieces = [request_bytes("POST", echo, body) for body in bodies]
        for step in range(8):
            for number, wire in enumerate(wires):
                if number % 4 == 1 and step == 5:
                    wire.close()
                elif number % 4 == 3 and step == 5:
                    wire.reset()
                elif number % 2 == 0 or step < 5:
                    size = len(pieces[number]) // 8 + 1
                    wire.send(pieces[number][step * size : (step + 1) * size])
            once(app.port, "GET", "/state?collect")
        for number in range(0, len(bodies), 2):
            answer = wires[number].answer()
            assert (answer.status, answer.body) == (200, bodies[number])
            wires[number].close()
    assert app.state()["collections"] >= collections + 3 * 8


@ECHOES
def test_headers_and_body_in_single_bytes_are_answered(app: UwsApp, echo: str) -> None:
    line, end, rest = request_bytes("POST", echo, b"hello").partition(b"\r\n")
    with Wire(app.port) as wire:
        wire.send(line + end)
        for byte in rest:
            wire.send(bytes([byte]))
        assert wire.answer().body == b"hello"


@pytest.mark.parametrize("cut", [1, 4, 6, 9, 12, 16, 20, 22, 23])
def test_request_line_split_over_reads_is_answered(app: UwsApp, cut: int) -> None:
    data = request_bytes("POST", "/echo", b"hello")
    with Wire(app.port) as wire:
        wire.send(data[:cut])
        assert wire.is_silent(0.05)
        wire.send(data[cut:])
        assert wire.answer().body == b"hello"


@ECHOES
def test_chunked_body_is_put_together(app: UwsApp, echo: str) -> None:
    with Wire(app.port) as wire:
        wire.send(b"POST %b HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n" % echo.encode())
        for chunk in (b"3\r\nabc\r\n", b"2\r\nde\r\n", b"0\r\n\r\n"):
            wire.send(chunk)
        assert wire.answer().body == b"abcde"


@ECHOES
def test_empty_body_is_a_body(app: UwsApp, echo: str) -> None:
    assert once(app.port, "POST", echo, b"").body == b""


@ECHOES
def test_body_at_the_limit_is_taken(app: UwsApp, echo: str) -> None:
    assert len(once(app.port, "POST", echo, b"x" * MAX_BODY_BYTES).body) == MAX_BODY_BYTES


@ECHOES
@pytest.mark.parametrize("size", [MAX_BODY_BYTES + 1, 2**20, 8 * 2**20])
def test_body_over_the_limit_gets_413_and_is_closed(app: UwsApp, echo: str, size: int) -> None:
    with Wire(app.port) as wire:
        wire.send(request_bytes("POST", echo, b"x" * MAX_BODY_BYTES).replace(b" %d" % MAX_BODY_BYTES, b" %d" % size))
        left = size - MAX_BODY_BYTES
        while left:
            try:
                wire.send(b"x" * min(left, 65_536))
            except ConnectionError:
                break  # it need not read all of that
            left -= min(left, 65_536)
        assert_problem(wire.answer(), 413, "body-too-large")
        assert wire.ended


@ECHOES
def test_body_that_never_ends_gets_408_and_is_closed(app: UwsApp, echo: str) -> None:
    with Wire(app.port) as wire:
        wire.send(request_bytes("POST", echo, b"hello")[:-1])
        assert_problem(wire.answer(), 408, "request-timeout")
        assert wire.ended


@ECHOES
@pytest.mark.parametrize("cut", [3, 1])
def test_time_counts_from_when_the_body_was_there(app: UwsApp, echo: str, cut: int) -> None:
    data = request_bytes("POST", echo, b"age")
    with Wire(app.port) as wire:
        wire.send(data[:-cut])
        assert wire.is_silent(1)
        wire.send(data[-cut:])
        assert float(wire.answer().body) < 0.5


@ECHOES
def test_body_that_only_trickles_gets_408_too(app: UwsApp, echo: str) -> None:
    with Wire(app.port) as wire:
        wire.send(request_bytes("POST", echo, b"x" * 1000)[:-1000])
        while wire.is_silent(0.1):
            wire.send(b"x")
        assert_problem(wire.answer(), 408, "request-timeout")


# ---------------------------------------------------------------------- answers


@pytest.mark.parametrize("path", ["/raise", "/raise-behind-body"])
def test_handler_that_raises_answers_500_with_an_id_that_the_log_repeats(app: UwsApp, path: str) -> None:
    with Wire(app.port) as wire:
        answer = wire.request("GET", path) if path == "/raise" else wire.request("POST", path, b"x")
        assert_problem(answer, 500, "internal-error")
        fault = re.search("logged as request ([0-9a-f-]+)", answer.json()["detail"])
        assert fault
        assert f"request {fault[1]} failed" in app.output
        assert "a handler raises" not in answer.body.decode()
        assert wire.request("GET", "/state").status == 200


def test_handler_that_raises_a_problem_answers_with_it(app: UwsApp) -> None:
    answer = once(app.port, "GET", "/problem")
    assert_problem(answer, 400, "invalid-request")
    assert answer.headers["retry-after"] == "7"


@pytest.mark.parametrize(
    ("path", "body"), [("/twice", "first"), ("/raise-behind-answer", "first"), ("/later-twice?0.01", "late")]
)
def test_second_answer_goes_nowhere(app: UwsApp, path: str, body: str) -> None:
    with Wire(app.port) as wire:
        assert wire.request("GET", path).json() == body
        assert wire.is_silent(0.1)
        assert wire.request("GET", "/said?next").json()["query"] == "next"


def test_request_that_nobody_answers_ends_at_its_deadline(app: UwsApp) -> None:
    assert_problem(once(app.port, "GET", "/never"), 500, "internal-error")


def test_answer_to_a_client_that_left_goes_nowhere(app: UwsApp) -> None:
    wires = [Wire(app.port) for _ in range(20)]
    for wire in wires:
        wire.send(request_bytes("GET", "/later?0.2"))
    wait_until(lambda: app.state()["pending"] == len(wires))
    for number, wire in enumerate(wires):
        wire.reset() if number % 2 else wire.close()
    wait_until(lambda: app.state()["pending"] == 0)
    assert once(app.port, "GET", "/later?0.3").status == 200  # by now the late answers have come and gone


def test_connection_without_a_whole_request_is_closed_and_any_other_is_not(new_app: Callable[..., UwsApp]) -> None:
    app = new_app("patient")
    with contextlib.ExitStack() as stack:
        silent, slow, working, *answered = [stack.enter_context(Wire(app.port)) for _ in range(7)]
        slow.send(b"GET /state HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        working.send(request_bytes("GET", "/later?3"))
        requests = [("GET", "/state"), ("HEAD", "/state"), ("GET", "/without-body"), ("GET", "/problem")]
        for wire, (method, path) in zip(answered, requests, strict=True):
            wire.send(request_bytes(method, path))
            wire.answer(has_body=method == "GET" and path != "/without-body")
        while slow.is_silent(0.2):
            slow.send(b"x")
        assert silent.ended
        assert working.answer().body == b'"late"'
        for wire in (working, *answered):
            assert wire.request("GET", "/state").status == 200


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
def test_unknown_route_is_answered_404(app: UwsApp, method: str) -> None:
    assert_problem(once(app.port, method, "/nowhere"), 404, "not-found")


def test_unknown_route_with_a_body_leaves_the_connection_usable(app: UwsApp) -> None:
    with Wire(app.port) as wire:
        for _ in range(3):
            assert wire.request("POST", "/nowhere", b"x" * 3000).status == 404
        assert wire.request("GET", "/state").status == 200


@ECHOES
def test_one_connection_serves_many_requests(app: UwsApp, echo: str) -> None:
    with Wire(app.port) as wire:
        for number in range(50):
            body = b"%d" % number
            assert wire.request("POST", echo, body).body == body


@pytest.mark.parametrize("path", ["/said?a=b", "/problem", "/raise", "/nowhere", "/later?0.01", "/twice", "/echo"])
def test_head_is_answered_without_a_body_whatever_the_answer(app: UwsApp, path: str) -> None:
    with Wire(app.port) as wire:
        head = wire.request("HEAD", path)
        get = wire.request("GET", path)  # would begin with the body, had there been one
        assert head.status == get.status
        assert head.headers["content-type"] == get.headers["content-type"]
        if path != "/said?a=b":  # which repeats the method
            assert head.headers["content-length"] == get.headers["content-length"]


def test_pipelined_pair_is_answered_in_order(app: UwsApp) -> None:
    with Wire(app.port) as wire:
        wire.send(request_bytes("GET", "/said?one") + request_bytes("GET", "/said?two"))
        assert [wire.answer().json()["query"] for _ in range(2)] == ["one", "two"]


def test_pipelined_behind_a_pending_answer_waits_for_it(app: UwsApp) -> None:
    with Wire(app.port) as wire:
        wire.send(request_bytes("GET", "/later?0.1") + request_bytes("GET", "/said?two"))
        assert [wire.answer().json(), wire.answer().json()["query"]] == ["late", "two"]
        wire.send(request_bytes("GET", "/later?0.1"))
        wire.send(request_bytes("POST", "/echo", b"x" * 9_000) + request_bytes("GET", "/later?0.01"))
        wire.send(request_bytes("GET", "/said?three"))
        assert [len(wire.answer().body) for _ in range(3)] == [6, 9_000, 6]
        assert wire.answer().json()["query"] == "three"


def test_too_much_behind_a_pending_answer_closes_the_connection_and_nothing_else(app: UwsApp) -> None:
    with Wire(app.port) as wire:
        with contextlib.suppress(OSError):
            wire.send(request_bytes("GET", "/later?1") + request_bytes("GET", "/said?two") * 4_000)
        assert wire.ended
    wait_until(lambda: app.state()["pending"] == 0)


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200,  # a TLS client
        b"GET\r\n\r\n",
        b"BREW /state HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /state HTTP/1.1\r\n\r\n",  # no Host
        b"GET /state HTTP/3.7\r\nHost: x\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999999999\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nhello",
        b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzzzz\r\n",
        b"GET /state HTTP/1.1\r\nHost: x\r\n" + b"X-Long: " + b"x" * 10_000 + b"\r\n\r\n",
        b"GET /state HTTP/1.1\r\nHost: x\r\n" + b"X-Many: x\r\n" * 200 + b"\r\n",
        b"\r\n" * 1000,
    ],
)
def test_garbage_harms_nobody_else(app: UwsApp, garbage: bytes) -> None:
    with Wire(app.port) as wire:
        wire.send(garbage)
        assert once(app.port, "GET", "/state").json()["pid"] == app.pid


def test_request_says_what_was_sent(app: UwsApp) -> None:
    said = once(app.port, "GET", "/said?limit=1%20&x=%C3%A4", X_Test="value").json()
    assert (said["method"], said["query"], said["peer"]) == ("GET", "limit=1%20&x=%C3%A4", "127.0.0.1")
    assert (said["header"], said["joined"]) == ("value", "value")


def test_header_sent_twice_is_joined_in_order(app: UwsApp) -> None:
    said = once(app.port, "GET", "/said", X_Test="one", x_test="two, three").json()
    assert said["joined"] == "one, two, three"


# ---------------------------------------------------------------------- together


def share(app: UwsApp, target: str) -> None:
    """Have GETs of a target share their answers from now on: at the latest this one did it."""
    assert once(app.port, "HEAD", target).status == 200


@contextlib.contextmanager
def wires(app: UwsApp, count: int) -> Iterator[list[Wire]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Wire(app.port)) for _ in range(count)]


def test_gets_of_a_target_share_an_answer_and_keep_their_ids(app: UwsApp) -> None:
    share(app, "/shared?later=0.2")
    with wires(app, 50) as sharing:
        for number, wire in enumerate(sharing):
            name = {"X_Request_Id": f"mine-{number}"} if number % 2 else {}
            wire.send(request_bytes("GET", "/shared?later=0.2", **name))
        answers = [wire.answer() for wire in sharing]
    assert {answer.status for answer in answers} == {200}
    assert len({answer.body for answer in answers}) < 5  # flights
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert len(set(ids)) == len(ids)
    assert [name for name in ids if name.startswith("mine-")] == [f"mine-{number}" for number in range(1, 50, 2)]


def test_who_comes_after_the_departure_takes_the_next_flight(app: UwsApp) -> None:
    share(app, "/shared?departs=0.3")
    with Wire(app.port) as early, Wire(app.port) as late:
        early.send(request_bytes("GET", "/shared?departs=0.3"))
        assert early.is_silent(0.1)
        late.send(request_bytes("GET", "/shared?departs=0.3"))
        assert int(late.answer().body) == int(early.answer().body) + 1


@pytest.mark.parametrize(("command", "status"), [("now", 200), ("twice", 200), ("refuse", 400), ("raise", 500)])
def test_flight_that_is_decided_at_once_is_answered_once(app: UwsApp, command: str, status: int) -> None:
    target = f"/shared?{command}"
    share(app, target)
    with Wire(app.port) as wire:
        for _ in range(3):
            assert wire.request("GET", target).status == status
        assert wire.is_silent(0.1)
        assert wire.request("HEAD", target).status == 200  # alone, and without a body
        assert wire.request("GET", "/state").status == 200


def test_flight_that_nobody_answers_ends_at_its_deadline(app: UwsApp) -> None:
    share(app, "/shared?never")
    with wires(app, 3) as sharing:
        for wire in sharing:
            wire.send(request_bytes("GET", "/shared?never"))
        for wire in sharing:
            assert_problem(wire.answer(), 500, "internal-error")


def test_who_leaves_a_flight_harms_nobody_in_it(app: UwsApp) -> None:
    share(app, "/shared?later=0.3")
    with wires(app, 30) as sharing:
        for wire in sharing:
            wire.send(request_bytes("GET", "/shared?later=0.3"))
        wait_until(lambda: not app.state()["idle"])
        for number, wire in enumerate(sharing):
            if number % 3 == 1:
                wire.close()
            elif number % 3 == 2:
                wire.reset()
        for number in range(0, 30, 3):
            assert sharing[number].answer().status == 200


@pytest.mark.parametrize(
    ("given", "kept"), [("x", True), ("~!" * 64, True), ("x" * 129, False), ("two words", False), ("é", False)]
)
def test_id_is_kept_if_it_is_visible_ascii(app: UwsApp, given: str, kept: bool) -> None:
    share(app, "/shared?now")
    for answer in (
        once(app.port, "GET", "/shared?now", X_Request_Id=given),
        once(app.port, "POST", "/posts", b"hello", X_Request_Id=given),
        once(app.port, "POST", "/echo", b"hello", X_Request_Id=given),
    ):
        assert (answer.headers["x-request-id"] == given) is kept
        assert re.fullmatch("[!-~]{1,128}", answer.headers["x-request-id"])


def test_any_number_of_targets_is_answered(new_app: Callable[..., UwsApp]) -> None:
    app = new_app()
    with Wire(app.port) as wire, Wire(app.port) as early:
        share(app, "/shared?later=0.5")
        early.send(request_bytes("GET", "/shared?later=0.5"))
        for number in range(2500):
            assert wire.request("GET", f"/shared?now={number}").json() == "alone"
            assert wire.request("GET", f"/shared?now={number}").status == 200
        assert wire.request("GET", "/shared?now=2499").json() != "alone"
        assert wire.request("GET", "/shared?now=1").json() == "alone"  # forgotten: only so many are known
        assert early.answer().json() == 1
        for _ in range(2):
            assert wire.request("GET", "/shared?" + "x" * 200).json() == "alone"


def test_posts_come_several_at_once(new_app: Callable[..., UwsApp]) -> None:
    app = new_app()
    with wires(app, 50) as posting:
        for number, wire in enumerate(posting):
            wire.send(request_bytes("POST", "/posts", b"%d" % number)[:-1])
        os.kill(app.pid, signal.SIGSTOP)
        for number, wire in enumerate(posting):
            wire.send(request_bytes("POST", "/posts", b"%d" % number)[-1:])
        os.kill(app.pid, signal.SIGCONT)
        assert [int(wire.answer().body) for wire in posting] == list(range(50))
    assert max(app.state()["taken"]) >= 10


def test_post_brings_its_headers(app: UwsApp) -> None:
    headers = {"X_Request_Id": "mine", "Authorization": "Bearer x" * 300, "Idempotency_Key": "key"}
    said = once(app.port, "POST", "/posts", b"said", **headers, X_Forwarded_For="one", x_forwarded_for="two, three")
    assert said.json() == ["mine", "Bearer x" * 300, "key", "one, two, three", "127.0.0.1"]
    assert once(app.port, "POST", "/posts", b"said").json()[1:] == ["", "", "", "127.0.0.1"]
    assert once(app.port, "POST", "/posts", b"said", Authorization="x" * 8200).body == b"said"  # too much: alone


@pytest.mark.parametrize(("body", "status"), [(b"refuse", 400), (b"raise", 500), (b"later0.01", 200)])
def test_post_is_answered_once_whatever_the_answer(app: UwsApp, body: bytes, status: int) -> None:
    with Wire(app.port) as wire:
        assert wire.request("POST", "/posts", body).status == status
        assert wire.is_silent(0.1)
        assert wire.request("POST", "/posts", b"next").body == b"next"


def test_post_that_nobody_answers_ends_at_its_deadline(app: UwsApp) -> None:
    assert_problem(once(app.port, "POST", "/posts", b"never"), 500, "internal-error")


def test_second_answer_to_a_post_does_not_go_to_whoever_has_its_place_now(app: UwsApp) -> None:
    with Wire(app.port) as first, wires(app, 20) as others:
        assert first.request("POST", "/posts", b"repeat").json() == "first"
        for wire in others:
            wire.send(request_bytes("POST", "/posts", b"later0.5"))
        assert {wire.answer().body for wire in others} == {b'"late"'}
        assert first.is_silent(0.6)


def test_answer_to_a_post_whose_client_left_goes_nowhere(app: UwsApp) -> None:
    with wires(app, 20) as posting:
        for wire in posting:
            wire.send(request_bytes("POST", "/posts", b"later0.2"))
        wait_until(lambda: not app.state()["idle"])
        for number, wire in enumerate(posting):
            wire.reset() if number % 2 else wire.close()
    wait_until(lambda: app.state()["idle"])
    assert once(app.port, "POST", "/posts", b"later0.3").status == 200


@pytest.mark.parametrize(
    "request_", [request_bytes("POST", "/posts", b"later0.1"), request_bytes("GET", "/shared?later=0.1")]
)
def test_request_behind_one_that_waits_in_c_is_answered_after_it(app: UwsApp, request_: bytes) -> None:
    share(app, "/shared?later=0.1")
    with Wire(app.port) as wire:
        wire.send(request_ + request_ + request_bytes("GET", "/said?two") + request_)
        answers = [wire.answer() for _ in range(4)]
        assert [answer.status for answer in answers] == [200] * 4
        assert answers[2].json()["query"] == "two"
    wait_until(lambda: app.state()["idle"])


def test_connection_whose_first_request_waits_in_c_is_not_closed_for_its_silence(
    new_app: Callable[..., UwsApp],
) -> None:
    app = new_app("patient")
    share(app, "/shared?later=3")
    with Wire(app.port) as flight, Wire(app.port) as post:
        flight.send(request_bytes("GET", "/shared?later=3"))
        post.send(request_bytes("POST", "/posts", b"later3"))
        assert (flight.answer().status, post.answer().status) == (200, 200)


def test_all_goes_alone_where_nothing_was_compiled(new_app: Callable[..., UwsApp]) -> None:
    app = new_app("plain")
    with Wire(app.port) as wire:
        for _ in range(3):
            assert wire.request("GET", "/shared?now").json() == "alone"
            assert wire.request("POST", "/posts", b"hello").body == b"hello"
    stop(app, "TERM")
    wait_until(lambda: not app.running)
    assert app.status == 0
    assert_quiet(app)


# ---------------------------------------------------------------------- WebSockets


def test_websocket_echoes(app: UwsApp) -> None:
    with Wire(app.port) as wire:
        assert wire.upgrade("/ws").status == 101
        wire.send_text(b"echo hello")
        assert wire.frame() == (TEXT, b"hello")


def test_published_message_reaches_subscribers_and_nobody_else(app: UwsApp) -> None:
    with Wire(app.port) as first, Wire(app.port) as second, Wire(app.port) as left:
        for wire in (first, second, left):
            wire.upgrade("/ws")
        left.send_text(b"leave")
        left.send_text(b"echo gone")
        assert left.frame() == (TEXT, b"gone")
        first.send_text(b"publish news")
        assert first.frame() == second.frame() == (TEXT, b"news")
        left.send_text(b"echo nothing else")
        assert left.frame() == (TEXT, b"nothing else")


def test_refused_upgrade_is_an_ordinary_answer(app: UwsApp) -> None:
    with Wire(app.port) as wire:
        assert_problem(wire.upgrade("/ws?refuse"), 403, "forbidden")
        assert_problem(wire.upgrade("/ws?raise"), 500, "internal-error")
        assert wire.request("GET", "/state").status == 200


@pytest.mark.parametrize("command", ["end", "dismiss"])
def test_everything_on_a_closed_socket_does_nothing(app: UwsApp, command: str) -> None:
    before = len(app.state()["after_close"])
    with Wire(app.port) as wire:
        wire.upgrade("/ws")
        wire.send_text(command.encode())
        assert wire.frame() == (CLOSE, b"\x03\xf0asked for")
        assert wire.ended
    # Twice: in the close callback, and in the handler that closed it.
    assert app.state()["after_close"][before:] == [["CLOSED", 0], ["CLOSED", 0]]


def test_socket_whose_client_vanished_is_closed(app: UwsApp) -> None:
    before = len(app.state()["after_close"])
    wire = Wire(app.port)
    wire.upgrade("/ws")
    wire.reset()
    wait_until(lambda: app.state()["sockets"] == 0)
    assert app.state()["after_close"][before:] == [["CLOSED", 0]]


def test_socket_callback_that_raises_is_logged_and_survived(app: UwsApp) -> None:
    with Wire(app.port) as wire:
        wire.upgrade("/ws?raise-open")
        wire.send_text(b"nonsense")
        wire.send_text(b"echo still here")
        assert wire.frame() == (TEXT, b"still here")
    assert "ValueError: opened raises" in app.output
    assert "ValueError: received raises" in app.output


def test_message_over_the_limit_closes_only_that_socket(app: UwsApp) -> None:
    with Wire(app.port) as big, Wire(app.port) as other:
        big.upgrade("/ws")
        other.upgrade("/ws")
        big.send(b"\x81\xfe\x08\x00" + b"\x00" * 4 + b"x" * 2048)
        assert big.frame() == (CLOSE, b"\x03\xf1expected a message of at most 1024 bytes")
        assert big.ended
        other.send_text(b"echo here")
        assert other.frame() == (TEXT, b"here")


MASKED = b"\x80\x00\x00\x00\x00"


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (b"\x81\x02hi", 1002),  # not masked
        (b"\x81\x05hello", 1002),
        (b"\x89\x00", 1002),
        (b"\xc1" + MASKED, 1002),  # a reserved bit
        (b"\x83" + MASKED, 1002),  # an opcode that is none
        (b"\x09" + MASKED, 1002),  # a ping in pieces
        (b"\x80" + MASKED, 1002),  # the rest of nothing
        (b"\x81\x81\x00\x00\x00\x00\xff", 1007),
        (b"\x88\x81\x00\x00\x00\x00x", 1002),  # half a close code
    ],
)
def test_frame_that_breaks_a_rule_closes_with_a_code(app: UwsApp, frame: bytes, code: int) -> None:
    with Wire(app.port) as wire:
        wire.upgrade("/ws")
        wire.send_text(b"echo before")
        assert wire.frame() == (TEXT, b"before")
        wire.send(frame)
        opcode, payload = wire.frame()
        assert (opcode, int.from_bytes(payload[:2], "big")) == (CLOSE, code), payload
        assert wire.ended


def test_what_comes_in_one_piece_with_a_bad_frame_is_still_heard(app: UwsApp) -> None:
    with Wire(app.port) as wire:
        wire.upgrade("/ws")
        good = b"\x81\x87\x00\x00\x00\x00echo hi"
        wire.send(good + b"\x81\x02hi" + good)
        assert wire.frame() == (TEXT, b"hi")
        assert wire.frame() == (CLOSE, b"\x03\xeaexpected a masked frame")
        assert wire.ended


def test_message_in_pieces_of_any_size_is_heard_whole(app: UwsApp) -> None:
    with Wire(app.port) as wire:
        wire.upgrade("/ws")
        text = "echo Žižka 🦊".encode()
        pieces = [text[:7], text[7:12], text[12:]]
        for number, piece in enumerate(pieces):
            first = (0x81 if number == 2 else 0x01) if number == 0 else (0x80 if number == 2 else 0x00)
            for byte in bytes([first, 0x80 | len(piece)]) + b"\x00" * 4 + piece:
                wire.send(bytes([byte]))
            wire.send(b"\x89" + MASKED)
        assert wire.frame() == (PONG, b"")
        assert wire.frame() == (PONG, b"")
        assert sorted([wire.frame(), wire.frame()]) == [(TEXT, text[5:]), (PONG, b"")]


@pytest.mark.parametrize(
    ("headers", "status", "kind"),
    [
        ({"Sec-WebSocket-Version": "8"}, 426, "upgrade-required"),
        ({"Sec-WebSocket-Version": ""}, 426, "upgrade-required"),
        ({"Upgrade": "h2c"}, 426, "upgrade-required"),
        ({"Connection": "keep-alive"}, 400, "invalid-request"),
        ({"Sec-WebSocket-Key": "!" * 24}, 400, "invalid-request"),
    ],
)
def test_handshake_that_breaks_a_rule_is_refused(app: UwsApp, headers: dict[str, str], status: int, kind: str) -> None:
    with Wire(app.port) as wire:
        assert_problem(wire.upgrade("/ws", **headers), status, kind)
        assert wire.request("GET", "/state").status == 200


def test_handshake_is_taken_beside_keep_alive(app: UwsApp) -> None:
    with Wire(app.port) as wire:
        assert wire.upgrade("/ws", Connection="keep-alive, Upgrade", Upgrade="WebSocket").status == 101


def test_quiet_client_is_pinged_and_stays_if_it_answers(app: UwsApp) -> None:
    """Its idle_timeout_s is 8: pinged after 4 s of them at most."""
    with Wire(app.port) as quiet, Wire(app.port) as deaf:
        for wire in (quiet, deaf):
            wire.upgrade("/ws")
        for _ in range(2):
            began_s = time.monotonic()
            assert quiet.any_frame() == (PING, b"")
            assert time.monotonic() - began_s < 4 + LITTLE_S
            quiet.send(b"\x8a" + MASKED)
        assert deaf.any_frame() == (PING, b"")
        assert deaf.ended, "it answered no ping"
        quiet.send_text(b"echo still here")
        assert quiet.frame() == (TEXT, b"still here")


def test_client_that_never_reads_is_buffered_up_to_a_bound_and_drained_when_it_reads(app: UwsApp) -> None:
    drained = app.state()["drained"]
    with Wire(app.port, receive_buffer_bytes=4096) as wire:
        wire.upgrade("/ws")
        wire.send_text(b"flood 100")  # 6.5 MB
        statuses, buffered_bytes = wait_until(lambda: app.state()["flooded"])
        # Sent as far as the kernel takes it, then buffered, then dropped; nothing in between.
        assert statuses == sorted(statuses, key=[1, 0, 2].index)
        assert set(statuses) >= {0, 2}
        assert MAX_BACKPRESSURE_BYTES <= buffered_bytes <= MAX_BACKPRESSURE_BYTES + 2 * len(CHUNK)
        assert (len(statuses) - statuses.count(2)) * len(CHUNK) < buffered_bytes + 500_000, "the kernel took too much"
        assert app.state()["drained"] == drained
        for _ in range(len(statuses) - statuses.count(2)):
            assert wire.frame() == (TEXT, CHUNK)
        wait_until(lambda: app.state()["drained"] > drained, message="the drain callback never fired")


# ---------------------------------------------------------------------- the process


def test_idle_process_sleeps(new_app: Callable[..., UwsApp]) -> None:
    app = new_app()
    with Wire(app.port) as wire:
        wire.upgrade("/ws")
        before = wake_ups(app.pid)
        time.sleep(1)
        assert wake_ups(app.pid) - before < 30  # socketify's own loop: 100 and more


def test_taken_port_is_a_clear_error(app: UwsApp, tmp_path: Path) -> None:
    second = UwsApp(tmp_path, port=app.port)
    second.launch()
    wait_until(lambda: not second.running)
    assert second.status == 1
    assert (
        f"UwsError: PORT: expected a free port at HOST=127.0.0.1, got {app.port}: another process has it"
        in second.output
    )


def test_port_is_free_again_after_a_kill(new_app: Callable[..., UwsApp]) -> None:
    first = new_app()
    with Wire(first.port) as wire:
        assert wire.request("GET", "/state").status == 200
        first.kill()
        assert new_app(port=first.port).running


@pytest.mark.skipif(not shutil.which("ss"), reason="needs `ss` of iproute2")
def test_listening_socket_has_its_backlog_and_accepted_ones_their_small_send_buffer(app: UwsApp) -> None:
    allowed = int(Path("/proc/sys/net/core/somaxconn").read_text())
    listening = ss("-ltn", f"sport = :{app.port}").splitlines()[-1].split()
    assert int(listening[2]) == min(4096, allowed)
    with Wire(app.port) as wire:
        wire.upgrade("/ws")
        accepted = ss("-tnm", "state", "established", f"sport = :{app.port}")
        assert set(re.findall(r",tb(\d+),", accepted)) == {str(2 * 65_536)}  # the kernel doubles what it is told


@pytest.mark.parametrize("name", ["TERM", "INT"])
def test_stop_finishes_requests_in_flight_and_says_goodbye_to_sockets(
    new_app: Callable[..., UwsApp], name: str
) -> None:
    app = new_app()
    with (
        Wire(app.port) as socket,
        Wire(app.port) as slow,
        Wire(app.port) as body,
        Wire(app.port) as idle,
        Wire(app.port) as flight,
        Wire(app.port) as post,
    ):
        socket.upgrade("/ws")
        assert idle.request("GET", "/state").status == 200
        slow.send(request_bytes("GET", "/later?0.5"))
        share(app, "/shared?later=0.5")
        flight.send(request_bytes("GET", "/shared?later=0.5"))
        other_half = request_bytes("POST", "/posts", b"hello")
        post.send(other_half[:-2])
        half = request_bytes("POST", "/echo", b"hello")
        body.send(half[:-2])
        wait_until(lambda: app.state()["pending"] == 2 and not app.state()["idle"])
        stop(app, name)
        assert socket.frame() == (CLOSE, b"\x03\xe9restarting")
        with pytest.raises(ConnectionRefusedError):
            Wire(app.port)
        body.send(half[-2:])
        post.send(other_half[-2:])
        for wire, expected in ((body, b"hello"), (slow, b'"late"'), (flight, b"1"), (post, b"hello")):
            answer = wire.answer()
            assert (answer.status, answer.body, answer.headers["connection"]) == (200, expected, "close")
            assert wire.ended
        wait_until(lambda: not app.running)
    assert app.status == 0
    assert_quiet(app)


def test_second_signal_ends_the_process_at_once(new_app: Callable[..., UwsApp]) -> None:
    app = new_app()
    with Wire(app.port) as wire:
        body = request_bytes("POST", "/echo", b"hello")
        wire.send(body[:-1])
        wait_until(lambda: app.state()["pending"] == 1)
        stop(app, "TERM")
        wait_until(lambda: not accepts(app.port))
        stop(app, "TERM")
        wait_until(lambda: not app.running, 0.9)  # before the body's deadline
        assert app.status == 128 + 15


# ---------------------------------------------------------------------- helpers


def assert_problem(answer: Answer, status: int, kind: str) -> None:
    assert answer.status == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["type"] == f"urn:scoreboard:{kind}"
    assert answer.json()["status"] == status
    assert answer.json()["title"]
    assert answer.json()["detail"]


def assert_quiet(app: UwsApp) -> None:
    """Nothing that asyncio, cffi or Python say about a process that ended badly."""
    assert not re.search("Traceback|asyncio|never awaited|destroyed|Warning|Exception ignored", app.output), app.output


def stop(app: UwsApp, name: str) -> None:
    os.kill(app.pid, {"TERM": 15, "INT": 2}[name])


def accepts(port: int) -> bool:
    try:
        Wire(port).close()
    except ConnectionRefusedError:
        return False
    return True


def wake_ups(pid: int) -> int:
    assert alive(pid)
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"^voluntary_ctxt_switches:\s*(\d+)", status, re.MULTILINE)[0])


def ss(*arguments: str) -> str:
    return subprocess.run(["ss", "-H", *arguments], capture_output=True, text=True, check=True).stdout
