"""Headless Chromium, driven over its DevTools protocol: pages of a test's own, and all that they complain about.

Knows no scoreboard. The protocol is described at https://chromedevtools.github.io/devtools-protocol/.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

from server.embedded import ADDRESS, Service
from tests.services import UnavailableError, wait_until

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run", "--remote-debugging-port=0",
)  # fmt: skip
TIMEOUT_S = 20.0


class Chromium(Service):
    """A browser with an empty profile; each of its pages shares nothing with the others."""

    def __init__(self, profile: Path) -> None:
        program = next(filter(None, map(shutil.which, NAMES)), None)
        if program is None:
            raise UnavailableError(f"the page is tested in Chromium, and there is none of {', '.join(NAMES)}")
        self._port_file = profile / "DevToolsActivePort"
        argv = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        super().__init__("Chromium", argv, log=profile.with_name(f"{profile.name}.log"))

    def answers(self) -> bool:
        """Whether it told where it can be spoken to."""
        return self._port_file.exists() and self._port_file.read_text().count("\n") == 1

    @contextlib.contextmanager
    def page(self) -> Iterator[Page]:
        """A new page in a context of its own: no storage, no cache."""
        port, path = self._port_file.read_text().split()
        with connect(f"ws://{ADDRESS}:{port}{path}", max_size=None) as socket:
            browser = DevTools(socket)
            context = browser.call("Target.createBrowserContext", disposeOnDetach=False)["browserContextId"]
            target = browser.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        with connect(f"ws://{ADDRESS}:{port}/devtools/page/{target}", max_size=None) as socket:
            page = Page(socket)
            yield page
            page.call("Page.close")


class DevTools:
    """Commands and events over one connection."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.events: list[dict[str, Any]] = []
        self._numbers = itertools.count(1)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command; what happens meanwhile is kept in `events`."""
        number = next(self._numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv(TIMEOUT_S))
            if message.get("id") == number:
                assert "error" not in message, f"{method}: {message['error']}"
                return dict(message["result"])
            self.events.append(message)


class Page(DevTools):
    """One page."""

    def __init__(self, socket: ClientConnection) -> None:
        super().__init__(socket)
        for domain in ("Page", "Runtime", "Log", "Network", "Audits"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)

    def open(self, url: str) -> None:
        """Go there; returns when the document and its scripts have run."""
        self.call("Page.navigate", url=url)
        wait_until(lambda: self.run("location.href !== 'about:blank' && document.readyState") == "complete")

    def reload(self) -> None:
        """Load it again."""
        self.run("window.isOld = true")
        self.call("Page.reload")
        wait_until(lambda: self.run("!window.isOld && document.readyState === 'complete'"))

    def run(self, script: str) -> Any:
        """The value of an expression; a promise is waited for."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def until(self, script: str, deadline_s: float = 10.0) -> Any:
        """The first true value of an expression."""
        return wait_until(lambda: self.run(script), deadline_s, f"never true in the page: {script}")

    def emulate(self, width: int, height: int, *, scale: float = 1, **features: str) -> None:
        """A screen of this size in CSS pixels, and media features: `prefers_color_scheme="dark"`."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=scale, mobile=width < 600,
        )  # fmt: skip
        named: Mapping[str, str] = {name.replace("_", "-"): value for name, value in features.items()}
        self.call("Emulation.setEmulatedMedia", features=[{"name": n, "value": v} for n, v in named.items()])

    def press(self, key: str, text: str = "") -> None:
        """Press and let go of a key, named as KeyboardEvent.key does."""
        code = {"Tab": 9, "Enter": 13, " ": 32, "ArrowDown": 40}.get(key, 0)
        text = text or {"Enter": "\r", " ": " "}.get(key, "")
        kind = "keyDown" if text else "rawKeyDown"
        self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, text=text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=code)

    def type(self, text: str) -> None:
        """Put text where the focus is."""
        self.call("Input.insertText", text=text)

    def picture(self) -> bytes:
        """What the screen shows, as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    @property
    def complaints(self) -> list[str]:
        """Everything that the console, the network and the policy had to say so far."""
        self.run("0")  # takes in what has happened
        return [text for event in self.events if (text := _complaint(event["method"], event["params"]))]


def _complaint(method: str, params: dict[str, Any]) -> str:
    if method == "Runtime.exceptionThrown":
        return f"exception: {params['exceptionDetails']}"
    if method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
        return f"console: {params['args']}"
    if method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
        return f"log: {params['entry']['text']} {params['entry'].get('url', '')}"
    if method == "Audits.issueAdded" and params["issue"]["code"] == "ContentSecurityPolicyIssue":
        return f"policy: {params['issue']['details']}"
    return ""
