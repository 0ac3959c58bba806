"""The live page as it is served: types, policy, and nothing in it that the policy would forbid."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

import server
from server.embedded import ADDRESS, free_port
from tests.services import ServerProcess

WEB = Path(server.__file__).parent / "web"
POLICY = "default-src 'self'; connect-src 'self' ws: wss:"


@pytest.fixture(scope="module")
def page_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server without any store: the page needs none."""
    settings = {
        "REDIS_PORT": str(free_port()),
        "KAFKA_BROKERS": f"{ADDRESS}:{free_port()}",
        "DATABASE_URL": f"postgresql://{ADDRESS}:{free_port()}/none",
    }
    process = ServerProcess(tmp_path_factory.mktemp("page"), settings)
    try:
        process.start()
        yield process
    finally:
        process.stop()


class Elements(HTMLParser):
    """Every element with its attributes, and whatever text stands in scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.inline = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem:
            self.inline += data.strip()


@pytest.mark.parametrize(
    ("path", "file", "kind"),
    [
        ("/", "index.html", "text/html"),
        ("/app.js", "app.js", "javascript"),
        ("/style.css", "style.css", "text/css"),
        ("/favicon.svg", "favicon.svg", "image/svg+xml"),
    ],
)
def test_file_is_served_with_its_type_and_the_policy(
    page_server: ServerProcess, path: str, file: str, kind: str
) -> None:
    with urllib.request.urlopen(page_server.url + path, timeout=5) as answer:
        assert answer.read() == (WEB / file).read_bytes()
        assert kind in answer.headers["Content-Type"]
        assert answer.headers["Content-Type"].endswith("; charset=utf-8")
        assert answer.headers["Content-Security-Policy"] == POLICY
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_head_of_the_page_has_no_body(page_server: ServerProcess) -> None:
    request = urllib.request.Request(f"{page_server.url}/", method="HEAD")
    with urllib.request.urlopen(request, timeout=5) as answer:
        assert answer.status == 200
        assert answer.read() == b""


def test_whatever_the_page_asks_for_is_there(page_server: ServerProcess) -> None:
    elements = Elements((WEB / "index.html").read_text())
    wanted = [attributes.get("src") or attributes.get("href") for _, attributes in elements.found]
    for path in filter(None, wanted):
        assert path.startswith("/"), f"expected a file of ours, got {path}"
        assert page_server.status_of(path) == 200, path


def test_page_has_no_inline_script_or_style() -> None:
    elements = Elements((WEB / "index.html").read_text())
    assert elements.inline == ""
    for tag, attributes in elements.found:
        assert tag != "style"
        forbidden = [name for name in attributes if name == "style" or name.startswith("on")]
        assert not forbidden, f"{tag}: {forbidden}"


@pytest.mark.parametrize("word", ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "srcdoc"])
def test_script_never_makes_markup_of_a_name(word: str) -> None:
    assert word not in (WEB / "app.js").read_text()
