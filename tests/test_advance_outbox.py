"""A quiet outbox goes on with the time, and only where it is known to have everything."""

from __future__ import annotations

import time
from typing import Any

import pytest
import redis as redis_client

from server.keys import Keys
from server.scores import _ADVANCE

pytestmark = pytest.mark.redis

KEYS = Keys(tag="5")


def advance(redis: redis_client.Redis, epoch: str = "7", quiet_ms: int = 5000) -> Any:
    return redis.eval(_ADVANCE.decode(), 2, KEYS.outbox, KEYS.ready, epoch, quiet_ms)


def last_ms(redis: redis_client.Redis) -> int:
    return int(redis.xinfo_stream(KEYS.outbox)["last-generated-id"].split(b"-")[0])


@pytest.fixture
def quiet(redis: redis_client.Redis) -> redis_client.Redis:
    """A verified Redis whose outbox owes one entry of long ago."""
    redis.hset(KEYS.ready, "epoch", "7")
    redis.xadd(KEYS.outbox, {"batch": "x"}, id="1000-5")
    return redis


def test_last_id_of_a_quiet_outbox_becomes_the_time(quiet: redis_client.Redis) -> None:
    before_ms = time.time_ns() // 1_000_000
    assert advance(quiet) == 1
    assert before_ms <= last_ms(quiet) <= time.time_ns() // 1_000_000
    assert quiet.xrange(KEYS.outbox) == [(b"1000-5", {b"batch": b"x"})], "what is owed stays"


def test_next_entry_comes_behind_it(quiet: redis_client.Redis) -> None:
    ahead_ms = time.time_ns() // 1_000_000 + 3_600_000  # by a clock that was set back since
    quiet.execute_command("XSETID", KEYS.outbox, f"{ahead_ms}-3")
    assert advance(quiet) == 0
    assert quiet.xadd(KEYS.outbox, {"batch": "y"}) == f"{ahead_ms}-4".encode()


def test_outbox_that_is_in_use_is_left_alone(quiet: redis_client.Redis) -> None:
    entry_id = quiet.xadd(KEYS.outbox, {"batch": "y"})
    assert advance(quiet, quiet_ms=600_000) == 0
    assert quiet.xinfo_stream(KEYS.outbox)["last-generated-id"] == entry_id


def test_redis_of_another_epoch_is_left_alone(quiet: redis_client.Redis) -> None:
    assert advance(quiet, epoch="6") == 0
    quiet.delete(KEYS.ready)
    assert advance(quiet) == 0
    assert last_ms(quiet) == 1000
