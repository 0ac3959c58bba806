"""The README says what is so: its table of settings, its SQL and its curl examples."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import psycopg
import pytest
import redis as redis_client

from server import config
from server.embedded import ADDRESS, RedisServer, free_port
from sync.store import migrate
from tests.client import trust
from tests.services import JWT_SECRET, ROOT, ServerProcess, environment, wait_until

README = (ROOT / "README.md").read_text()

# (player, minutes before the reference minute, seconds into it, delta, score)
HISTORY = [
    ("player123", 30, 1, 10, 10),
    ("player123", 30, 59, 5, 15),
    ("player456", 30, 2, 7, 7),
    ("player123", 29, 0, 20, 35),
    ("player456", 28, 30, 100, 107),
    ("player456", 28, 31, -7, 100),
    ("yesterday", 3 * 24 * 60, 0, 1000, 1000),
]


def blocks(language: str) -> list[str]:
    """The README's code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_table_has_every_setting_with_its_default_and_meaning() -> None:
    table = README.partition("\n## Environment\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (?:`(.*?)` )?\| (?:(.*?) )?\|$", table, re.MULTILINE)
    assert rows == config.describe()


def test_links_lead_to_files_that_are_there() -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)]+)\)", README):
        assert (ROOT / target.partition("#")[0]).exists(), target


@pytest.fixture
def history(database_url: str) -> Iterator[tuple[psycopg.Connection, datetime]]:
    """A database with HISTORY in it, and the reference minute, which has just passed."""
    migrate(database_url)
    with psycopg.connect(database_url, autocommit=True) as connection:
        row = connection.execute("SELECT date_trunc('minute', now())").fetchone()
        assert row is not None
        reference: datetime = row[0]
        for sequence, (player, minutes, seconds, delta, score) in enumerate(HISTORY):
            at = reference - timedelta(minutes=minutes) + timedelta(seconds=seconds)
            ms = round(at.timestamp() * 1000)
            connection.execute(
                "INSERT INTO score_events (board, player_id, at, ver_ms, ver_seq, delta, score)"
                " VALUES ('main', %s, to_timestamp(%s::float8 / 1000), %s, %s, %s, %s)",
                (player, ms, ms, sequence, delta, score),
            )
        yield connection, reference


@pytest.mark.postgres
def test_queries_of_the_history(history: tuple[psycopg.Connection, datetime]) -> None:
    connection, reference = history
    climbers, curve, per_minute = [connection.execute(query).fetchall() for query in blocks("sql")]
    minutes = [reference - timedelta(minutes=minutes) for minutes in (30, 29, 28)]
    assert climbers == [("player456", 100, 3), ("player123", 35, 3)]
    assert curve == [(minutes[0], 15), (minutes[1], 35)]
    assert per_minute == [(minutes[0], 3, 2), (minutes[1], 1, 1), (minutes[2], 2, 1)]


def takes_updates(url: str) -> bool:
    """Whether Redis is filled."""
    with urllib.request.urlopen(f"{url}/readyz", timeout=2) as answer:
        return bool(json.load(answer)["write"]["ok"])


@pytest.fixture
def example_server(
    tmp_path: Path, redis_server: RedisServer, redis: redis_client.Redis, database_url: str
) -> Iterator[str]:
    """The address of a server that takes updates."""
    migrate(database_url)
    trust(redis)
    settings = {
        "REDIS_HOST": redis_server.host,
        "REDIS_PORT": str(redis_server.port),
        "KAFKA_BROKERS": f"{ADDRESS}:{free_port()}",
        "DATABASE_URL": database_url,
    }
    process = ServerProcess(tmp_path, settings)
    try:
        process.start()
        wait_until(lambda: process.status_of("/readyz") == 200 and takes_updates(process.url))
        yield process.url
    finally:
        process.stop()


@pytest.mark.redis
@pytest.mark.postgres
@pytest.mark.skipif(not shutil.which("curl"), reason="the examples are for curl, and there is none")
def test_curl_examples_work_when_pasted(example_server: str, tmp_path: Path) -> None:
    (tmp_path / "jwt-secret").write_text(JWT_SECRET)
    examples = [block for block in blocks("sh") if "curl http" in block or "curl 'http" in block or "TOKEN=" in block]
    script = "\n".join(examples)
    for written, here in (
        ("http://127.0.0.1:8080", example_server),
        (".scoreboard/jwt-secret", str(tmp_path / "jwt-secret")),
        (".venv/bin/scoreboard", f"{sys.executable} -m server"),
        ("curl ", "curl -sS -w '\\n' "),
    ):
        assert written in script
        script = script.replace(written, here)
    argv = ["bash", "-euc", script]
    done = subprocess.run(argv, env=environment({}), cwd=ROOT, capture_output=True, text=True, check=True)
    changed, keyed, board, ready = (json.loads(line) for line in done.stdout.splitlines())
    assert changed == {"playerId": "player123", "newScore": 5}
    assert keyed == {"playerId": "player123", "newScore": 10}
    assert board == [{"playerId": "player123", "score": 10}]
    assert ready["write"] == {"ok": True}
