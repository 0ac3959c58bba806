"""What clients really send reaches a handler as it was meant, or is refused at once; nothing is met with silence.

Each request is sent whole, cut in two at every byte, and byte by byte: where a packet ends has no meaning.
"""

from __future__ import annotations

import contextlib
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.client import assert_problem
from tests.services import wait_until
from tests.test_uws import UwsApp, share
from tests.uws_app import CHUNK
from tests.wire import TEXT, Answer, Wire, frame_bytes, once, request_bytes

POST = b"POST /posts HTTP/1.1\r\nHost: x\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
HELLO = b"Content-Length: 5\r\n\r\nhello"
GET = b"GET /said?a HTTP/1.1\r\nHost: x\r\n"
NEXT = request_bytes("GET", "/said?next")

READ_AS_HELLO = {
    "chunk extension": CHUNKED + b"5;a=b\r\nhello\r\n0\r\n\r\n",
    "chunk extensions everywhere": CHUNKED + b'2 ; a="1"\r\nhe\r\n3\t;x\r\nllo\r\n0;z\r\n\r\n',
    "trailers": CHUNKED + b"5\r\nhello\r\n0\r\nX-Sum: 1\r\nX-More: 2\r\n\r\n",
    "leading zeros": CHUNKED + b"00005\r\nhello\r\n000\r\n\r\n",
    "upper case hex": CHUNKED.replace(b"chunked", b"Chunked") + b"5\r\nhello\r\n0\r\n\r\n",
    "other case of names": b"POST /posts HTTP/1.1\r\nHOST: x\r\ncontent-LENGTH: 5\r\n\r\nhello",
    "blanks around values": b"POST /posts HTTP/1.1\r\nHost:x\r\nContent-Length: \t5 \t\r\n\r\nhello",
    "the same length twice": POST + b"Content-Length: 5\r\n" + HELLO,
    "header name with an underscore": POST + b"x_y.z: 1\r\n" + HELLO,
    "absolute target": b"POST http://x/posts HTTP/1.1\r\nHost: x\r\n" + HELLO,
    "absolute target of https": b"POST HTTPS://x:8080/posts HTTP/1.1\r\nHost: x\r\n" + HELLO,
    "a later minor version": b"POST /posts HTTP/1.2\r\nHost: x\r\n" + HELLO,
    "an empty line before": b"\r\n" + POST + HELLO,
    "empty lines before": b"\r\n\n\r\n" + POST + HELLO,
    "a header of 9 KB": POST + b"Cookie: " + b"c" * 9_000 + b"\r\n" + HELLO,
    "48 headers": POST + b"X-Some: x\r\n" * 46 + HELLO,
    "PROXY, version 2": b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\x7f\0\0\1\x7f\0\0\1\1\2\3\4" + POST
    + HELLO,
}  # fmt: skip
ENDS_AFTER = {
    "HTTP/1.0": b"POST /posts HTTP/1.0\r\n" + HELLO,
    "HTTP/1.0 that would stay": b"POST /posts HTTP/1.0\r\nHost: x\r\nConnection: keep-alive\r\n" + HELLO,
    "HTTP/1.0 that expects": b"POST /posts HTTP/1.0\r\nExpect: 100-continue\r\n" + HELLO,
    "Connection: Close": POST + b"Connection: Close\r\n" + HELLO,
    "Connection: two lines": POST + b"Connection: keep-alive\r\nConnection: close\r\n" + HELLO,
    "Connection: a list": POST + b"Connection: keep-alive, CLOSE\r\n" + HELLO,
}
REFUSED = {
    "no Host": (400, b"GET /said?a HTTP/1.1\r\nAccept: */*\r\n\r\n"),
    "nothing but a request line": (400, b"GET /said?a HTTP/1.1\r\n\r\n"),
    "two Hosts": (400, GET + b"Host: y\r\n\r\n"),
    "bare line feeds": (400, b"GET /said?a HTTP/1.1\nHost: x\n\n"),
    "a bare line feed in headers": (400, GET + b"A: b\n\r\n"),
    "a line that goes on": (400, GET + b"A: b\r\n c\r\n\r\n"),
    "a blank before the colon": (400, GET + b"A : b\r\n\r\n"),
    "no colon": (400, GET + b"A\r\n\r\n"),
    "no name": (400, GET + b": b\r\n\r\n"),
    "NUL in a value": (400, GET + b"A: b\0c\r\n\r\n"),
    "a lone CR in a value": (400, GET + b"A: b\rc\r\n\r\n"),
    "NUL in the target": (400, b"GET /a\0b HTTP/1.1\r\nHost: x\r\n\r\n"),
    "a blank in the target": (400, b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n"),
    "a relative target": (400, b"GET said HTTP/1.1\r\nHost: x\r\n\r\n"),
    "no host in the target": (400, b"GET http:///said HTTP/1.1\r\nHost: x\r\n\r\n"),
    "CONNECT": (400, b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n"),
    "TLS": (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 64),
    "HTTP/0.9": (505, b"GET /said?a\r\n"),
    "HTTP/2": (505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "HTTP/3.7": (505, b"GET /said?a HTTP/3.7\r\nHost: x\r\n\r\n"),
    "no version": (400, b"GET /said?a SMTP/1.1\r\nHost: x\r\n\r\n"),
    "two lengths": (400, POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello"),
    "a list of lengths": (400, POST + b"Content-Length: 5, 5\r\n\r\nhello"),
    "no length": (400, POST + b"Content-Length:\r\n\r\nhello"),
    "a signed length": (400, POST + b"Content-Length: +5\r\n\r\nhello"),
    "a length of 10 digits": (400, POST + b"Content-Length: 1000000000\r\n\r\nhello"),
    "length and chunks": (400, POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nhello"),
    "chunks and length": (400, POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\nhello"),
    "chunks in HTTP/1.0": (400, b"POST /posts HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "gzip": (501, POST + b"Transfer-Encoding: gzip\r\n\r\nhello"),
    "gzip, chunked": (501, POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"),
    "chunked twice": (501, POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "identity": (501, POST + b"Transfer-Encoding: identity\r\n\r\n"),
    "an empty coding": (501, POST + b"Transfer-Encoding:\r\n\r\n"),
    "an unknown method": (501, b"PROPFIND /said?a HTTP/1.1\r\nHost: x\r\n\r\n"),
    "a method in lower case": (501, b"get /said?a HTTP/1.1\r\nHost: x\r\n\r\n"),
    "another expectation": (417, POST + b"Expect: applause\r\nContent-Length: 5\r\n\r\n"),
    "49 headers": (431, GET + b"X-Some: x\r\n" * 48 + b"\r\n"),
    "headers of 17 KB": (431, GET + b"X-Long: " + b"x" * 17_000 + b"\r\n\r\n"),
    "headers without an end": (431, GET + b"X-Long: " + b"x" * 17_000),
    "a target of 17 KB": (414, b"GET /" + b"x" * 17_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n"),
    "a target without an end": (414, b"GET /" + b"x" * 17_000),
    "no size of a chunk": (400, CHUNKED + b";a\r\nhello\r\n0\r\n\r\n"),
    "a size that is no number": (400, CHUNKED + b"g\r\nhello\r\n0\r\n\r\n"),
    "a size with more behind it": (400, CHUNKED + b"5 5\r\nhello\r\n0\r\n\r\n"),
    "a chunk longer than its size": (400, CHUNKED + b"4\r\nhello\r\n0\r\n\r\n"),
    "a size of 2 GB": (400, CHUNKED + b"80000000\r\nhello"),
    "a size ended by a line feed": (400, CHUNKED + b"5\nhello\r\n0\r\n\r\n"),
    "a lone CR in an extension": (400, CHUNKED + b"5;a\rb\r\nhello\r\n0\r\n\r\n"),
    "trailers ended by a line feed": (400, CHUNKED + b"0\r\n\n" + NEXT),
    "a trailer ended by a line feed": (400, CHUNKED + b"0\r\nX-Sum: 1\n\r\n"),
    "extensions without an end": (400, CHUNKED + b"5;" + b"x" * 5_000),
    "trailers without an end": (431, CHUNKED + b"0\r\n" + b"X-Sum: 1\r\n" * 2_000),
}  # fmt: skip


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UwsApp]:
    app = UwsApp(tmp_path_factory.mktemp("wire"), "gc")
    app.start()
    yield app
    assert app.running, app.output_tail()
    wait_until(app.has_nothing_left, 5, "a request was left over")
    assert "callback failed" not in app.output
    app.stop()


def pieces(data: bytes) -> Iterator[list[bytes]]:
    """Ways in which the same bytes may arrive."""
    yield [data]
    for cut in range(1, min(len(data), 300)):
        yield [data[:cut], data[cut:]]
    if len(data) < 300:
        yield [data[at : at + 1] for at in range(len(data))]


@pytest.mark.parametrize("name", READ_AS_HELLO)
@pytest.mark.parametrize("path", [b"/posts", b"/echo"])
def test_body_is_read_however_it_is_wrapped(app: UwsApp, name: str, path: bytes) -> None:
    data = READ_AS_HELLO[name].replace(b"/posts ", path + b" ", 1)
    proxied = name.startswith("PROXY")  # which begins a connection
    with Wire(app.port) as wire:
        for parts in pieces(data):
            with Wire(app.port) if proxied else contextlib.nullcontext(wire) as used:
                for part in parts:
                    used.send(part)
                answer = used.answer()
                assert (answer.status, answer.body) == (200, b"hello"), (parts, answer)
        wire.send(data + NEXT)
        assert wire.answer().body == b"hello"
        assert wire.answer().json()["query"] == "next"


@pytest.mark.parametrize("name", ENDS_AFTER)
def test_connection_ends_after_the_answer(app: UwsApp, name: str) -> None:
    for cut in (0, 1, 20, 40):
        with Wire(app.port) as wire:
            wire.send(ENDS_AFTER[name][:cut])
            wire.send(ENDS_AFTER[name][cut:])
            assert wire.answer().body == b"hello"
            assert wire.ended


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_request_is_refused_at_once(app: UwsApp, name: str) -> None:
    status, data = REFUSED[name]
    for parts in ([data], [data[:3], data[3:]], [data[:60], data[60:]], [NEXT + data]):
        with Wire(app.port) as wire:
            for part in parts:
                _send(wire, part)
            if parts[0].startswith(NEXT):
                assert wire.answer().json()["query"] == "next"
            answer = wire.answer()
            assert_problem(answer, status, answer.json()["type"].rpartition(":")[2])
            assert answer.headers["connection"] == "close"
            assert wire.ended


def _send(wire: Wire, data: bytes) -> None:
    with contextlib.suppress(ConnectionError):  # refused before its end
        wire.send(data)


def test_health_check_of_http_1_0_is_answered(app: UwsApp) -> None:
    for check in (b"OPTIONS / HTTP/1.0\r\n\r\n", b"HEAD /said?a HTTP/1.0\r\n\r\n", b"GET /said?a HTTP/1.0\r\n\r\n"):
        with Wire(app.port) as wire:
            wire.send(check)
            answer = wire.answer(has_body=not check.startswith(b"HEAD"))
            assert answer.status == (404 if check.startswith(b"OPT") else 200)
            assert wire.ended


def test_asterisk_means_the_server(app: UwsApp) -> None:
    with Wire(app.port) as wire:
        wire.send(b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n")
        assert_problem(wire.answer(), 404, "not-found")


@pytest.mark.parametrize("path", ["/posts", "/echo"])
@pytest.mark.parametrize("expectation", ["100-continue", "100-Continue", "100-CONTINUE"])
def test_client_that_waits_for_our_word_gets_it(app: UwsApp, path: str, expectation: str) -> None:
    head, _, body = request_bytes("POST", path, b"hello", Expect=expectation).partition(b"\r\n\r\n")
    with Wire(app.port) as wire:
        wire.send(head + b"\r\n\r\n")
        assert wire.answer(has_body=False).status == 100
        wire.send(body)
        assert wire.answer().body == b"hello"


@pytest.mark.parametrize("after", [b"\r\n", b"\n", b"\r\n\r\n\r\n"])
@pytest.mark.parametrize(
    "request_", [request_bytes("POST", "/posts", b"later0.05"), request_bytes("POST", "/echo", b"x")]
)
def test_empty_line_after_a_body_spoils_nothing(app: UwsApp, request_: bytes, after: bytes) -> None:
    with Wire(app.port) as wire:
        wire.send(request_ + after)
        assert wire.answer().status == 200
        wire.send(NEXT)
        assert wire.answer().json()["query"] == "next"
        wire.send(request_)
        wire.send(after)
        wire.send(NEXT)
        assert [wire.answer().status for _ in range(2)] == [200, 200]


HALF_CLOSED = [
    request_bytes("POST", "/posts", b"later0.1"),
    request_bytes("POST", "/posts", b"hello"),
    request_bytes("GET", "/later?0.1"),
    request_bytes("GET", "/shared?later=0.1"),
    request_bytes("POST", "/echo", b"hello"),
    request_bytes("POST", "/posts", b"refuse"),
]


def shut_writing(wire: Wire) -> None:
    wire._socket.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("request_", HALF_CLOSED)
def test_client_that_sends_no_more_gets_its_answer(app: UwsApp, request_: bytes) -> None:
    share(app, "/shared?later=0.1")
    with Wire(app.port) as wire:
        wire.send(request_)
        shut_writing(wire)
        assert wire.answer().status in (200, 400)
        assert wire.ended


@pytest.mark.parametrize("request_", HALF_CLOSED)
def test_client_that_sends_no_more_gets_all_its_answers(app: UwsApp, request_: bytes) -> None:
    share(app, "/shared?later=0.1")
    with Wire(app.port) as wire:
        wire.send(request_ * 3)
        shut_writing(wire)
        assert {wire.answer().status for _ in range(3)} <= {200, 400}
        assert wire.ended


def test_client_that_sends_no_more_in_the_middle_is_gone(app: UwsApp) -> None:
    for part in (
        b"",
        NEXT[:20],
        request_bytes("POST", "/posts", b"hello")[:-2],
        CHUNKED,
    ):
        with Wire(app.port) as wire:
            wire.send(part)
            shut_writing(wire)
            assert wire.ended


def test_refusal_names_what_was_expected(app: UwsApp) -> None:
    answer = once(app.port, "POST", "/posts", None, Transfer_Encoding="gzip")
    assert_problem(answer, 501, "not-implemented", "Transfer-Encoding: expected chunked")
    assert re.fullmatch("[0-9]+", answer.headers["content-length"])


def test_head_line_added_to_an_answer_is_on_a_refusal_too(app: UwsApp) -> None:
    answer: Answer = once(app.port, "GET", "/said", None, Expect="applause")
    assert_problem(answer, 417, "expectation-failed")


def test_client_of_many_requests_at_once_lets_others_through(app: UwsApp) -> None:
    count, before = 1000, app.state()["said"]
    with Wire(app.port) as wire:
        wire.send(NEXT * count)
        assert wire.answer().status == 200
        assert app.state()["said"] - before < count
        assert all(wire.answer().json()["query"] == "next" for _ in range(count - 1))
        assert app.state()["said"] - before == count


@pytest.mark.parametrize("path", ["/large", "/shared?large"])
@pytest.mark.parametrize("sends_no_more", [False, True])
def test_client_that_takes_no_answers_has_few_kept_and_none_lost(app: UwsApp, path: str, sends_no_more: bool) -> None:
    share(app, "/shared?large")
    count, before = 200, app.state()["large"]
    with Wire(app.port, receive_buffer_bytes=65_536) as wire:
        wire.send(request_bytes("GET", path) * count)
        if sends_no_more:
            shut_writing(wire)
        assert wire.answer().body == CHUNK
        assert app.state()["large"] - before < count / 4
        assert all(wire.answer().body == CHUNK for _ in range(count - 1))
        if sends_no_more:
            assert wire.ended
        else:
            assert wire.request("GET", "/said?next").json()["query"] == "next"


UPGRADE = request_bytes(
    "GET",
    "/ws",
    Connection="Upgrade",
    Upgrade="websocket",
    Sec_WebSocket_Version="13",
    Sec_WebSocket_Key="a" * 22 + "==",
)


@pytest.mark.parametrize("before", [b"", NEXT, NEXT * 20], ids=["alone", "behind one", "behind many"])
def test_frames_behind_an_upgrade_are_read(app: UwsApp, before: bytes) -> None:
    frames = frame_bytes(TEXT, b"echo one") + frame_bytes(TEXT, b"echo two")
    for cut in range(len(frames) + 1):
        with Wire(app.port) as wire:
            wire.send(before + UPGRADE + frames[:cut])
            for _ in range(before.count(NEXT)):
                assert wire.answer().status == 200
            assert wire.answer().status == 101
            wire.send(frames[cut:])
            assert [wire.frame(), wire.frame()] == [(TEXT, b"one"), (TEXT, b"two")]


def test_frame_behind_an_upgrade_that_breaks_a_rule_is_told(app: UwsApp) -> None:
    with Wire(app.port) as wire:
        wire.send(UPGRADE + frame_bytes(TEXT, b"echo one") + frame_bytes(TEXT, b"two", masked=False))
        assert wire.answer().status == 101
        assert wire.frame() == (TEXT, b"one")
        opcode, payload = wire.frame()
        assert (opcode, payload[:2]) == (8, (1002).to_bytes(2, "big"))
        assert wire.ended


def test_body_that_stops_is_told_so_whenever_it_does(tmp_path: Path) -> None:
    """uSockets looks at its own time-outs once in 4 s, and hung up first on half of the bodies."""
    begun = (request_bytes("POST", "/posts", b"hello")[:-1], request_bytes("POST", "/echo", b"hello")[:-1], CHUNKED)
    app = UwsApp(tmp_path, "slow-bodies")
    with contextlib.ExitStack() as stack:
        stack.callback(app.stop)
        app.start()
        wires = []
        for _ in range(8):
            for data in begun:
                wires.append(stack.enter_context(Wire(app.port, timeout_s=15)))
                wires[-1].send(data)
            time.sleep(0.5)
        assert {wire.answer().status for wire in wires} == {408}
