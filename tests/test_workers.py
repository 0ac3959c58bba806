"""WORKERS: several processes on one port behave as one server."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis as redis_client
from websockets.sync.client import connect

from server.embedded import ADDRESS, RedisServer, free_port
from server.errors import UwsError
from server.health import WORKERS, of_supervisor
from server.supervisor import ILL_AFTER, alive
from server.workers import hold_port
from tests.client import board, can_write, post, token, trust
from tests.services import KafkaBroker, ServerProcess, SyncProcess, wait_until
from tests.wire import Wire, request_bytes

pytestmark = pytest.mark.redis

CONNECTIONS = 100
"""That all of them reach the same one of two workers has a chance of 2 in 2¹⁰⁰."""


class Workers(ServerProcess):
    """`scoreboard serve` with WORKERS=2, ready when both are."""

    def answers(self) -> bool:
        """Whether both listen."""
        return len(self.pids()) == 2 and super().answers()

    def pids(self) -> list[int]:
        """Of the processes that listen on the port."""
        listening = ss("-ltnp", f"sport = :{self.port}")
        return sorted(map(int, re.findall(r"pid=(\d+)", listening)))


@pytest.fixture
def new_workers(
    tmp_path: Path, redis_server: RedisServer, redis: redis_client.Redis
) -> Iterator[Callable[..., Workers]]:
    trust(redis)
    started: list[Workers] = []

    def start(**more: str) -> Workers:
        settings = {
            "REDIS_HOST": redis_server.host,
            "REDIS_PORT": str(redis_server.port),
            "KAFKA_BROKERS": f"{ADDRESS}:{free_port()}",
            "DATABASE_URL": f"postgresql://{ADDRESS}:{free_port()}/none",
            "WORKERS": "2",
            **more,
        }
        process = Workers(tmp_path, settings)
        started.append(process)
        process.start()
        wait_until(lambda: all(can_write(process) for _ in range(20)), 20, "a worker takes no updates")
        return process

    yield start
    for process in started:
        process.kill()


def ss(*arguments: str) -> str:
    return subprocess.run(["ss", "-H", *arguments], capture_output=True, text=True, check=True).stdout


def test_port_that_is_held_is_free_for_sharers_and_for_nobody_else() -> None:
    with hold_port(ADDRESS, 0) as holder, socket.socket() as sharer:
        port = holder.getsockname()[1]
        with pytest.raises(UwsError, match="PORT: expected a free port"):
            hold_port(ADDRESS, port)
        sharer.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sharer.bind((ADDRESS, port))


def test_address_of_another_machine_is_said_with_its_variable() -> None:
    with pytest.raises(UwsError, match=r"HOST: expected an address of this machine, got 'no\.such"):
        hold_port("no.such.host.invalid", 0)


def test_any_free_port_is_the_same_for_all(tmp_path: Path) -> None:
    process = Workers(tmp_path, {"PORT": "0", "WORKERS": "2", "REDIS_PORT": str(free_port())})
    process.launch()
    try:
        wait_until(lambda: process.output_tail(50).count("listening on") == 2)
        (shared,) = re.findall(r"2 workers share port (\d+)", process.output_tail(50))
        assert re.findall(r"listening on \S+:(\d+)", process.output_tail(50)) == [shared, shared]
    finally:
        process.kill()


def test_connections_are_spread_over_all(new_workers: Callable[..., Workers]) -> None:
    workers = new_workers()
    with ExitStack() as stack:
        for _ in range(CONNECTIONS):
            wire = stack.enter_context(Wire(workers.port))
            assert wire.request("GET", "/healthz").status == 200
        established = ss("-tnp", "state", "established", f"sport = :{workers.port}")
        by_pid = Counter(map(int, re.findall(r"pid=(\d+)", established)))
    assert sorted(by_pid) == workers.pids()
    assert min(by_pid.values()) >= 10, by_pid


def test_limits_boards_and_repeated_keys_are_right_across_all(new_workers: Callable[..., Workers]) -> None:
    workers = new_workers(RATE_LIMIT_PER_SECOND="0.001", RATE_LIMIT_BURST="40")
    statuses = Counter(post(workers, "ann").status for _ in range(60))
    assert statuses == {200: 40, 429: 20}
    assert [board(workers) for _ in range(20)] == [{"ann": 40}] * 20
    body = json.dumps({"playerId": "bob", "scoreDelta": 5}).encode()
    headers = {"Authorization": f"Bearer {token('bob')}", "Idempotency-Key": "the-same"}
    answers = []
    for _ in range(20):
        with Wire(workers.port) as wire:
            answers.append(wire.request("POST", "/update-score", body, **headers))
    assert [answer.json() for answer in answers] == [{"playerId": "bob", "newScore": 5}] * 20
    assert sum("idempotent-replayed" in answer.headers for answer in answers) == 19
    assert board(workers) == {"ann": 40, "bob": 5}


@pytest.mark.kafka
def test_watchers_of_all_see_what_one_was_told(
    new_workers: Callable[..., Workers],
    tmp_path: Path,
    redis_server: RedisServer,
    kafka_broker: KafkaBroker,
    kafka_topic: str,
) -> None:
    feed = {"KAFKA_BROKERS": kafka_broker.brokers, "KAFKA_TOPIC": kafka_topic}
    relay = SyncProcess(tmp_path, {"REDIS_PORT": str(redis_server.port), **feed}, "relay")
    relay.start()
    try:
        workers = new_workers(**feed)
        with ExitStack() as stack:
            url = f"ws://{ADDRESS}:{workers.port}/live-updates"
            watchers = [stack.enter_context(connect(url, close_timeout=0.1)) for _ in range(20)]
            assert post(workers, "ann", 7).status == 200
            for watcher in watchers:
                while True:
                    message = json.loads(watcher.recv(20))
                    if message.get("topScores") == [{"playerId": "ann", "score": 7}]:
                        break
    finally:
        relay.stop()


def test_worker_that_is_killed_comes_back_while_the_other_serves(new_workers: Callable[..., Workers]) -> None:
    workers = new_workers()
    first, second = workers.pids()
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: len(workers.pids()) == 2 and first not in workers.pids(), 20, "it never came back")
    assert second in workers.pids()


def test_stop_reaches_all_and_loses_no_request(new_workers: Callable[..., Workers]) -> None:
    workers = new_workers()
    posted = request_bytes(
        "POST", "/update-score", b'{"playerId":"ann","scoreDelta":1}', Authorization=f"Bearer {token('ann')}"
    )
    with ExitStack() as stack:
        wires = [stack.enter_context(Wire(workers.port)) for _ in range(20)]
        for wire in wires:
            wire.send(posted[:-1])
        os.kill(workers.pid, signal.SIGTERM)
        wait_until(lambda: not workers.pids(), 20, "somebody listens still")
        for wire in wires:
            wire.send(posted[-1:])
        assert [wire.answer().status for wire in wires] == [200] * 20
    assert workers.wait(10) == 0


def test_second_signal_ends_all_at_once(new_workers: Callable[..., Workers]) -> None:
    workers = new_workers(DRAIN_DELAY_MS="600000")
    pids = workers.pids()
    os.kill(workers.pid, signal.SIGTERM)
    wait_until(lambda: {workers.status_of("/readyz") for _ in range(20)} == {503})
    os.kill(workers.pid, signal.SIGTERM)
    assert workers.wait(10) == 128 + signal.SIGTERM
    assert not any(map(alive, pids))


def test_process_that_was_left_behind_shares_its_port_with_nobody(
    new_workers: Callable[..., Workers], tmp_path: Path
) -> None:
    workers = new_workers()
    for count in ("1", "2"):
        second = ServerProcess(tmp_path, {**(workers.env or {}), "WORKERS": count}, port=workers.port)
        second.launch()
        assert second.wait(20) == 2
        assert re.search("PORT", second.output_tail())
    stuck, _ = workers.pids()
    os.kill(stuck, signal.SIGSTOP)
    try:
        os.kill(workers.pid, signal.SIGKILL)  # the workers are told by the kernel, but one cannot hear it
        wait_until(lambda: workers.pids() == [stuck])
        with pytest.raises(UwsError, match="PORT: expected a free port"):
            hold_port(ADDRESS, workers.port)
    finally:
        os.kill(stuck, signal.SIGCONT)
    wait_until(lambda: not alive(stuck), message="a worker outlived its parent")


def test_worker_that_ends_again_and_again_is_told_while_the_other_serves(new_workers: Callable[..., Workers]) -> None:
    workers = new_workers()
    (kept, killed), count = workers.pids(), 0
    name = ""
    while count < ILL_AFTER:
        if alive(killed):
            os.kill(killed, signal.SIGKILL)
            count += 1
        wait_until(lambda killed=killed: len(workers.pids()) == 2 and killed not in workers.pids(), 30)  # type: ignore[misc]
        (killed,) = set(workers.pids()) - {kept}
        (name,) = re.findall(r"(worker \d) was killed by SIGKILL", workers.output_tail(1000))[-1:]
    assert of_supervisor(ADDRESS, workers.port, WORKERS) == [f"{name} was killed by SIGKILL, 3 times in a row by now"]
    assert re.search(rf'^scoreboard_restarts_total{{process="{name}"}} 3.0$', metrics(workers), re.MULTILINE)
    assert can_write(workers)
    assert kept in workers.pids()


def metrics(workers: Workers) -> str:
    with Wire(workers.port) as wire:
        return wire.request("GET", "/metrics").body.decode()
