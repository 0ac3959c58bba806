"""The load test of a deployment: passes where all is well, and says which limit was missed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis as redis_client

from server.embedded import RedisServer, Service
from sync.store import migrate
from tests.client import get, trust
from tests.services import JWT_SECRET, ROOT, KafkaBroker, ServerProcess, SyncProcess, wait_until

LOCUST = shutil.which("locust", path=str(Path(sys.executable).parent))
PREFIXES = ("POST", "KEYED", "BOARD", "PAGE", "FILE", "CONNECT", "LIVE")
PATIENT = {f"{prefix}_P{share}_MS": "inf" for prefix in PREFIXES for share in (95, 99)}

pytestmark = [
    pytest.mark.redis,
    pytest.mark.postgres,
    pytest.mark.kafka,
    pytest.mark.skipif(not LOCUST, reason="locust is not installed: pip install -e '.[bench]'"),
]


@pytest.fixture
def server(
    tmp_path: Path,
    redis_server: RedisServer,
    redis: redis_client.Redis,
    database_url: str,
    kafka_broker: KafkaBroker,
    kafka_topic: str,
) -> Iterator[ServerProcess]:
    """A server with live updates, where a player may score once a second, twice at once."""
    migrate(database_url)
    trust(redis)
    settings = {
        "REDIS_HOST": redis_server.host,
        "REDIS_PORT": str(redis_server.port),
        "KAFKA_BROKERS": kafka_broker.brokers,
        "KAFKA_TOPIC": kafka_topic,
        "DATABASE_URL": database_url,
        "RATE_LIMIT_PER_SECOND": "1",
        "RATE_LIMIT_BURST": "2",
    }
    parts: list[Service] = [SyncProcess(tmp_path, settings, "relay"), ServerProcess(tmp_path, settings)]
    try:
        for part in parts:
            part.start()
        process = parts[1]
        assert isinstance(process, ServerProcess)
        wait_until(lambda: get(process, "/readyz").json()["live"]["ok"], 30, "the server is not live")
        yield process
    finally:
        for part in parts:
            part.stop()


def locust(host: str, *arguments: str, **limits: str) -> subprocess.CompletedProcess[str]:
    """A run without a terminal, and all that it said."""
    argv = [str(LOCUST), "-f", "bench/locustfile.py", "--headless", "--host", host, *arguments]
    env = {**os.environ, "JWT_SECRET": JWT_SECRET, **PATIENT, **limits}
    # No standard input: locust reads keys from a terminal.
    return subprocess.run(
        argv, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_ramp_passes_and_the_rate_limit_is_no_failure(server: ServerProcess) -> None:
    done = locust(server.url + "/", RAMP="1:20,4:20", ERROR_PERCENT="0")  # as a browser shows the address
    assert done.returncode == 0, done.stdout
    assert "MISSED" not in done.stdout
    for line in ("over the rate limit (429)", "with Idempotency-Key", "a list's delayMs", "a file of the page"):
        assert line in done.stdout


def test_limit_that_nobody_can_keep_is_missed(server: ServerProcess) -> None:
    done = locust(server.url, "-u", "10", "-r", "10", "-t", "5s", POST_P99_MS="-1")
    assert done.returncode == 1, done.stdout
    [sentence] = [line for line in done.stdout.splitlines() if line.startswith("MISSED")]
    assert sentence.startswith("MISSED POST_P99_MS: expected p99 of POST /update-score <= -1 ms, was ")
