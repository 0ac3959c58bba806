"""The browser of the tests does what a user's does, and hears every complaint."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from server.embedded import ADDRESS, free_port
from tests import browser
from tests.browser import Chromium, PageError
from tests.services import UnavailableError, wait_until

pytestmark = pytest.mark.browser

PAGE = b"""<!doctype html>
<html lang="en">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Test</title>
<link rel="icon" href="data:,">
<main>
<h1>Test</h1>
<p><input id="text" aria-label="Text"> <input type="checkbox" id="box" aria-label="Box"></p>
<p><button id="button">Press</button></p>
<p style="margin-top: 3000px"><button id="below">Far below</button></p>
</main>
<script>
window.seen = [];
for (const type of ["keydown", "click"]) {
  addEventListener(type, event => seen.push([type, event.target.id, event.key ?? "", event.isTrusted]));
}
</script>
</html>
"""
FILES = {
    "/": PAGE,
    "/no-label": PAGE.replace(b' aria-label="Text"', b""),
    "/forbidden": PAGE,
    "/throws": PAGE + b"<script>throw new TypeError('thrown by the page')</script>",
    "/frame": b'<!doctype html><link rel="icon" href="data:,"><iframe src="/"></iframe>',
}


class Site(BaseHTTPRequestHandler):
    """FILES, of which /forbidden comes with a policy that forbids its script."""

    def do_GET(self) -> None:
        body = FILES.get(self.path, b"")
        self.send_response(200 if body else 404)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        if self.path == "/forbidden":
            self.send_header("Content-Security-Policy", "default-src 'self'; img-src data:; style-src 'unsafe-inline'")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """The address of FILES."""
    with ThreadingHTTPServer((ADDRESS, 0), Site) as server:
        thread = threading.Thread(target=functools.partial(server.serve_forever, poll_interval=0.02))
        thread.start()
        yield f"http://{ADDRESS}:{server.server_port}"
        server.shutdown()
        thread.join()


def test_evaluate_returns_values_and_awaits_promises(chromium: Chromium, site: str) -> None:
    with chromium.page() as page:
        page.open(f"{site}/")
        assert page.evaluate("document.title") == "Test"
        assert page.evaluate("({ list: [1, null, 'a'] })") == {"list": [1, None, "a"]}
        assert page.evaluate("fetch('/').then(answer => answer.status)") == 200
        assert page.evaluate("undefined") is None


def test_evaluate_raises_what_the_page_throws(chromium: Chromium, site: str) -> None:
    with chromium.page() as page:
        page.open(f"{site}/")
        with pytest.raises(PageError, match="ReferenceError: nothing is not defined"):
            page.evaluate("nothing")
        with pytest.raises(PageError, match="Error: rejected"):
            page.evaluate("Promise.reject(new Error('rejected'))")
        assert page.problems == []


def test_wait_ends_with_the_first_true_value(chromium: Chromium, site: str) -> None:
    with chromium.page() as page:
        page.open(f"{site}/")
        page.evaluate("void setTimeout(() => { window.later = 'here' }, 50)")
        assert page.wait("window.later") == "here"
        with pytest.raises(AssertionError, match=r"the page never made it true: window\.never"):
            page.wait("window.never", deadline_s=0.1)


def test_page_that_nobody_serves_cannot_be_opened(chromium: Chromium) -> None:
    with chromium.page() as page, pytest.raises(PageError, match="ERR_CONNECTION_REFUSED"):
        page.open(f"http://{ADDRESS}:{free_port()}/")


def test_reload_waits_for_the_page_itself(chromium: Chromium, site: str) -> None:
    with chromium.page() as page:
        page.open(f"{site}/frame")
        page.evaluate("void (window.old = true)")
        page.reload()
        assert page.evaluate("[window.old, document.readyState, frames.length]") == [None, "complete", 1]


def test_keys_arrive_as_a_users_do(chromium: Chromium, site: str) -> None:
    with chromium.page() as page:
        page.open(f"{site}/")
        page.press("Tab")
        page.type("aé1")
        page.press("Backspace")
        assert page.evaluate("text.value") == "aé"
        page.press("Tab")
        page.press("Space")
        assert page.evaluate("box.checked") is True
        page.press("Tab")
        page.press("Enter")
        assert page.evaluate("seen.at(-1)") == ["click", "button", "", True]
        page.press("Tab", shift=True)
        assert page.evaluate("document.activeElement.id") == "box"


@pytest.mark.parametrize("phone", [False, True], ids=["desktop", "phone"])
def test_click_arrives_as_a_users_does(chromium: Chromium, site: str, phone: bool) -> None:
    with chromium.page(phone=phone) as page:
        page.open(f"{site}/")
        page.click("#button")
        page.click("#below")
        expected = [["click", "button", "", True], ["click", "below", "", True]]
        assert page.evaluate("seen") == expected


def test_click_never_hits_something_else(chromium: Chromium, site: str) -> None:
    with chromium.page() as page:
        page.open(f"{site}/")
        with pytest.raises(PageError, match="nothing matches #none"):
            page.click("#none")
        page.evaluate("void document.body.insertAdjacentHTML('beforeend', '<dialog id=top>On top</dialog>')")
        page.evaluate("document.querySelector('dialog').showModal()")
        with pytest.raises(PageError, match="#button lies below"):
            page.click("#button")
        assert page.evaluate("seen") == []


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("console.error('it is', { bad: true })", "console error: it is Object ("),
        ("console.warn('beware')", "console warning: beware ("),
        ("console.assert(1 > 2, 'smaller')", "console assert: smaller ("),
        ("setTimeout(() => { throw new RangeError('far') })", "exception error: RangeError: far"),
        ("Promise.reject(new Error('unheard'))", "exception error: Error: unheard"),
        ("fetch('/nowhere')", "network error: Failed to load resource: the server responded with a status of 404"),
        ("new WebSocket(`ws://${location.host}/live`)", "/live' failed: Error during WebSocket handshake"),
    ],
    ids=lambda text: text.split("(")[0],
)
def test_complaint_is_a_problem(chromium: Chromium, site: str, script: str, problem: str) -> None:
    with chromium.page() as page:
        page.open(f"{site}/")
        assert page.problems == []
        page.evaluate(f"void ({script})")
        wait_until(lambda: any(problem in each for each in page.problems), message=f"expected {problem}")
        assert len(page.problems) == 1


def test_exception_while_loading_is_a_problem(chromium: Chromium, site: str) -> None:
    with chromium.page() as page:
        page.open(f"{site}/throws")
        (problem,) = page.problems
        assert problem.startswith("exception error: TypeError: thrown by the page")
        assert problem.endswith(f"({site}/throws)")


def test_violation_of_the_policy_is_a_problem(chromium: Chromium, site: str) -> None:
    with chromium.page() as page:
        page.open(f"{site}/forbidden")
        wait_until(lambda: page.problems, message="expected a violation")
        (problem,) = page.problems
        assert problem.startswith("security error: ")
        assert "Content Security Policy" in problem
        assert page.evaluate("window.seen") is None


def test_what_is_emulated_is_what_the_page_sees(chromium: Chromium, site: str) -> None:
    seen = """[innerWidth, devicePixelRatio, matchMedia("(prefers-color-scheme: dark)").matches,
               matchMedia("(prefers-reduced-motion: reduce)").matches, matchMedia("(pointer: coarse)").matches]"""
    with chromium.page() as page:
        page.open(f"{site}/")
        assert page.evaluate(seen) == [1280, 1, False, False, False]
        page.emulate(dark=True)
        assert page.evaluate(seen) == [1280, 1, True, False, False]
    with chromium.page(390, 844, dark=True, phone=True, reduced_motion=True) as page:
        page.open(f"{site}/")
        assert page.evaluate(seen) == [390, 3, True, True, True]
        page.emulate(dark=False, phone=False, reduced_motion=False)
        assert page.evaluate(seen) == [390, 1, False, False, False]


def test_pages_share_no_storage(chromium: Chromium, site: str) -> None:
    with chromium.page() as first, chromium.page() as second:
        first.open(f"{site}/")
        first.evaluate("localStorage.setItem('theme', 'dark')")
        second.open(f"{site}/")
        assert second.evaluate("localStorage.length") == 0
        first.reload()
        assert first.evaluate("localStorage.getItem('theme')") == "dark"


def test_screenshot_shows_the_screen_or_all_of_the_page(chromium: Chromium, site: str, tmp_path: Path) -> None:
    def size(file: Path) -> tuple[int, int]:
        head = file.read_bytes()[:24]
        assert head.startswith(b"\x89PNG")
        return int.from_bytes(head[16:20]), int.from_bytes(head[20:24])

    with chromium.page(400, 300) as page:
        page.open(f"{site}/")
        page.screenshot(tmp_path / "screen.png")
        page.screenshot(tmp_path / "full.png", full=True)
        assert size(tmp_path / "screen.png") == (400, 300)
        assert size(tmp_path / "full.png") == (400, page.evaluate("document.documentElement.scrollHeight"))


@pytest.mark.parametrize(("path", "rules"), [("/", []), ("/no-label", ["label: #text: "])])
def test_axe_finds_the_missing_label(chromium: Chromium, axe: str, site: str, path: str, rules: list[str]) -> None:
    with chromium.page() as page:
        page.open(site + path)
        found = page.violations(axe)
        assert [each[: len(rule)] for each, rule in zip(found, rules, strict=True)] == rules
        assert page.violations(axe) == found


def test_axe_works_under_a_policy_that_forbids_scripts(chromium: Chromium, axe: str, site: str) -> None:
    with chromium.page() as page:
        page.open(f"{site}/forbidden")
        assert page.violations(axe) == []


def test_machine_without_browser_or_npm_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(browser, "ROOT", tmp_path)
    (tmp_path / "tests/axe").mkdir(parents=True)
    (tmp_path / "tests/axe/package.json").write_text("{}")
    with pytest.raises(UnavailableError, match=r"none of chromium, chromium-browser, google-chrome on the PATH works"):
        Chromium(tmp_path)
    with pytest.raises(UnavailableError, match=r"no `npm` on the PATH"):
        browser.axe_source()
