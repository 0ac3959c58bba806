"""`scoreboard dev` as a user meets it: started, used, killed, interrupted, and started again."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import confluent_kafka
import psycopg
import pytest
import redis as redis_client

from server.auth import issue
from server.dev_screen import without_password
from server.dev_watch import Watch
from server.embedded import PostgresServer, RedisServer, free_port
from server.supervisor import Child, alive
from tests.services import ROOT, KafkaBroker, environment, next_record, wait_until
from tests.terminals import Terminal
from tests.wire import Wire, request_bytes

pytestmark = [pytest.mark.redis, pytest.mark.postgres]


class Dev(Child):
    """`scoreboard dev` with its data in `data`."""

    def __init__(self, data: Path, *arguments: str, settings: Mapping[str, str] | None = None) -> None:
        self.port = free_port()
        env = environment({"PORT": str(self.port), **(settings or {})})
        if "JWT_SECRET" not in (settings or {}):
            del env["JWT_SECRET"]
        argv = [sys.executable, "-m", "server", "dev", "--data", str(data), *arguments]
        super().__init__("dev", argv, env, log=data.with_name("dev.log"), cwd=ROOT)

    @property
    def screen(self) -> str:
        return self.output_tail(100)

    def wait_for(self, words: str, deadline_s: float = 40) -> None:
        def said() -> bool:
            assert words in self.screen or self.running, self.screen
            return words in self.screen

        wait_until(said, deadline_s, f"never said: {words}")

    def start(self) -> None:
        super().start()
        self.wait_for("Ctrl-C stops everything")

    def interrupt(self) -> None:
        os.kill(self.pid, signal.SIGINT)

    def curl(self) -> dict[str, Any]:
        """What the line that is shown answers when pasted into a shell."""
        (line,) = (line for line in self.screen.splitlines() if line.startswith("curl "))
        answer: dict[str, Any] = json.loads(subprocess.check_output(["sh", "-c", line], stderr=subprocess.DEVNULL))
        return answer

    def board(self) -> dict[str, int]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/leaderboard?limit=100", timeout=5) as answer:
            return {entry["playerId"]: entry["score"] for entry in json.load(answer)}

    def process(self, *words: str) -> int:
        """The id of the process below it whose command line ends with `words`; 0 if there is none."""
        for pid in self.family():
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]
            except OSError:
                continue  # ended since it was listed
            if command[-len(words) :] == [word.encode() for word in words]:
                return pid
        return 0


@pytest.fixture
def dev(tmp_path: Path) -> Iterator[Callable[..., Dev]]:
    """Makes a Dev that is not started yet; all on the same data."""
    made: list[Dev] = []

    def make(*arguments: str, settings: Mapping[str, str] | None = None) -> Dev:
        made.append(Dev(tmp_path / "data", *arguments, settings=settings))
        return made[-1]

    yield make
    for each in made:
        if each.running:
            each.kill()


def test_board_is_still_there_after_stop_and_start(dev: Callable[..., Dev]) -> None:
    first = dev("--no-demo")
    first.start()
    assert first.curl() == {"playerId": "player123", "newScore": 5}
    shown = first.screen
    processes = first.family()
    first.interrupt()
    assert first.wait(20) == 0, first.screen
    assert not any(map(alive, processes))
    assert "still on its way" not in first.screen

    second = dev("--no-demo")
    second.start()
    assert second.board() == {"player123": 5}
    # The token printed the first time is still good.
    second.log = None
    line = next(line for line in shown.splitlines() if line.startswith("curl ")).replace(
        str(first.port), str(second.port)
    )
    answer = json.loads(subprocess.check_output(["sh", "-c", line], stderr=subprocess.DEVNULL))
    assert answer == {"playerId": "player123", "newScore": 10}
    assert second.stop(20) == 0


def database_of(running: Dev) -> str:
    found = re.search(r"postgresql://\S+", running.screen)
    assert found, running.screen
    return found[0]


def test_next_start_puts_the_database_right_from_redis(dev: Callable[..., Dev], tmp_path: Path) -> None:
    query = "SELECT score FROM scores WHERE player_id = 'player123'"
    first = dev("--no-demo")
    first.start()
    first.curl()
    with psycopg.connect(database_of(first), autocommit=True) as database:
        wait_until(lambda: database.execute(query).fetchone() == (5,))
        wait_until(lambda: " players compared in " in (tmp_path / "data/reconcile.log").read_text(), 30)
        database.execute("UPDATE scores SET score = 3")  # as if events had been lost
    assert first.stop(20) == 0
    second = dev("--no-demo")
    second.start()
    with psycopg.connect(database_of(second), autocommit=True) as database:
        wait_until(lambda: database.execute(query).fetchone() == (5,), 30)
    assert second.stop(20) == 0


def test_secret_is_for_the_owner_only(dev: Callable[..., Dev], tmp_path: Path) -> None:
    dev("--no-demo").start()
    assert stat.S_IMODE((tmp_path / "data" / "jwt-secret").stat().st_mode) == 0o600


def test_demo_players_move_the_board_and_everything_of_it_is_stored(dev: Callable[..., Dev]) -> None:
    running = dev()
    running.start()
    wait_until(lambda: sum(running.board().values()) > 200)
    assert "12, for demonstration" in running.screen
    database = re.search(r"postgresql://\S+", running.screen)
    assert database
    before = running.board()
    with psycopg.connect(database[0]) as connection:
        query = "SELECT coalesce(sum(score), 0) FROM scores"

        def stored() -> bool:
            row = connection.execute(query).fetchone()
            connection.rollback()
            return row is not None and row[0] >= sum(before.values())

        wait_until(stored)
    assert running.stop(20) == 0


def test_killed_server_and_sync_start_again(dev: Callable[..., Dev]) -> None:
    running = dev("--no-demo")
    running.start()
    for words in (("-m", "server", "serve"), ("server", "sync", "relay"), ("server", "sync", "persister")):
        killed = running.process(*words)
        assert killed
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda words=words, killed=killed: running.process(*words) not in (0, killed))  # type: ignore[misc]
    wait_until(lambda: answers(running))
    assert running.curl() == {"playerId": "player123", "newScore": 5}
    assert "server was killed by SIGKILL" in running.screen
    assert "relay was killed by SIGKILL" in running.screen
    assert "persister was killed by SIGKILL" in running.screen


def answers(running: Dev) -> bool:
    try:
        running.board()
    except OSError:
        return False
    return True


def test_killed_redis_comes_back_with_its_data(dev: Callable[..., Dev]) -> None:
    running = dev("--no-demo")
    running.start()
    running.curl()
    port = re.search(r"Redis +127.0.0.1:(\d+)", running.screen)
    assert port
    with redis_client.Redis(port=int(port[1]), socket_timeout=1) as client:
        os.kill(client.info("server")["process_id"], signal.SIGKILL)

    def next_score() -> bool:
        return running.curl().get("newScore") == 10

    wait_until(next_score, 20)


def test_kill_9_leaves_nothing_running_and_the_next_start_goes_on(dev: Callable[..., Dev]) -> None:
    first = dev("--no-demo")
    first.start()
    first.curl()
    processes = first.family()
    assert len(processes) >= 6
    os.kill(first.pid, signal.SIGKILL)
    first.wait(5)
    second = dev("--no-demo")
    second.start()  # at once: it waits for the old stores to close their data
    assert not any(map(alive, processes))
    assert second.board() == {"player123": 5}


def test_second_one_on_the_same_data_is_refused(dev: Callable[..., Dev], tmp_path: Path) -> None:
    first, second = dev("--no-demo"), dev("--no-demo")
    first.start()
    second.log = tmp_path / "second.log"
    second.launch()
    assert second.wait(10) == 1
    expected = f"another one (process {first.pid}) runs with {tmp_path / 'data'}: stop it, or choose another --data"
    assert second.screen == f"scoreboard dev: {expected}"
    assert first.board() == {}


def test_taken_port_is_one_clear_sentence(dev: Callable[..., Dev]) -> None:
    running = dev("--no-demo")
    with socket.create_server(("127.0.0.1", running.port)):
        running.launch()
        assert running.wait(10) == 1
    port = running.port
    assert running.screen == f"scoreboard dev: port {port} is taken: choose another, as in make run PORT={port + 1}"


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        (
            "x86_64-conda-linux-gnu",
            "expected an address of this machine such as 127.0.0.1, 0.0.0.0 or ::, or its name, ",
        ),
        ("192.0.2.1", "expected an address of this machine, got '192.0.2.1': Cannot assign requested address"),
    ],
)
def test_address_of_another_machine_is_named(dev: Callable[..., Dev], host: str, expected: str) -> None:
    running = dev("--no-demo", settings={"HOST": host})
    running.launch()
    assert running.wait(20) == 2
    assert running.screen.startswith(f"scoreboard: HOST: {expected}")
    assert len(running.screen.splitlines()) == 1


def test_wrong_setting_is_named(dev: Callable[..., Dev]) -> None:
    running = dev(settings={"RATE_LIMIT_PER_SECOND": "many"})
    running.launch()
    assert running.wait(10) == 2
    assert "RATE_LIMIT_PER_SECOND: expected 0 (off), or a number from 0.001 to 1000000, got 'many'" in running.screen


def test_second_interrupt_ends_everything_at_once(dev: Callable[..., Dev]) -> None:
    running = dev()
    running.start()
    processes = running.family()
    os.kill(running.process("-m", "server", "serve"), signal.SIGSTOP)  # an orderly stop would wait for it
    running.interrupt()
    running.wait_for("Stopping")
    started = time.monotonic()
    running.interrupt()
    assert running.wait(5) == 130
    assert time.monotonic() - started < 5
    assert not any(map(alive, processes))


@pytest.mark.parametrize("delay_s", [0.1, 0.5, 1.5])
def test_interrupt_during_the_start_leaves_nothing(dev: Callable[..., Dev], delay_s: float) -> None:
    running = dev()
    running.launch()
    wait_until(lambda: running.log is not None and (running.log.parent / "data" / "lock").exists())
    time.sleep(delay_s)
    processes = running.family()
    running.interrupt()
    assert running.wait(20) == 0, running.screen
    assert not any(map(alive, processes))
    assert "Traceback" not in running.screen


def test_named_servers_replace_embedded_ones(
    dev: Callable[..., Dev],
    tmp_path: Path,
    redis: redis_client.Redis,
    redis_server: RedisServer,
    database_url: str,
) -> None:
    named = {"REDIS_HOST": redis_server.host, "REDIS_PORT": str(redis_server.port), "DATABASE_URL": database_url}
    running = dev("--no-demo", settings=named)
    running.start()
    running.curl()
    assert redis.get("player:player123:score") == b"5"
    assert not (tmp_path / "data" / "redis").exists()
    assert not (tmp_path / "data" / "postgres").exists()
    assert re.search(rf"Redis +127.0.0.1:{redis_server.port} +yours", running.screen)
    assert running.stop(20) == 0
    with psycopg.connect(database_url) as connection:
        assert connection.execute("SELECT player_id, score FROM scores").fetchall() == [("player123", 5)]
    assert redis.ping(), "it stopped a server that is not its own"


@pytest.mark.kafka
def test_named_kafka_replaces_the_embedded_one(dev: Callable[..., Dev], kafka_broker: KafkaBroker) -> None:
    running = dev("--no-demo", settings={"KAFKA_BROKERS": kafka_broker.brokers, "KAFKA_TOPIC": "named"})
    running.start()
    running.curl()
    assert re.search(rf"Kafka +{kafka_broker.brokers} +yours", running.screen)
    consumer = confluent_kafka.Consumer({"bootstrap.servers": kafka_broker.brokers, "group.id": "test"})
    try:
        where = [confluent_kafka.TopicPartition("named", partition, 0) for partition in range(8)]
        consumer.assign(where)
        record = next_record(consumer)
        while not record.value():  # a fence
            record = next_record(consumer)
        assert record.key() == b"player123"
    finally:
        consumer.close()
    assert running.stop(20) == 0


def test_secret_and_limits_of_the_environment_are_honoured(dev: Callable[..., Dev]) -> None:
    secret = "x" * 40
    limits = {"RATE_LIMIT_PER_SECOND": "1", "RATE_LIMIT_BURST": "1"}
    claims = {"JWT_AUDIENCE": "players", "JWT_ISSUER": "tests"}
    running = dev("--no-demo", settings={"JWT_SECRET": secret, **limits, **claims})
    running.start()
    assert secret not in running.screen
    assert running.curl()["newScore"] == 5
    assert running.curl()["status"] == 429


def test_passwords_are_not_shown() -> None:
    assert without_password("postgresql://me:pass@db:5432/scores") == "postgresql://me:…@db:5432/scores"
    assert without_password("postgresql://db/scores") == "postgresql://db/scores"


def test_embedded_database_is_a_cluster_of_its_own(dev: Callable[..., Dev], postgres_server: PostgresServer) -> None:
    running = dev("--no-demo")
    running.start()
    assert f":{postgres_server.port}/" not in running.screen


# ---------------------------------------------------------------------- what is behind


def test_watch_tells_a_trouble_when_it_begins_now_and_then_and_when_it_is_over() -> None:
    watch = Watch()
    assert list(watch.look(0, 3, 1.0, "")) == []
    assert list(watch.look(2, 70, 6.0, "")) == [
        "Behind: 70 batches of changes wait in Redis, the oldest for 6 s. Nothing is lost."
    ]
    assert list(watch.look(4, 80, 8.0, "")) == []
    assert len(list(watch.look(18, 90, 22.0, ""))) == 1
    assert list(watch.look(20, 50, 3.0, "")) == []
    assert list(watch.look(22, 1, 0.3, "")) == ["No longer behind."]
    assert list(watch.look(24, 0, 0.0, "the outbox is full")) == ["Updates get 503: the outbox is full"]
    assert list(watch.look(26, 0, 0.0, "the outbox is full")) == []
    assert list(watch.look(28, 0, 0.0, "")) == ["Updates are taken again."]


POSTS: Final = 16_000
"""Of one player, and so in one partition: 7 MB of events with their keys; the broker in memory keeps 5 MiB of it."""


def post_many(port: int, secret: str, count: int, connections: int = 50) -> None:
    """Raise player123's score `count` times by 1, each time with an Idempotency-Key as long as one may be."""
    authorization = f"Bearer {issue(secret.encode(), 'player123')}"
    body = b'{"playerId":"player123","scoreDelta":1}'
    with contextlib.ExitStack() as stack:
        wires = [stack.enter_context(Wire(port)) for _ in range(connections)]
        for first in range(0, count, connections):
            for number, wire in enumerate(wires, first):
                key = str(number).zfill(128)
                wire.send(
                    request_bytes(
                        "POST", "/update-score", body, Authorization=authorization, **{"Idempotency-Key": key}
                    )
                )
            assert {wire.answer().status for wire in wires} == {200}


def test_load_that_the_persister_cannot_follow_loses_nothing(dev: Callable[..., Dev]) -> None:
    secret = "x" * 40
    running = dev("--no-demo", settings={"JWT_SECRET": secret, "RATE_LIMIT_PER_SECOND": "0"})
    running.start()
    persister = running.process("server", "sync", "persister")
    os.kill(persister, signal.SIGSTOP)
    post_many(running.port, secret, POSTS)
    running.wait_for("Behind: ")
    os.kill(persister, signal.SIGCONT)
    with psycopg.connect(database_of(running), autocommit=True) as database:

        def stored() -> int:
            row = database.execute("SELECT count(*) FROM score_events").fetchone()
            return row[0] if row else 0

        wait_until(lambda: stored() == POSTS, 120, "some of it was never stored")
        assert database.execute("SELECT player_id, score FROM scores").fetchall() == [("player123", POSTS)]
    running.wait_for("No longer behind.")
    assert "persister exited" not in running.screen
    assert running.stop(30) == 0


def test_kill_9_under_load_leaves_no_hole_in_the_history(dev: Callable[..., Dev]) -> None:
    secret, count = "x" * 40, 2000
    settings = {"JWT_SECRET": secret, "RATE_LIMIT_PER_SECOND": "0"}
    first = dev("--no-demo", settings=settings)
    first.start()
    os.kill(first.process("server", "sync", "persister"), signal.SIGSTOP)
    post_many(first.port, secret, count)
    first.kill()  # with the broker in memory, and what was in it
    second = dev("--no-demo", settings=settings)
    second.start()
    with psycopg.connect(database_of(second), autocommit=True) as database:
        wait_until(lambda: database.execute("SELECT count(*) FROM score_events").fetchone() == (count,), 30)
    assert second.stop(20) == 0


# ---------------------------------------------------------------------- a shell that means other servers


def test_variables_of_other_servers_do_not_reach_the_embedded_ones(dev: Callable[..., Dev]) -> None:
    others = {
        "PGSSLMODE": "verify-full",
        "PGHOSTADDR": "192.0.2.1",
        "PGOPTIONS": "-c search_path=elsewhere",
        "PGSERVICE": "none",
        "PGCLIENTENCODING": "LATIN1",
        "PGTARGETSESSIONATTRS": "standby",
        "PGDATA": "/nowhere",
        "REDIS_TLS": "1",
        "REDIS_USERNAME": "somebody",
        "REDIS_CLUSTER": "1",
        "REDIS_PASSWORD_FILE": "/nowhere",
        "KAFKA_SECURITY_PROTOCOL": "sasl_ssl",
    }
    running = dev("--no-demo", settings=others)
    running.start()
    assert running.curl() == {"playerId": "player123", "newScore": 5}
    with psycopg.connect(database_of(running), autocommit=True) as database:
        wait_until(lambda: database.execute("SELECT score FROM public.scores").fetchone() == (5,))
    assert running.stop(20) == 0


def test_data_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    running = Dev(tmp_path / "file" / "data")
    running.log = tmp_path / "log"
    running.launch()
    assert running.wait(20) == 2
    where = tmp_path / "file" / "data"
    expected = f"--data: expected a directory that can be made and written, got '{where}': {where}: Not a directory"
    assert running.screen == f"scoreboard: {expected}"


def test_terminal_that_closes_ends_it_in_order(tmp_path: Path) -> None:
    running = Dev(tmp_path / "data", "--no-demo")
    terminal = Terminal(running.argv, running.env or {})
    try:
        wait_until(lambda: "Ctrl-C stops everything" in terminal.said, 60)
        family = terminal.family
        assert len(family) >= 5
        terminal.hang_up()
        assert terminal.status(40) in (0, 120), "120: Python could not flush what nobody reads any more"
        wait_until(lambda: not any(map(alive, family)))
    finally:
        terminal.kill()
    assert "database system is shut down" in (tmp_path / "data" / "postgresql.log").read_text()


# ---------------------------------------------------------------------- data of other programs


def test_unreadable_data_of_redis_is_put_aside_and_the_board_comes_from_the_database(
    dev: Callable[..., Dev], tmp_path: Path
) -> None:
    first = dev("--no-demo")
    first.start()
    first.curl()
    assert first.stop(20) == 0
    data = tmp_path / "data" / "redis"
    wrote = (data / "written-by").read_text().strip()
    (manifest,) = data.glob("appendonlydir/*.manifest")
    base = manifest.read_text().split()[1]
    (manifest.parent / base).write_bytes(b"REDIS9999")  # as if of a later version
    second = dev("--no-demo")
    second.start()
    assert second.board() == {"player123": 5}
    kept = tmp_path / "data" / f"redis.{wrote.lower().replace(' ', '-')}"
    said = f"{wrote} cannot read {data}, which {wrote} wrote: it is kept as {kept}, and the board is rebuilt"
    assert f"{said} from the database" in second.screen
    assert (kept / "written-by").exists()
    assert second.stop(20) == 0


def test_cluster_of_another_postgresql_is_put_aside_and_the_scores_come_from_redis(
    dev: Callable[..., Dev], tmp_path: Path
) -> None:
    first = dev("--no-demo")
    first.start()
    first.curl()
    assert first.stop(20) == 0
    data = tmp_path / "data" / "postgres"
    (data / "PG_VERSION").write_text("15\n")
    (data / "written-by").unlink()  # as one was before there were notes
    second = dev("--no-demo")
    second.start()
    kept = data.with_name("postgres.postgresql-15")
    assert f"which PostgreSQL 15 wrote: it is kept as {kept}, and the history begins anew" in second.screen
    assert second.curl() == {"playerId": "player123", "newScore": 10}
    with psycopg.connect(database_of(second), autocommit=True) as database:
        wait_until(lambda: database.execute("SELECT score FROM scores").fetchone() == (10,))
    assert second.stop(20) == 0
