"""The live page as it is served: types, policy, caching, and nothing in it that the policy would forbid."""

from __future__ import annotations

import gzip
import random
import re
import urllib.parse
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

import server
from server.embedded import ADDRESS, free_port
from server.errors import ScoreboardError
from server.web_files import BOARDS_MARK, accepts_gzip, matches, read_files
from tests.services import ServerProcess
from tests.wire import Answer, Wire, once

WEB = Path(server.__file__).parent / "web"
FILES = sorted(path for path in WEB.rglob("*") if path.is_file() and not path.name.startswith("."))
SCRIPTS = [path for path in FILES if path.suffix == ".js"]
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".webmanifest": "application/manifest+json",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; font-src 'self'; connect-src 'self'; "
    "manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
BOARDS = "main,weekly"


@pytest.fixture(scope="module")
def page_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server without any store: the page needs none."""
    settings = {
        "REDIS_PORT": str(free_port()),
        "KAFKA_BROKERS": f"{ADDRESS}:{free_port()}",
        "DATABASE_URL": f"postgresql://{ADDRESS}:{free_port()}/none",
        "BOARDS": BOARDS,
    }
    process = ServerProcess(tmp_path_factory.mktemp("page"), settings)
    try:
        process.start()
        yield process
    finally:
        process.stop()


def get(page_server: ServerProcess, path: str = "/", **headers: str) -> Answer:
    return once(page_server.port, "GET", path, **headers)


def url_path(file: Path) -> str:
    """Where a file of web/ is served."""
    name = file.relative_to(WEB).as_posix()
    return "/" if name == "index.html" else f"/{name}"


def expected_content(file: Path) -> bytes:
    """A file of web/ as browsers get it."""
    return file.read_bytes().replace(BOARDS_MARK, f'<meta name="boards" content="{BOARDS}">'.encode())


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


# ---------------------------------------------------------------------- serving


@pytest.mark.parametrize("file", FILES, ids=url_path)
def test_every_file_is_served_with_its_type_and_the_policy(page_server: ServerProcess, file: Path) -> None:
    answer = get(page_server, url_path(file))
    assert (answer.status, answer.body) == (200, expected_content(file))
    assert answer.headers["content-type"] == TYPES[file.suffix]
    assert answer.headers["content-security-policy"] == POLICY
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["vary"] == "Accept-Encoding"
    assert "content-encoding" not in answer.headers


def test_page_is_told_the_boards(page_server: ServerProcess) -> None:
    elements = Elements(get(page_server).body.decode())
    told = [attributes["content"] for tag, attributes in elements.found if attributes.get("name") == "boards"]
    assert told == [BOARDS]


def test_compressed_page_is_the_same_and_smaller(page_server: ServerProcess) -> None:
    plain = get(page_server)
    compressed = get(page_server, Accept_Encoding="deflate, gzip;q=0.8, br")
    assert compressed.headers["content-encoding"] == "gzip"
    assert gzip.decompress(compressed.body) == plain.body
    assert len(compressed.body) < len(plain.body)
    same = ("content-type", "content-security-policy", "cache-control", "vary")
    assert [compressed.headers[name] for name in same] == [plain.headers[name] for name in same]


def test_each_encoding_has_a_strong_etag_of_its_own(page_server: ServerProcess) -> None:
    plain, compressed = get(page_server), get(page_server, Accept_Encoding="gzip")
    for answer in (plain, compressed):
        assert re.fullmatch(r'"[0-9a-f]{32}(-gz)?"', answer.headers["etag"])
    assert plain.headers["etag"] != compressed.headers["etag"]
    assert get(page_server, If_None_Match=compressed.headers["etag"]).status == 200
    assert get(page_server, "/style.css").headers["etag"] != plain.headers["etag"]


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
@pytest.mark.parametrize("condition", ["{}", "W/{}", '"other", W/{}', "*"])
def test_page_that_the_browser_has_is_304(page_server: ServerProcess, encoding: str, condition: str) -> None:
    with Wire(page_server.port) as wire:
        first = wire.request("GET", "/", Accept_Encoding=encoding)
        if_none_match = condition.format(first.headers["etag"])
        second = wire.request("GET", "/", Accept_Encoding=encoding, If_None_Match=if_none_match)
        assert (second.status, second.body) == (304, b"")
        for name in ("etag", "vary", "cache-control", "content-security-policy"):
            assert second.headers[name] == first.headers[name]
        assert not {"content-encoding", "content-type", "content-length"} & second.headers.keys()
        # The connection is still in step: no byte of a body came behind the 304.
        assert wire.request("GET", "/", Accept_Encoding=encoding).body == first.body


def test_page_that_the_browser_does_not_have_is_200(page_server: ServerProcess) -> None:
    etag = get(page_server).headers["etag"]
    for if_none_match in ('"other"', etag.strip('"'), etag[:-2] + '"'):
        assert get(page_server, If_None_Match=if_none_match).status == 200


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
def test_head_is_the_head_of_get(page_server: ServerProcess, encoding: str) -> None:
    with Wire(page_server.port) as wire:
        got = wire.request("GET", "/", Accept_Encoding=encoding, X_Request_Id="one")
        head = wire.request("HEAD", "/", Accept_Encoding=encoding, X_Request_Id="one")
        assert (head.status, head.body) == (200, b"")
        assert head.headers["content-length"] == str(len(got.body))
        assert {**head.headers, "date": ""} == {**got.headers, "date": ""}
        assert wire.request("HEAD", "/", Accept_Encoding=encoding, If_None_Match=got.headers["etag"]).status == 304
        assert wire.request("GET", "/", Accept_Encoding=encoding).body == got.body


# ---------------------------------------------------------------------- reading


def test_files_below_are_read_and_those_of_editors_are_not(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    for name in ("index.html", "app.js", "parts/list.mjs", "parts/index.html", ".app.js.swp"):
        (tmp_path / name).write_bytes(BOARDS_MARK)
    files = read_files(tmp_path, ["main"])
    assert sorted(files) == ["/", "/app.js", "/parts/index.html", "/parts/list.mjs"]
    assert files["/app.js"].plain.body == BOARDS_MARK


def test_names_of_boards_stay_text(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_bytes(BOARDS_MARK)
    filled = read_files(tmp_path, ["main", '"><script>'])["/"].plain.body.decode()
    assert Elements(filled).found == [("meta", {"name": "boards", "content": 'main,"><script>'})]


@pytest.mark.parametrize(("page", "count"), [(b"<title>Scoreboard</title>", 0), (2 * BOARDS_MARK, 2)])
def test_page_without_its_mark_is_refused(tmp_path: Path, page: bytes, count: int) -> None:
    (tmp_path / "index.html").write_bytes(page)
    with pytest.raises(ScoreboardError, match=f"index.html: expected one {BOARDS_MARK.decode()}, got {count}"):
        read_files(tmp_path, ["main"])


def test_file_of_unknown_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "app.ts").write_text("")
    with pytest.raises(ScoreboardError, match=r"app\.ts: expected one of \.css, \.html"):
        read_files(tmp_path, ["main"])


def test_file_that_does_not_shrink_is_kept_plain(tmp_path: Path) -> None:
    (tmp_path / "noise.png").write_bytes(random.Random(1).randbytes(1000))
    (tmp_path / "list.css").write_text("li { margin: 0 }\n" * 100)
    files = read_files(tmp_path, ["main"])
    assert files["/noise.png"].gzipped is None
    assert files["/list.css"].gzipped is not None


@pytest.mark.parametrize(
    ("accept_encoding", "accepted"),
    [
        (b"", False), (b"gzip", True), (b"GZIP", True), (b"br, gzip", True), (b"br;q=1.0,gzip;q=0.001", True),
        (b"*", True), (b"br, *;q=0.1", True), (b"identity", False), (b"br", False), (b"gzip;q=0", False),
        (b"gzip; q=0.000, *", False), (b"*;q=0", False), (b"gzip, *;q=0", True), (b"gzipped", False),
        (b"gzip" + b",a" * 600, False),
    ],
)  # fmt: skip
def test_client_says_whether_it_takes_gzip(accept_encoding: bytes, accepted: bool) -> None:
    assert accepts_gzip(accept_encoding) is accepted


@pytest.mark.parametrize(
    ("if_none_match", "named"),
    [
        (b"", False), (b'"a"', True), (b'W/"a"', True), (b'"b","a"', True), (b'"b", W/"a" , "c"', True),
        (b" * ", True), (b"a", False), (b'"b"', False), (b'"a-gz"', False), (b'"*"', False), (b'"b,a"', False),
        (b'"a"' + b',"b"' * 400, False),
    ],
)  # fmt: skip
def test_client_says_which_it_has(if_none_match: bytes, named: bool) -> None:
    assert matches(if_none_match, b'"a"') is named


# ---------------------------------------------------------------------- what is in them


IMPORTED = re.compile(
    r"""(?:^(?:import|export)\s[^;"'()=]*\bfrom|^import|\bimport\()\s*["']([^"']+)["']""", re.MULTILINE
)
LINKED = re.compile(r"""(?:url\(\s*|@import\s+)["']?([^"')\s]+)""")


def asked_for(file: Path) -> list[str]:
    """What a file makes the browser load, as it is written there."""
    text = file.read_text()
    if file.suffix == ".html":
        named = [attributes.get(name) for _, attributes in Elements(text).found for name in ("src", "href")]
        return [path for path in named if path]
    return (LINKED if file.suffix == ".css" else IMPORTED).findall(text)


@pytest.mark.parametrize("file", [path for path in FILES if path.suffix in (".html", ".css", ".js")], ids=url_path)
def test_whatever_is_asked_for_is_there(page_server: ServerProcess, file: Path) -> None:
    for path in asked_for(file):
        address = urllib.parse.urldefrag(urllib.parse.urljoin(page_server.url + url_path(file), path)).url
        assert address.startswith(f"{page_server.url}/"), f"expected a file of ours, got {path}"
        assert page_server.status_of(address.removeprefix(page_server.url)) == 200, path


def test_page_has_no_inline_script_or_style() -> None:
    elements = Elements((WEB / "index.html").read_text())
    assert elements.inline == ""
    for tag, attributes in elements.found:
        assert tag != "style"
        forbidden = [name for name in attributes if name == "style" or name.startswith("on")]
        assert not forbidden, f"{tag}: {forbidden}"


FORBIDDEN = [
    "innerHTML", "outerHTML", "insertAdjacentHTML", "setHTMLUnsafe", "createContextualFragment", "parseFromString",
    "document.write", "eval(", "new Function", "srcdoc",
]  # fmt: skip


@pytest.mark.parametrize("word", FORBIDDEN)
@pytest.mark.parametrize("script", SCRIPTS, ids=url_path)
def test_script_never_makes_markup_of_a_name(script: Path, word: str) -> None:
    assert word not in script.read_text()
