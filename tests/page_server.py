"""A stand-in for the server that says on /live-updates whatever a test wants a page to hear, and hears what it says.

It serves the real files with their real headers. For what the real server says only when something is wrong.
"""

from __future__ import annotations

import json
import queue
import threading
from typing import Any

from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.sync.server import ServerConnection, serve

from server.embedded import ADDRESS
from server.web_files import WEB, read_files

BOARDS = ("main", "weekly")
TIMEOUT_S = 10.0


class Visitor:
    """One page that is connected."""

    def __init__(self, connection: ServerConnection) -> None:
        self._connection = connection
        assert connection.request is not None
        self.path = connection.request.path
        self.messages: queue.Queue[dict[str, Any]] = queue.Queue()

    def say(self, kind: str, **fields: Any) -> None:
        """Send a message."""
        self._connection.send(json.dumps({"type": kind, **fields}))

    def show(self, *scores: tuple[str, int], board: str = "main", **fields: Any) -> None:
        """Send a list."""
        top = [{"playerId": player, "score": score} for player, score in scores]
        self.say("leaderboardUpdate", board=board, seq=1, topScores=top, **fields)

    def heard(self) -> dict[str, Any]:
        """The next message of the page."""
        return self.messages.get(timeout=TIMEOUT_S)

    def close(self, code: int, reason: str) -> None:
        """End the connection."""
        self._connection.close(code, reason)

    def listen(self) -> None:
        """Take in what the page says until the connection ends."""
        try:
            for text in self._connection:
                self.messages.put(json.loads(text))
        except ConnectionClosed:
            pass


class Exchange:
    """What a file needs of server.uws.Request: a browser that sends no headers, and an answer."""

    head_lines = b""

    def joined_header(self, _name: bytes) -> bytes:
        """Nothing."""
        return b""

    def answer(self, head: bytes, body: bytes, content_type: bytes) -> None:
        """Take the answer."""
        _, *lines = head.decode().split("\r\n")
        headers = Headers(line.split(": ", 1) for line in lines)
        headers["Content-Type"] = content_type.decode()
        headers["Content-Length"] = str(len(body))
        headers["Connection"] = "close"
        self.response = Response(200, "OK", headers, body)


class PageServer:
    """Serves until it is stopped; whoever connects waits to be welcomed."""

    def __init__(self) -> None:
        self._files = read_files(WEB, BOARDS)
        self._visitors: queue.Queue[Visitor] = queue.Queue()
        self._server = serve(self._visit, ADDRESS, 0, process_request=self._answer)
        self._thread = threading.Thread(target=self._server.serve_forever, name="page server")
        self._thread.start()
        self.url = f"http://{ADDRESS}:{self._server.socket.getsockname()[1]}/"

    def __enter__(self) -> PageServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()

    def welcome(self) -> Visitor:
        """The next page that connects."""
        return self._visitors.get(timeout=TIMEOUT_S)

    @property
    def nobody_came(self) -> bool:
        """Whether every visitor has been welcomed."""
        return self._visitors.empty()

    def _visit(self, connection: ServerConnection) -> None:
        visitor = Visitor(connection)
        self._visitors.put(visitor)
        visitor.listen()

    def _answer(self, _connection: ServerConnection, request: Request) -> Response | None:
        path = request.path.partition("?")[0]
        if path == "/live-updates":
            return None
        if path not in self._files:
            return Response(404, "Not Found", Headers())
        exchange = Exchange()
        self._files[path].answer(exchange)
        return exchange.response
