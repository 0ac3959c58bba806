"""Real servers for tests: Apache Kafka, and the scoreboard's own processes.

Redis and PostgreSQL come from server.embedded. Every server here has a free port of its own, a log, and can be
stopped, killed, paused and started again on the same data. Knows no test.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

from confluent_kafka import Consumer, KafkaException, Message
from confluent_kafka.admin import AdminClient

from server import config
from server.embedded import ADDRESS, Service, free_port

ROOT = Path(__file__).resolve().parent.parent
T = TypeVar("T")
JWT_SECRET = "a secret that only the tests know, 42 bytes"


def wait_until(condition: Callable[[], T], deadline_s: float = 30.0, message: str = "it never came true") -> T:
    """The first true value of `condition`; fails with `message` when there is none for `deadline_s`."""
    deadline = time.monotonic() + deadline_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"{message} (waited {deadline_s:g} s)"
        time.sleep(0.02)


def locale_of_databases() -> str:
    """What most databases out there have, en_US.UTF-8, if this machine knows it: the tests' database sorts by it."""
    known = subprocess.run(["locale", "-a"], capture_output=True, text=True, check=False).stdout.lower().split()
    return "en_US.UTF-8" if {"en_us.utf8", "en_us.utf-8"} & set(known) else "C"


def next_record(consumer: Consumer, deadline_s: float = 20.0) -> Message:
    """The next record; what a consumer says of a topic that is still being made is none.

    Not for `wait_until`: a record without a value counts as false.
    """
    deadline, complaint = time.monotonic() + deadline_s, None
    while True:
        message = consumer.poll(0.1)
        if message is not None:
            complaint = message.error()
            if complaint is None:
                return message
        assert time.monotonic() < deadline, f"no record came within {deadline_s:g} s; last error: {complaint}"


def listens(port: int) -> bool:
    """Whether somebody takes connections at a port of this machine."""
    try:
        socket.create_connection((ADDRESS, port), timeout=1).close()
    except OSError:
        return False
    return True


class UnavailableError(Exception):
    """A server that this machine cannot run; the message says why."""


class KafkaBroker(Service):
    """Apache Kafka in KRaft mode, one node unless `options` say otherwise; never creates topics by itself."""

    ready_within_s = 60.0

    def __init__(
        self,
        data: Path,
        port: int | None = None,
        options: Mapping[str, str] | None = None,
        format_options: Sequence[str] = (),
    ) -> None:
        """`options` are lines of server.properties, `format_options` arguments of the tool that makes the storage."""
        self.port = port or free_port()
        self.data = data
        controller = free_port()
        self.options = {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@{ADDRESS}:{controller}",
            "listeners": f"PLAINTEXT://{ADDRESS}:{self.port},CONTROLLER://{ADDRESS}:{controller}",
            "advertised.listeners": f"PLAINTEXT://{ADDRESS}:{self.port}",
            "controller.listener.names": "CONTROLLER",
            "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SECURE:SASL_SSL",
            "log.dirs": str(data / "data"),
            "auto.create.topics.enable": "false",
            "offsets.topic.replication.factor": "1",
            "offsets.topic.num.partitions": "4",
            "transaction.state.log.replication.factor": "1",
            "transaction.state.log.min.isr": "1",
            "group.initial.rebalance.delay.ms": "0",
            "broker.heartbeat.interval.ms": "300",
            "broker.session.timeout.ms": "1000",
        } | dict(options or {})
        self._format_options = format_options
        self._properties = data / "server.properties"
        self._java = ["java", "-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp", f"{kafka_jars()}/*"]
        super().__init__("Kafka", [*self._java, "kafka.Kafka", str(self._properties)], log=data / "kafka.log")

    @property
    def brokers(self) -> str:
        """The bootstrap address."""
        return f"{ADDRESS}:{self.port}"

    def prepare(self) -> None:
        """Write the configuration and format the storage, once."""
        if self._properties.exists():
            return
        self.data.mkdir(parents=True, exist_ok=True)
        self._properties.write_text("".join(f"{name}={value}\n" for name, value in self.options.items()))
        cluster = () if "-t" in self._format_options else ("-t", self._tool("random-uuid").strip())
        self._tool("format", *cluster, "-c", str(self._properties), *self._format_options)

    def answers(self) -> bool:
        """Whether it is a member of its own cluster, which after a kill takes until its old session is over."""
        admin = AdminClient({"bootstrap.servers": self.brokers, "log_level": 0})
        try:
            return int(self.options["node.id"]) in admin.list_topics(timeout=0.5).brokers
        except KafkaException:
            return False

    def _tool(self, *arguments: str) -> str:
        argv = [*self._java, "kafka.tools.StorageTool", *arguments]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.splitlines()[-1]


class KafkaCluster:
    """Three brokers that keep everything twice at least; clients log in as `username` over TLS, by PLAIN or SCRAM.

    Among themselves, and to tests that look into them, the brokers speak without either.
    """

    username: Final = "scoreboard"

    def __init__(self, directory: Path, password: str, certificate: Path) -> None:
        """`certificate` is a PEM file with key and chain, for 127.0.0.1."""
        ports = [(free_port(), free_port(), free_port()) for _ in range(3)]
        cluster_id = secrets.token_bytes(16).hex()[:22]
        plain = "org.apache.kafka.common.security.plain.PlainLoginModule"
        scram = "org.apache.kafka.common.security.scram.ScramLoginModule"
        self.servers = []
        for node, (port, controller, secure) in enumerate(ports, 1):
            options = {
                "node.id": str(node),
                "controller.quorum.voters": ",".join(f"{n}@{ADDRESS}:{ports[n - 1][1]}" for n in (1, 2, 3)),
                "listeners": f"PLAINTEXT://{ADDRESS}:{port},CONTROLLER://{ADDRESS}:{controller},"
                f"SECURE://{ADDRESS}:{secure}",
                "advertised.listeners": f"PLAINTEXT://{ADDRESS}:{port},SECURE://{ADDRESS}:{secure}",
                "offsets.topic.replication.factor": "3",
                "sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-512",
                "listener.name.secure.plain.sasl.jaas.config": f'{plain} required user_{self.username}="{password}";',
                "listener.name.secure.scram-sha-512.sasl.jaas.config": f"{scram} required;",
                "ssl.keystore.type": "PEM",
                "ssl.keystore.location": str(certificate),
            }
            user = f"SCRAM-SHA-512=[name={self.username},password={password}]"
            made = ("-t", cluster_id, "--add-scram", user)
            self.servers.append(KafkaBroker(directory / f"kafka-{node}", port, options, made))
        self.brokers = ",".join(f"{ADDRESS}:{secure}" for _, _, secure in ports)
        self.plain_brokers = ",".join(server.brokers for server in self.servers)

    def start(self) -> None:
        """Start all three: one alone would wait for another."""
        with ThreadPoolExecutor() as pool:
            list(pool.map(KafkaBroker.prepare, self.servers))
        for server in self.servers:
            server.launch()
        for server in self.servers:
            wait_until(server.answers, server.ready_within_s, f"{server.data} does not answer")

    def stop(self) -> None:
        """Kill all three: the last one would wait in vain for the others."""
        for server in self.servers:
            server.kill()


def kafka_jars() -> Path:
    """The directory of Kafka's jars, fetched from Maven Central the first time.

    Raises UnavailableError where Java or Maven is missing, or Maven fails.
    """
    pom, jars = ROOT / "tests/kafka/pom.xml", ROOT / ".cache/kafka/lib"
    if not shutil.which("java"):
        raise UnavailableError("Apache Kafka needs Java 17 or newer, and there is no `java` on the PATH")
    jars.parent.mkdir(parents=True, exist_ok=True)
    with (jars.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs in one tree fetch once
        fetched = jars / "pom.xml"
        if not fetched.exists() or fetched.read_text() != pom.read_text():
            _fetch_jars(pom, jars)
    return jars


def _fetch_jars(pom: Path, jars: Path) -> None:
    if not shutil.which("mvn"):
        raise UnavailableError("Apache Kafka is fetched by Maven, and there is no `mvn` on the PATH")
    with tempfile.TemporaryDirectory(dir=jars.parent) as scratch:
        argv = ["mvn", "-q", "-B", "-f", str(pom), "dependency:copy-dependencies", "-DincludeScope=runtime"]
        argv += [f"-DoutputDirectory={scratch}/lib"]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise UnavailableError(f"Maven could not fetch Apache Kafka:\n{(done.stdout + done.stderr)[-1500:]}")
        shutil.copy(pom, f"{scratch}/lib/pom.xml")
        shutil.rmtree(jars, ignore_errors=True)
        Path(scratch, "lib").rename(jars)


def environment(settings: Mapping[str, str]) -> dict[str, str]:
    """Our environment without any setting of the scoreboard in it, and then `settings`."""
    ours = {variable for variable, _, _ in config.describe()}
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return {**kept, "JWT_SECRET": JWT_SECRET, **settings}


class ServerProcess(Service):
    """`scoreboard serve` on a free port; ready when it is healthy, whatever its stores are doing."""

    def __init__(self, directory: Path, settings: Mapping[str, str], port: int | None = None) -> None:
        self.port = port or free_port()
        env = environment({"HOST": ADDRESS, "PORT": str(self.port), **settings})
        argv = [sys.executable, "-m", "server", "serve"]
        super().__init__("server", argv, env, log=directory / f"server-{self.port}.log", cwd=ROOT)

    @property
    def url(self) -> str:
        """Where it listens, without a slash at the end."""
        return f"http://{ADDRESS}:{self.port}"

    def answers(self) -> bool:
        """Whether it is healthy."""
        return self.status_of("/healthz") == 200

    def status_of(self, path: str) -> int | None:
        """The status of a GET; None without an answer."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=2) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            error.close()
            return error.code
        except OSError:
            return None


class SyncProcess(Service):
    """`scoreboard sync`, or one of its two roles; ready at once, so wait for what it should do."""

    def __init__(self, directory: Path, settings: Mapping[str, str], *roles: str) -> None:
        name = "-".join(["sync", *roles])
        argv = [sys.executable, "-m", "server", "sync", *roles]
        super().__init__(name, argv, environment(settings), log=directory / f"{name}.log", cwd=ROOT)

    def answers(self) -> bool:
        """Whether it runs."""
        return self.running
