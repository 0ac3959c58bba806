"""A real Chromium for tests, without a window: pages, keys, clicks, and whatever the browser complains about.

Driven with the DevTools protocol (https://chromedevtools.github.io/devtools-protocol/) over one WebSocket a page.
Knows nothing of the page it shows.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import fcntl
import itertools
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

from server.embedded import ADDRESS, Service
from tests.services import ROOT, UnavailableError, wait_until

DEADLINE_S = 10.0
_SHIFT = 8
_BINARIES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--remote-debugging-port=0",
)  # fmt: skip

# name → (DOM key, DOM code, Windows virtual key code, text it types)
_KEYS = {
    "Tab": ("Tab", "Tab", 9, ""),
    "Enter": ("Enter", "Enter", 13, "\r"),
    "Escape": ("Escape", "Escape", 27, ""),
    "Space": (" ", "Space", 32, " "),
    "Backspace": ("Backspace", "Backspace", 8, ""),
    "End": ("End", "End", 35, ""),
    "Home": ("Home", "Home", 36, ""),
    "ArrowLeft": ("ArrowLeft", "ArrowLeft", 37, ""),
    "ArrowUp": ("ArrowUp", "ArrowUp", 38, ""),
    "ArrowRight": ("ArrowRight", "ArrowRight", 39, ""),
    "ArrowDown": ("ArrowDown", "ArrowDown", 40, ""),
}

# The middle of an element, once it is in view; what lies on top of it would get the click instead.
_MIDDLE = """(selector => {
  const element = document.querySelector(selector);
  if (!element) throw new Error(`nothing matches ${selector}`);
  element.scrollIntoView({ block: "nearest", inline: "nearest", behavior: "instant" });
  const { x, y, width, height } = element.getBoundingClientRect();
  const middle = [x + width / 2, y + height / 2];
  const top = document.elementFromPoint(...middle);
  if (!element.contains(top)) throw new Error(`${selector} lies below ${top?.outerHTML.slice(0, 200)}`);
  return middle;
})"""

_VIOLATIONS = """axe.run().then(({ violations }) => violations.flatMap(({ id, nodes }) => nodes.map(node => {
  const said = [...node.any, ...node.all, ...node.none].map(({ message }) => message);
  return `${id}: ${node.target.flat().join(" ")}: ${said.join("; ")}`;
})))"""


class PageError(Exception):
    """What the page's script threw, or why the browser refused a command."""


@dataclasses.dataclass(frozen=True)
class Look:
    """The screen and its owner's wishes; `phone` is a touch screen of three device pixels to one of CSS."""

    width: int = 1280
    height: int = 800
    dark: bool = False
    phone: bool = False
    reduced_motion: bool = False


class Chromium(Service):
    """One browser; each of its pages has storage of its own, empty at first."""

    def __init__(self, directory: Path) -> None:
        """Raises UnavailableError where there is no Chromium."""
        self._profile = directory / "profile"
        # Chromium writes its port and the path of its WebSocket into this file once it listens.
        self._address = self._profile / "DevToolsActivePort"
        argv = [_binary(), *_FLAGS, f"--user-data-dir={self._profile}", "about:blank"]
        super().__init__("Chromium", argv, log=directory / "chromium.log")

    def prepare(self) -> None:
        """Forget the port of the last start."""
        self._address.unlink(missing_ok=True)

    def answers(self) -> bool:
        """Whether it takes commands."""
        return self._address.exists() and self._address.read_text().count("\n") == 1

    @contextlib.contextmanager
    def page(
        self,
        width: int = 1280,
        height: int = 800,
        *,
        dark: bool = False,
        phone: bool = False,
        reduced_motion: bool = False,
    ) -> Iterator[Page]:
        """A new tab, on a blank page; it is closed behind the `with`."""
        port, path = self._address.read_text().split("\n")
        address = f"ws://{ADDRESS}:{port}{path}"
        with connect(address, compression=None, max_size=None, proxy=None) as connection:
            yield Page(connection, Look(width, height, dark, phone, reduced_motion))


class Page:
    """One tab. Every method returns when the browser has done what was asked."""

    def __init__(self, connection: ClientConnection, look: Look) -> None:
        self._connection = connection
        self._numbers = itertools.count(1)
        self._answers: dict[int, dict[str, Any]] = {}
        self._session: dict[str, str] = {}
        self._loaded: set[str] = set()
        self._problems: list[str] = []
        self._look = look
        context = self.command("Target.createBrowserContext", disposeOnDetach=True)
        target = self.command("Target.createTarget", url="about:blank", **context)
        self._frame = target["targetId"]
        self._session = self.command("Target.attachToTarget", targetId=self._frame, flatten=True)
        for domain in ("Page", "Runtime", "Log"):
            self.command(f"{domain}.enable")
        self.command("Page.setLifecycleEventsEnabled", enabled=True)
        self.emulate()

    # ------------------------------------------------------------------ what it shows

    def open(self, url: str) -> None:
        """Go to `url` and wait until it and what it names have loaded."""
        answer = self.command("Page.navigate", url=url)
        if "errorText" in answer:
            raise PageError(f"{url}: {answer['errorText']}")
        if "loaderId" in answer:  # otherwise only the fragment changed
            self._until(lambda: answer["loaderId"] in self._loaded, f"{url} did not load")

    def reload(self) -> None:
        """Load it once more and wait for that."""
        before = set(self._loaded)
        self.command("Page.reload")
        self._until(lambda: self._loaded - before, "the page did not load again")

    def emulate(self, **changes: int | bool) -> None:
        """Another screen, or other wishes, from now on: the fields of Look."""
        self._look = look = dataclasses.replace(self._look, **changes)
        screen = {"width": look.width, "height": look.height, "deviceScaleFactor": 3 if look.phone else 1}
        self.command("Emulation.setDeviceMetricsOverride", mobile=look.phone, **screen)
        self.command("Emulation.setTouchEmulationEnabled", enabled=look.phone)
        wishes = {
            "prefers-color-scheme": "dark" if look.dark else "light",
            "prefers-reduced-motion": "reduce" if look.reduced_motion else "no-preference",
        }
        features = [{"name": name, "value": value} for name, value in wishes.items()]
        self.command("Emulation.setEmulatedMedia", features=features)

    def evaluate(self, js: str) -> Any:
        """The value of an expression, as JSON would have it; of a promise, what it becomes.

        Raises PageError with what was thrown.
        """
        answer = self.command("Runtime.evaluate", expression=js, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise PageError(_thrown(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def wait(self, js: str, deadline_s: float = DEADLINE_S) -> Any:
        """The first true value of an expression."""
        return wait_until(lambda: self.evaluate(js), deadline_s, f"the page never made it true: {js}")

    def screenshot(self, path: Path, *, full: bool = False) -> None:
        """A PNG of what is in view, or of the `full` length of the page."""
        clip = {}
        if full:
            size = self.command("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"clip": {**size, "scale": 1}, "captureBeyondViewport": True}
        path.write_bytes(base64.b64decode(self.command("Page.captureScreenshot", **clip)["data"]))

    # ------------------------------------------------------------------ what its user does

    def press(self, key: str, *, shift: bool = False) -> None:
        """Press and release Tab, Enter, Escape, Space, Backspace, Home, End or an arrow (ArrowUp)."""
        name, code, number, text = _KEYS[key]
        self._key({"key": name, "code": code, "windowsVirtualKeyCode": number}, text, _SHIFT if shift else 0)

    def type(self, text: str) -> None:
        """Type characters into whatever has the focus."""
        for character in text:
            self._key({"key": character}, character)

    def click(self, selector: str) -> None:
        """Click the middle of the first element that matches.

        Raises PageError where there is none, or something else lies on top of it.
        """
        x, y = self.evaluate(f"{_MIDDLE}({json.dumps(selector)})")
        for kind, held in (("mouseMoved", 0), ("mousePressed", 1), ("mouseReleased", 0)):
            button = {"button": "left", "buttons": held, "clickCount": 1} if kind != "mouseMoved" else {}
            self.command("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def _key(self, key: dict[str, Any], text: str, modifiers: int = 0) -> None:
        self.command("Input.dispatchKeyEvent", type="keyDown", text=text, modifiers=modifiers, **key)
        self.command("Input.dispatchKeyEvent", type="keyUp", modifiers=modifiers, **key)

    # ------------------------------------------------------------------ what is wrong with it

    @property
    def problems(self) -> list[str]:
        """All that went wrong in this tab so far: exceptions, console errors and warnings, failed loads, violations.

        Each as `source level: text (url)`. The browser tells of loads and violations a moment later: wait for
        those that are expected.
        """
        self.evaluate("0")  # whatever happened before it has been told before its answer
        return list(self._problems)

    def violations(self, axe: str) -> list[str]:
        """What axe-core (its source is `axe`) finds inaccessible, as `rule: selector: what`."""
        if not self.evaluate("typeof axe === 'object'"):
            self.evaluate(axe)
        found: list[str] = self.evaluate(_VIOLATIONS)
        return found

    # ------------------------------------------------------------------ the protocol

    def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command of the DevTools protocol.

        Raises PageError when it is refused.
        """
        number = next(self._numbers)
        self._connection.send(json.dumps({"id": number, "method": method, "params": parameters, **self._session}))
        self._until(lambda: number in self._answers, f"{method}: no answer")
        answer = self._answers.pop(number)
        if "error" in answer:
            raise PageError(f"{method}: {answer['error']['message']}")
        result: dict[str, Any] = answer["result"]
        return result

    def _until(self, condition: Callable[[], Any], message: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            try:
                received = json.loads(self._connection.recv(deadline - time.monotonic()))
            except TimeoutError:
                raise AssertionError(f"{message} (waited {DEADLINE_S:g} s)") from None
            if "id" in received:
                self._answers[received["id"]] = received
            else:
                self._happened(received["method"], received["params"])

    def _happened(self, event: str, told: dict[str, Any]) -> None:
        if event == "Page.lifecycleEvent" and told["name"] == "load" and told["frameId"] == self._frame:
            self._loaded.add(told["loaderId"])
        elif event == "Runtime.exceptionThrown":
            details = told["exceptionDetails"]
            self._problems.append(f"exception error: {_thrown(details)} ({details.get('url', '')})")
        elif event == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            said = " ".join(str(part.get("value", part.get("description"))) for part in told["args"])
            frames = told.get("stackTrace", {}).get("callFrames", [])
            self._problems.append(f"console {told['type']}: {said} ({frames[0]['url'] if frames else ''})")
        elif event == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            entry = told["entry"]
            self._problems.append(f"{entry['source']} {entry['level']}: {entry['text']} ({entry.get('url', '')})")
        elif event == "Inspector.targetCrashed":
            raise PageError("the tab crashed")


def _thrown(details: dict[str, Any]) -> str:
    exception = details.get("exception", {})
    return str(exception.get("description", exception.get("value", details["text"])))


def _binary() -> str:
    for name in _BINARIES:
        # Asked, not just looked up: Ubuntu has a script of that name that only says where to get a browser.
        if shutil.which(name) and subprocess.run([name, "--version"], capture_output=True, check=False).returncode == 0:
            return name
    raise UnavailableError(f"these tests need a browser, and none of {', '.join(_BINARIES)} on the PATH works")


def axe_source() -> str:
    """axe-core's script, fetched by npm the first time.

    Raises UnavailableError where npm is missing or fails.
    """
    package, kept = ROOT / "tests/axe/package.json", ROOT / ".cache/axe/kept"
    kept.parent.mkdir(parents=True, exist_ok=True)
    with (kept.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs in one tree fetch once
        fetched = kept / "package.json"
        if not fetched.exists() or fetched.read_text() != package.read_text():
            _fetch_axe(package, kept)
    return (kept / "node_modules/axe-core/axe.min.js").read_text()


def _fetch_axe(package: Path, kept: Path) -> None:
    if not shutil.which("npm"):
        raise UnavailableError("axe-core is fetched by npm, and there is no `npm` on the PATH")
    with tempfile.TemporaryDirectory(dir=kept.parent, ignore_cleanup_errors=True) as scratch:
        shutil.copy(package, scratch)
        argv = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock"]
        done = subprocess.run(argv, cwd=scratch, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise UnavailableError(f"npm could not fetch axe-core:\n{(done.stdout + done.stderr)[-1500:]}")
        shutil.rmtree(kept, ignore_errors=True)
        Path(scratch).rename(kept)
