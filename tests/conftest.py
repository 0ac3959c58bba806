"""Fixtures: real servers, started when a test first asks for one and stopped by process id at the end."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
import redis as redis_client

from server.embedded import PostgresServer, RedisServer, Service, without_libpq
from tests.browser import Chromium, axe_source
from tests.services import KafkaBroker, UnavailableError, locale_of_databases
from tests.timescale import TimescaleServer

_numbers = itertools.count(1)

# What the shell says of other databases would count for every connection of a test, and of what it starts.
for _variable in set(os.environ) - set(without_libpq(os.environ)):
    del os.environ[_variable]

MOST_WORKERS = 8
"""Each has servers of its own, of which Kafka alone takes 0.5 GB."""


def pytest_xdist_auto_num_workers() -> int:
    """pytest-xdist, for `-n auto`: two for a core, because tests wait for servers half of their time."""
    return min(2 * len(os.sched_getaffinity(0)), MOST_WORKERS)


def _running(service: Service) -> Iterator[Service]:
    try:
        service.start()
        yield service
    finally:
        service.stop()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One Redis for all tests; one that wants to kill it takes `fresh_redis`."""
    yield from _running(RedisServer(tmp_path_factory.mktemp("redis") / "data"))


@pytest.fixture
def redis(redis_server: RedisServer) -> Iterator[redis_client.Redis]:
    """A client of the shared Redis, which is empty at the start of each test."""
    with redis_client.Redis(host=redis_server.host, port=redis_server.port) as client:
        client.flushall()
        yield client


@pytest.fixture
def fresh_redis(tmp_path: Path) -> Iterator[Callable[..., RedisServer]]:
    """Makes a started RedisServer of the test's own: `fresh_redis(appendfsync="always")`."""
    started: list[RedisServer] = []

    def start(**options: str) -> RedisServer:
        dashed = {name.replace("_", "-"): value for name, value in options.items()}
        server = RedisServer(tmp_path / f"redis-{next(_numbers)}", options=dashed)
        started.append(server)
        server.start()
        return server

    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One PostgreSQL for all tests."""
    options = {"fsync": "off", "max_connections": "200"}
    data = tmp_path_factory.mktemp("postgres") / "data"
    yield from _running(PostgresServer(data, options=options, locale=locale_of_databases()))


@pytest.fixture
def database_url(postgres_server: PostgresServer) -> Iterator[str]:
    """A database of the test's own, empty."""
    name = f"test_{next(_numbers)}"
    with psycopg.connect(postgres_server.url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        yield postgres_server.url_of(name)
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def timescale_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One TimescaleDB for all tests."""
    try:
        server = TimescaleServer(tmp_path_factory.mktemp("timescale") / "timescale.log")
    except UnavailableError as error:
        pytest.skip(str(error))
    try:
        yield from _running(server)
    finally:
        server.remove()


@pytest.fixture
def timescale_url(timescale_server: TimescaleServer) -> Iterator[str]:
    """A database of the test's own, empty, on a server that has TimescaleDB."""
    name = f"test_{next(_numbers)}"
    with psycopg.connect(timescale_server.url_of("postgres"), autocommit=True) as connection:
        # template1 may be looked at by TimescaleDB's workers at this moment.
        connection.execute(f"CREATE DATABASE {name} TEMPLATE template0")
        yield timescale_server.url_of(name)
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def kafka_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One Apache Kafka for all tests."""
    try:
        broker = KafkaBroker(tmp_path_factory.mktemp("kafka"))
    except UnavailableError as error:
        pytest.skip(str(error))
    yield from _running(broker)


@pytest.fixture
def kafka_topic(kafka_broker: KafkaBroker) -> str:
    """The name of a topic that is not there yet."""
    return f"score-updates-{next(_numbers)}"


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One browser for all tests; each page of it has storage of its own."""
    try:
        browser = Chromium(tmp_path_factory.mktemp("chromium"))
    except UnavailableError as error:
        pytest.skip(str(error))
    yield from _running(browser)


@pytest.fixture(scope="session")
def axe() -> str:
    """The source of axe-core, for `page.violations(axe)`."""
    try:
        return axe_source()
    except UnavailableError as error:
        pytest.skip(str(error))
