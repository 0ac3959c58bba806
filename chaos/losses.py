"""What kill -9 spares: ways to let Redis lose what it had acknowledged. Knows nothing of the ledger."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import redis

from bench.stack import Stack
from chaos.schedule import Loss
from server.embedded import RedisServer
from tests.services import wait_until

BACK_WITHIN_S = 30.0


def lose(stack: Stack, loss: Loss) -> None:
    """Do it; Redis runs again when this returns."""
    if loss.how == "flush":
        _kill_relay(stack, loss)
        _flush(stack.redis)
    elif loss.how == "truncate":
        _kill_relay(stack, loss)
        stack.redis.kill()
        _truncate(stack.redis.data, loss.cut_bytes)
        stack.redis.start()
    else:
        _promote(stack, loss)
    if loss.relay_s:
        stack.relay.launch()


def _kill_relay(stack: Stack, loss: Loss) -> None:
    # Killed, not paused: one that sleeps through all of it may still deliver what was lost, when all is compared.
    if loss.relay_s:
        stack.relay.kill()
        time.sleep(loss.relay_s)


def _flush(server: RedisServer) -> None:
    with redis.Redis(server.host, server.port) as client:
        client.flushall()


def _truncate(data: Path, cut_bytes: int) -> None:
    """Take the end off the file that Redis appends to; what is left of a transaction is dropped when it loads."""
    last = max((data / "appendonlydir").glob("*.incr.aof"), key=lambda path: int(path.name.split(".")[-3]))
    with last.open("r+b") as file:
        file.truncate(max(0, last.stat().st_size - cut_bytes))


def _promote(stack: Stack, loss: Loss) -> None:
    """Let a replica take the place of its primary, as it was `lag_s` before that died."""
    primary = stack.redis
    data = primary.data.with_name("replica")
    shutil.rmtree(data, ignore_errors=True)
    replica = RedisServer(data, options={"replicaof": f"{primary.host} {primary.port}"})
    replica.start()
    try:
        with redis.Redis(replica.host, replica.port) as client:
            wait_until(lambda: client.info("replication")["master_link_status"] == "up", BACK_WITHIN_S, "no replica")
            time.sleep(0.5)
            client.replicaof("NO", "ONE")  # what comes from here on is its lag
        time.sleep(loss.lag_s)
        _kill_relay(stack, loss)
        primary.kill()
    finally:
        replica.kill()  # what it has written stays, and nobody is told of its end
    # A server has one address for Redis, so the replica moves there: by its data, in a process of its own.
    shutil.rmtree(primary.data / "appendonlydir")
    shutil.copytree(data / "appendonlydir", primary.data / "appendonlydir")
    primary.start()
