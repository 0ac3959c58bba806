"""`scoreboard all` with a part that cannot work: the others do not notice, and it is said where an operator looks."""

from __future__ import annotations

import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from server.embedded import ADDRESS, RedisServer, Service, free_port
from tests.client import post
from tests.services import ROOT, KafkaBroker, environment, wait_until

pytestmark = [pytest.mark.redis, pytest.mark.postgres, pytest.mark.kafka]

# The supervisor's patience is short here, and its children are the real ones.
IMPATIENT = """
import sys
from server import supervisor
supervisor.LONGEST_DELAY_S = 0.2
supervisor.Supervisor.__init__.__defaults__ = ((), 3)
from server.__main__ import main
sys.argv[1:] = ["all"]
sys.exit(main())
"""


class All(Service):
    """`scoreboard all`, whose supervisor gives up after 3 ends, and soon."""

    def __init__(self, directory: Path, settings: dict[str, str]) -> None:
        self.port = free_port()
        self.settings = environment({"HOST": ADDRESS, "PORT": str(self.port), **settings})
        argv = [sys.executable, "-c", IMPATIENT]
        super().__init__("all", argv, self.settings, log=directory / "all.log", cwd=ROOT)

    def page(self, path: str) -> str:
        """What a GET says, also with an error; "" without an answer."""
        try:
            with urllib.request.urlopen(f"http://{ADDRESS}:{self.port}{path}", timeout=5) as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError as error:
            return error.read().decode()
        except OSError:
            return ""

    def answers(self) -> bool:
        """Whether it takes updates."""
        return '"write":{"ok":true}' in self.page("/readyz")

    def restarts(self, process: str) -> int:
        """How often a process was started again, as the server tells Prometheus."""
        found = re.search(
            rf'^scoreboard_restarts_total{{process="{process}"}} (\S+)$', self.page("/metrics"), re.MULTILINE
        )
        assert found, f"no count of {process}"
        return int(float(found[1]))

    def health(self) -> str:
        """What `scoreboard health` says."""
        argv = [sys.executable, "-m", "server", "health"]
        return subprocess.run(argv, env=self.settings, cwd=ROOT, capture_output=True, text=True, check=False).stdout


@pytest.fixture
def board(
    tmp_path: Path,
    redis: object,
    redis_server: RedisServer,
    database_url: str,
    kafka_broker: KafkaBroker,
    kafka_topic: str,
) -> Iterator[tuple[All, psycopg.Connection]]:
    """One that has stored an update of a database user of its own, and a superuser's connection to its database."""
    del redis
    name = database_url.rpartition("/")[2]
    settings = {
        "REDIS_HOST": redis_server.host,
        "REDIS_PORT": str(redis_server.port),
        "KAFKA_BROKERS": kafka_broker.brokers,
        "KAFKA_TOPIC": kafka_topic,
        "KAFKA_PARTITIONS": "1",
        "DATABASE_URL": database_url.replace("postgres@", f"{name}_user@"),
    }
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {name}_user LOGIN")
        connection.execute(f"ALTER DATABASE {name} OWNER TO {name}_user")
        connection.execute(f"ALTER SCHEMA public OWNER TO {name}_user")
        process = All(tmp_path, settings)
        try:
            process.start()
            assert post_one(process) == 200
            wait_until(lambda: connection.execute("SELECT 1 FROM scores").fetchone(), 60, "it was never stored")
            yield process, connection
        finally:
            process.kill()


def post_one(process: All) -> int:
    return post(process, "ann").status  # type: ignore[arg-type]


def _end_sessions(database: psycopg.Connection) -> None:
    database.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename LIKE '%_user'")


def _read_only(database: psycopg.Connection) -> None:
    database.execute(f"ALTER DATABASE {database.info.dbname} SET default_transaction_read_only = on")
    _end_sessions(database)


def _missing_right(database: psycopg.Connection) -> None:
    database.execute("ALTER TABLE scores OWNER TO postgres")
    _end_sessions(database)


def _topic_made_anew(database: psycopg.Connection) -> None:
    database.execute("UPDATE consumer_offsets SET topic_id = 'another'")
    _end_sessions(database)


def _log_gap(database: psycopg.Connection) -> None:
    database.execute("UPDATE consumer_offsets SET next_offset = 1000000")


@pytest.mark.parametrize("break_it", [_read_only, _missing_right, _topic_made_anew, _log_gap])
def test_persister_that_cannot_work_leaves_the_rest_alone(
    board: tuple[All, psycopg.Connection], break_it: Callable[[psycopg.Connection], None]
) -> None:
    process, database = board
    persister = next(pid for pid in process.family() if b"persister" in Path(f"/proc/{pid}/cmdline").read_bytes())
    break_it(database)
    assert post_one(process) == 200
    # What it does not meet at its work, it meets when it begins.
    subprocess.run(["kill", str(persister)], check=True)
    # Either it ends again and again, more often than a server may, or it waits; both without the others.
    wait_until(
        lambda: process.restarts("persister") >= 5 or "the database refuses" in process.output_tail(200),
        60,
        "the persister works on",
    )
    assert post_one(process) == 200
    assert process.restarts("server") == process.restarts("relay") == 0
    if process.restarts("persister") >= 5:
        assert re.search(r"^persister exited with status 1, \d+ times in a row by now$", process.health(), re.MULTILINE)
    assert process.running
