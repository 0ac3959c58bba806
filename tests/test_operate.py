"""docs/operate.md names only what there is: somebody follows it at night."""

from __future__ import annotations

import re

from server import config
from server.__main__ import COMMANDS
from server.keys import Keys
from tests.services import ROOT

PAGE = (ROOT / "docs/operate.md").read_text()


def anchors(text: str) -> set[str]:
    """What a link may name behind its `#`: headings, as GitHub spells them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_command_is_one_of_ours() -> None:
    named = re.findall(r"(?:`|^|\n)scoreboard ([a-z-]+)", PAGE)
    assert named
    assert set(named) <= set(COMMANDS)


def test_every_setting_is_one_of_ours() -> None:
    named = re.findall(r"`([A-Z]+(?:_[A-Z]+)+)(?:=\w+)?`", PAGE)
    assert named
    assert set(named) <= {variable for variable, _, _ in config.describe()}


def test_key_that_is_to_be_deleted_is_the_marker() -> None:
    assert set(re.findall(r"\bDEL (\S+)", PAGE)) == {Keys().ready}


def test_what_the_log_is_said_to_say_is_what_the_programs_say() -> None:
    sources = "".join(path.read_text() for part in ("server", "sync") for path in sorted((ROOT / part).glob("*.py")))
    table = PAGE.partition("\n## Logs\n")[2].partition("\n## ")[0]
    lines = re.findall(r"`([^`]+)`", "".join(row.split("|")[1] for row in table.splitlines() if row.startswith("| `")))
    assert lines
    for line in lines:
        for words in re.split(r"…|NOREPLICAS", line):
            assert words.strip() in sources, words


def test_links_lead_to_places_that_are_there() -> None:
    for path, anchor in re.findall(r"\]\((?!https?://)([^)#]+)#?([^)]*)\)", PAGE):
        target = ROOT / "docs" / path
        assert target.exists(), path
        assert not anchor or anchor in anchors(target.read_text()), anchor
