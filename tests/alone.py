"""A server with nothing but a Redis: Kafka and the database are away."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from server.embedded import ADDRESS, RedisServer, free_port
from tests.client import connect, trust, wait_until_writable
from tests.services import ServerProcess


@contextmanager
def server_alone(directory: Path, settings: Mapping[str, str] | None = None) -> Iterator[ServerProcess]:
    """It takes updates, since its Redis passes for verified."""
    redis, nobody = RedisServer(directory / "redis", options={"appendonly": "no"}), free_port()
    more = {
        "REDIS_PORT": str(redis.port),
        "KAFKA_BROKERS": f"{ADDRESS}:{nobody}",
        "DATABASE_URL": f"postgresql://{ADDRESS}:{nobody}/none",
    }
    process = ServerProcess(directory, {**more, **(settings or {})})
    try:
        redis.start()
        with connect(redis) as client:
            trust(client)
        process.start()
        wait_until_writable(process)
        yield process
    finally:
        process.stop()
        redis.stop()
