"""A TCP proxy that can fall silent: what it then holds open it swallows, as one that forgot its connections."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from server.embedded import ADDRESS


class SilentProxy:
    """Passes everything on to a port, until it is told to swallow."""

    def __init__(self, port: int) -> None:
        self.accepted = 0
        self.swallowed = 0
        """Bytes that never came where they were sent to."""

        self.swallow_at: bytes | None = None
        """When a client sends this, everything before it has passed, and it and what follows is swallowed."""

        self._target = port
        self._swallow_new = False
        self._sockets: list[socket.socket] = []
        self._awake = threading.Event()
        self._listening = socket.create_server((ADDRESS, 0))
        self.port = int(self._listening.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def swallow(self, *, new_ones: bool = False) -> None:
        """From now on nothing passes through the connections there are, nor through `new_ones`, if those too."""
        self._awake.set()
        self._awake = threading.Event()
        self._swallow_new = new_ones

    def wake(self) -> None:
        """New connections pass again."""
        self._swallow_new = False

    def close(self) -> None:
        """End it, with all its connections."""
        for each in (self._listening, *self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            self.accepted += 1
            self._sockets.append(client)
            silent = threading.Event() if self._swallow_new else self._awake
            if self._swallow_new:
                silent.set()
            try:
                server = socket.create_connection((ADDRESS, self._target))
            except OSError:
                client.close()
                continue
            self._sockets.append(server)
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._pass_on, args=(source, sink, silent), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, silent: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if self.swallow_at and self.swallow_at in data:
                    self.swallow_at = None
                    self.swallow()
                if silent.is_set():
                    self.swallowed += len(data)
                else:
                    sink.sendall(data)
            if not silent.is_set():
                sink.shutdown(socket.SHUT_WR)


@contextmanager
def silent_proxy(url: str) -> Iterator[tuple[SilentProxy, str]]:
    """A proxy in front of the server of a URL, and the URL that leads through it."""
    before, _, after = url.rpartition(":")
    port, slash, database = after.partition("/")
    proxy = SilentProxy(int(port))
    try:
        yield proxy, f"{before}:{proxy.port}{slash}{database}"
    finally:
        proxy.close()
