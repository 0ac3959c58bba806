"""`scoreboard check`: is everything there that server and sync need? Looks, says what to do, and writes nothing.

It connects with the very settings and clients that serve and sync use. No secret is ever printed.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import logging
import re
import resource
import sys
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Any, Final, NamedTuple

import hiredis
import psycopg
from confluent_kafka import KafkaException
from confluent_kafka.admin import ConfigResource, ResourceType  # type: ignore[attr-defined]

from server import config, postgres
from server.auth import Authenticator
from server.config import OTHER_FILES, Settings
from server.errors import ConfigError, NotReady
from server.keys import TaggedKeys
from server.machine import brings_libuv, this_machine, why_unusable
from server.redis_connection import open_connection
from server.slots import Address, check_mode
from server.topology import Topology
from server.uws_native import LIBRARY
from sync.kafka import new_admin
from sync.store import WrongEncoding, check_encoding
from sync.topics import times_refused

ANSWER_WITHIN_S: Final = 3.0
OLDEST_REDIS: Final = (7, 0)
OLDEST_POSTGRES: Final = 140_000
MIGRATE: Final = "run `scoreboard migrate`, or start `sync`, which does the same"

_TABLES: Final = """
    SELECT wanted FROM unnest(ARRAY['scores', 'score_events', 'consumer_offsets']) AS wanted
    WHERE to_regclass(wanted) IS NULL
"""
_UNSORTED: Final = """
    SELECT DISTINCT wanted FROM unnest(ARRAY['scores', 'score_events', 'consumer_offsets']) AS wanted
    JOIN pg_attribute ON attrelid = to_regclass(wanted)
    WHERE attname IN ('board', 'player_id', 'consumer_group', 'topic')
      AND attcollation <> 'pg_catalog."C"'::regcollation
    ORDER BY wanted
"""
_ACCESS: Final = "SELECT pg_is_in_recovery(), current_setting('default_transaction_read_only')"
_EXTENSION: Final = """
    SELECT extversion, current_setting('timescaledb.license', true) FROM pg_extension WHERE extname = 'timescaledb'
"""


class State(StrEnum):
    """How bad it is; one FAIL makes the exit status 1."""

    OK = "ok"
    WARN = "warn"
    FAIL = "FAIL"


class Finding(NamedTuple):
    """A row of the table: what was found, and what to do about it if it is not ok."""

    state: State
    part: str
    found: str
    advice: str = ""


def main(argv: list[str]) -> int:
    """Print a finding a line; 1 if one of them is a FAIL."""
    parser = argparse.ArgumentParser(
        prog="scoreboard check",
        description="Look at the configuration and every connection. Changes nothing.",
        epilog="Exit status: 0 if server and sync can work (there may be warnings), 1 if they cannot.",
    )
    parser.parse_args(argv)
    logging.disable(logging.CRITICAL)  # what client libraries have to say is in the findings
    worst = State.OK
    for finding in findings():
        worst = max(worst, finding.state, key=list(State).index)
        sys.stdout.write(_line(finding))
        sys.stdout.flush()  # the next one may take seconds
    return 1 if worst == State.FAIL else 0


def findings() -> Iterator[Finding]:
    """Everything that is looked at, in order; the connections only when the configuration makes sense."""
    yield from check_machine()
    try:
        settings = config.load()
    except ConfigError as error:
        for fault in str(error).splitlines():
            yield Finding(State.FAIL, "settings", fault, "correct that variable")
        return
    yield from check_settings(settings)
    yield from check_files(settings)
    for part in PARTS:
        yield from look_at(part, settings)


def look_at(part: str, settings: Settings) -> Iterator[Finding]:
    """What is found at one of PARTS; that it cannot be reached is a finding, too."""
    look, broken, variables = PARTS[part]
    try:
        yield from look(settings)
    except broken as error:
        said = error.args[0].str() if isinstance(error, KafkaException) else str(error)
        said = " ".join(said.split()) or type(error).__name__
        yield Finding(State.FAIL, part, said, f"is it up? look at {variables}")


# ---------------------------------------------------------------------- this machine, the environment


def check_machine() -> Iterator[Finding]:
    """The processor, the library that uWebSockets stands on, and the one that pip compiles."""
    system, machine, python = this_machine()
    said = f"{system} {machine}, Python {python[0]}.{python[1]}"
    if unusable := why_unusable(system, machine, python):
        yield Finding(State.FAIL, "machine", said, unusable)
    else:
        yield Finding(State.OK, "machine", said)
    if not brings_libuv(machine):
        try:
            ctypes.CDLL("libuv.so.1")
        except OSError as error:
            yield Finding(State.FAIL, "libuv", str(error), "install libuv (Debian and Ubuntu: apt install libuv1)")
        else:
            yield Finding(State.OK, "libuv", "libuv.so.1")
    if LIBRARY.exists():
        yield Finding(State.OK, "compiled part", LIBRARY.name)
    else:
        yield Finding(
            State.WARN, "compiled part",
            f"{LIBRARY.name} is missing: requests cost half as much again, and odd ones get no answer",
            "install the package anew: pip compiles it",
        )  # fmt: skip


def check_settings(settings: Settings) -> Iterator[Finding]:
    """What needs more than one variable."""
    try:
        Authenticator(settings)
    except ConfigError as error:
        yield Finding(State.FAIL, "settings", str(error), "`serve` does not start without")
    else:
        yield Finding(
            State.OK, "settings", f"boards {', '.join(settings.boards)}; tokens {', '.join(settings.jwt_algorithms)}"
        )


def check_files(settings: Settings) -> Iterator[Finding]:
    """How many files a server may open: each WebSocket takes one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = "no limit" if most == resource.RLIM_INFINITY else f"at most {most}"
    wanted = settings.live_max_connections + OTHER_FILES
    if most == resource.RLIM_INFINITY or most >= wanted:
        yield Finding(State.OK, "open files", found)
    else:
        yield Finding(State.WARN, "open files", found, f"raise the limit to {wanted}, or lower LIVE_MAX_CONNECTIONS")


# ---------------------------------------------------------------------- Redis


def _look_at_redis(settings: Settings) -> Iterator[Finding]:
    addresses = [(settings.redis_host, settings.redis_port)]
    if settings.redis_cluster:
        try:
            addresses = asyncio.run(_masters(settings))
        except NotReady as error:
            yield Finding(State.FAIL, "Redis", str(error), "look at REDIS_CLUSTER, REDIS_HOST, _PORT and _PASSWORD")
            return
    for host, port in addresses:
        info = asyncio.run(_redis_info(settings, (host, port)))
        yield from judge_redis(info, f"{host}:{port}", in_cluster=bool(settings.redis_cluster))


async def _masters(settings: Settings) -> list[Address]:
    topology = Topology(settings)
    by_tag = TaggedKeys(settings.redis_key_prefix, settings.boards).by_tag
    return sorted({await topology.master_of(keys.slot) for keys in by_tag.values()})


async def _redis_info(settings: Settings, address: Address) -> dict[str, str]:
    connection = await open_connection(settings, lambda _: None, address)
    try:
        async with asyncio.timeout(ANSWER_WITHIN_S):
            info: bytes = await connection.execute("INFO")
    finally:
        connection.close()
    lines = (line.partition(":") for line in info.decode(errors="replace").splitlines())
    return {name: value for name, colon, value in lines if colon}


def judge_redis(info: dict[str, str], address: str, *, in_cluster: bool = False) -> Iterator[Finding]:
    """What Redis's INFO means for us."""
    try:
        check_mode(wanted=in_cluster, found=info.get("cluster_enabled") == "1")
    except NotReady as error:
        yield Finding(State.FAIL, "Redis", f"{address}: {error}", "set REDIS_CLUSTER to 1 for a Redis Cluster only")
    version = info["redis_version"]
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST_REDIS:
        yield Finding(State.FAIL, "Redis", f"{address}: version {version}", "expected 7.0 or newer, or Valkey")
    else:
        yield Finding(State.OK, "Redis", f"{address}: version {version}")
    if info["role"] != "master":
        primary = f"{info.get('master_host')}:{info.get('master_port')}"
        yield Finding(State.FAIL, "Redis", "it is a replica", f"expected its primary, which is {primary}")
    if info.get("loading") == "1":
        yield Finding(State.WARN, "Redis", "it is still loading its data", "wait: servers do, too")
    policy = info["maxmemory_policy"]
    if policy == "noeviction":
        yield Finding(State.OK, "Redis", "maxmemory-policy noeviction")
    else:
        yield Finding(State.FAIL, "Redis", f"maxmemory-policy {policy}: scores may be evicted", "set it to noeviction")
    yield from _judge_persistence(info)


def _judge_persistence(info: dict[str, str]) -> Iterator[Finding]:
    if info["aof_enabled"] == "0":
        advice = "set appendonly to yes, or accept that what was not relayed to Kafka is lost with the machine"
        yield Finding(State.WARN, "Redis", "no append-only file", advice)
    elif info.get("aof_last_write_status") != "ok":
        yield Finding(State.FAIL, "Redis", "the append-only file cannot be written", "is the disk full?")
    else:
        yield Finding(State.OK, "Redis", "append-only file is written")


# ---------------------------------------------------------------------- Kafka


def _look_at_kafka(settings: Settings) -> Iterator[Finding]:
    admin = new_admin(settings)
    # Without a name: asking for one may create it, where brokers are set to do so.
    answer = admin.list_topics(timeout=ANSWER_WITHIN_S)
    yield Finding(State.OK, "Kafka", f"{len(answer.brokers)} broker(s)")
    kept_ms = settings.kafka_retention_hours * 3_600_000
    for name, partitions, wanted_ms in (
        (settings.kafka_topic, settings.kafka_partitions, kept_ms),
        (settings.dead_letter_topic, 1, -1),
    ):
        topic = answer.topics.get(name)
        if topic is None:
            yield Finding(State.FAIL, "Kafka", f"no topic {name}", MIGRATE)
            continue
        yield from _judge_partitions(topic, partitions, settings.kafka_replication)
        if not str(answer.cluster_id).startswith("mockCluster"):  # which knows no settings
            yield from _judge_retention(name, _retention_ms(admin, name), wanted_ms)
            yield _judge_times(name, times_refused(admin, name))


def _judge_partitions(topic: Any, partitions: int, replication: int) -> Iterator[Finding]:
    replicas = min(len(each.replicas) for each in topic.partitions.values())
    found = f"{topic.topic}: {len(topic.partitions)} partition(s), each on {replicas} broker(s)"
    if len(topic.partitions) < partitions:
        advice = f"KAFKA_PARTITIONS says {partitions}: add partitions, or lower it"
        yield Finding(State.WARN, "Kafka", found, advice)
    elif replicas < replication:
        yield Finding(State.WARN, "Kafka", found, f"KAFKA_REPLICATION says {replication}: reassign its partitions")
    else:
        yield Finding(State.OK, "Kafka", found)
    behind = sum(len(each.isrs) < len(each.replicas) for each in topic.partitions.values())
    if behind:
        advice = "is a broker down? one more, and events may have to wait"
        yield Finding(State.WARN, "Kafka", f"{topic.topic}: {behind} partition(s) lack a replica in sync", advice)


def _judge_retention(name: str, kept_ms: int, wanted_ms: int) -> Iterator[Finding]:
    # -1 is for ever.
    found = f"{name}: keeps records for {'ever' if kept_ms < 0 else f'{kept_ms / 3_600_000:g} h'}"
    if kept_ms < 0 or 0 <= wanted_ms <= kept_ms:
        yield Finding(State.OK, "Kafka", found)
    else:
        advice = f"set its retention.ms to {wanted_ms}: a rebuild looks back on the one, people on dead letters"
        yield Finding(State.WARN, "Kafka", found, advice)


def _judge_times(name: str, refused: dict[str, str]) -> Finding:
    if not refused:
        return Finding(State.OK, "Kafka", f"{name}: takes records of any time")
    wanted = ", ".join(f"{setting}={value}" for setting, value in refused.items())
    advice = f"{MIGRATE}; or set {wanted}"
    return Finding(
        State.WARN, "Kafka", f"{name}: may refuse records while a clock is ahead, or change their time", advice
    )


def _retention_ms(admin: Any, name: str) -> int:
    asked = ConfigResource(ResourceType.TOPIC, name)
    (future,) = admin.describe_configs([asked], request_timeout=ANSWER_WITHIN_S).values()
    return int(future.result()["retention.ms"].value)


# ---------------------------------------------------------------------- PostgreSQL


def _look_at_database(settings: Settings) -> Iterator[Finding]:
    with postgres.connect(settings.database_url, "scoreboard-check", ANSWER_WITHIN_S) as connection:
        connection.read_only = True
        version, info = connection.info.server_version, connection.info
        found = f"{info.host}:{info.port}/{info.dbname}: version {version // 10_000}.{version % 10_000}"
        if version < OLDEST_POSTGRES:
            yield Finding(State.FAIL, "PostgreSQL", found, "expected 14 or newer")
        else:
            yield Finding(State.OK, "PostgreSQL", found)
        yield from _judge_access(connection.execute(_ACCESS).fetchone())
        try:
            check_encoding(connection)
        except WrongEncoding as error:
            yield Finding(State.FAIL, "PostgreSQL", str(error), "and name it in DATABASE_URL")
            return
        yield _judge_extension(connection.execute(_EXTENSION).fetchone())
        missing = [table for (table,) in connection.execute(_TABLES)]
        if missing:
            yield Finding(State.FAIL, "PostgreSQL", f"no table {', '.join(missing)}", MIGRATE)
        else:
            yield Finding(State.OK, "PostgreSQL", "the schema is applied")
        if unsorted := [table for (table,) in connection.execute(_UNSORTED)]:
            advice = f"slower only; {MIGRATE}: it says what stands in the way"
            yield Finding(State.WARN, "PostgreSQL", f"{', '.join(unsorted)}: keys in the database's own order", advice)


def _judge_access(access: tuple[Any, ...] | None) -> Iterator[Finding]:
    in_recovery, read_only = access or (False, "off")
    if in_recovery:
        advice = "servers can read it, sync has to write: name all hosts, and target_session_attrs=read-write"
        yield Finding(State.FAIL, "PostgreSQL", "it is a read-only standby", advice)
    elif read_only == "on":
        advice = "sync has to write: is it meant to be so, and for this user?"
        yield Finding(State.FAIL, "PostgreSQL", "default_transaction_read_only is on", advice)


def _judge_extension(extension: tuple[Any, ...] | None) -> Finding:
    if extension is None:
        advice = "none is needed; with it, history is compressed and dropped by the day"
        return Finding(State.OK, "PostgreSQL", f"no TimescaleDB ({advice})")
    version, licence = extension
    edition = {"timescale": "community", "apache": "Apache-only"}.get(licence, str(licence))
    return Finding(State.OK, "PostgreSQL", f"TimescaleDB {version}, {edition} edition")


class Part(NamedTuple):
    """Something to connect to: how, what that raises, and the variables that say where."""

    look: Callable[[Settings], Iterator[Finding]]
    broken: tuple[type[Exception], ...]
    variables: str


PARTS: Final = {
    "Redis": Part(_look_at_redis, (OSError, TimeoutError, hiredis.HiredisError), "REDIS_HOST, _PORT and _PASSWORD"),
    "Kafka": Part(_look_at_kafka, (KafkaException,), "KAFKA_BROKERS"),
    "PostgreSQL": Part(_look_at_database, (psycopg.Error,), "DATABASE_URL"),
}


def _line(finding: Finding) -> str:
    state, part, found, advice = finding
    return f"{state:<4}  {part:<10}  {found}{f' → {advice}' if advice else ''}\n"
