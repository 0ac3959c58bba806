"""The container: what the Dockerfile and compose.yaml promise, and a health check that tells well from ill."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from server import config, supervisor
from server.__main__ import DRAIN_GRACE_S
from server.embedded import ADDRESS, MockKafka, Service, free_port
from server.errors import ConfigError
from server.health import WITHIN_S, Desk, of_server, of_supervisor
from server.supervisor import Child, Supervisor, alive
from tests.services import ROOT, ServerProcess, environment, wait_until

DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
STORES = {"redis", "kafka", "timescaledb"}


def instructions() -> list[tuple[str, str]]:
    """(keyword, rest) of each line of the Dockerfile, continued ones joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line.split(None, 1) for line in text.splitlines() if line.strip()]
    return [(keyword, " ".join(rest.split())) for keyword, rest in lines]


def last(keyword: str) -> str:
    return [rest for each, rest in instructions() if each == keyword][-1]


# ---------------------------------------------------------------------- the Dockerfile


def test_dockerfile_has_no_lint() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not hadolint:
        pytest.skip("hadolint is not installed: it has no wheel for this machine")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.stdout + done.stderr == ""


def test_base_is_an_exact_version_and_the_label_names_it() -> None:
    base = next(rest for keyword, rest in instructions() if keyword == "ARG").removeprefix("BASE=")
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-bookworm", base)
    assert [rest.split()[0] for keyword, rest in instructions() if keyword == "FROM"] == ["${BASE}"] * 2
    assert f'image.base.name="docker.io/library/{base}"' in last("LABEL")


def test_image_says_what_it_is() -> None:
    labels = set(re.findall(r"org\.opencontainers\.image\.([\w.]+)=", last("LABEL")))
    assert labels >= {"title", "description", "version", "revision", "base.name"}


def test_image_runs_as_nobody_special_and_stops_as_the_supervisor_expects() -> None:
    uid, _, gid = last("USER").partition(":")
    assert int(uid) > 0
    assert int(gid) > 0
    assert last("STOPSIGNAL") == "SIGTERM"
    assert last("CMD") == '["scoreboard", "all"]'


def test_health_check_is_a_command_that_is_tested_below() -> None:
    options, _, command = last("HEALTHCHECK").partition(" CMD ")
    assert command == '["scoreboard", "health", "--server"]'
    timeout_s = int(re.findall(r"--timeout=(\d+)s", options)[0])
    assert timeout_s > 3 * WITHIN_S, "Docker must not be the one to give up, since it would not say why"


def test_environment_of_the_image_is_known_to_the_scoreboard() -> None:
    known = {variable for variable, _, _ in config.describe()} | {"PATH"}
    final = [rest for keyword, rest in instructions() if keyword == "ENV"][-1]
    names = {name for name in re.findall(r"(\w+)=", final) if not name.startswith("PYTHON")}
    assert {"HOST", "PORT"} <= names <= known


def test_build_gets_every_file_that_it_copies() -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    sources = [rest for keyword, rest in instructions() if keyword == "COPY" and not rest.startswith("--from")]
    copied = [source for rest in sources for source in rest.split()[:-1]]
    assert {"server", "sync", "constraints.txt"} <= set(copied)
    for source in copied:
        assert (ROOT / source).exists(), source
        assert any(fnmatch(source, pattern) for pattern in kept), f".dockerignore keeps {source} out"


# ---------------------------------------------------------------------- compose.yaml


def test_every_image_is_an_exact_version() -> None:
    for name, service in SERVICES.items():
        assert re.search(r":v?\d+\.\d+\.\d+", service["image"]), f"{name}: {service['image']}"


def test_scoreboard_starts_when_its_stores_are_healthy() -> None:
    waits_for = {name: how["condition"] for name, how in SERVICES["scoreboard"]["depends_on"].items()}
    assert waits_for == dict.fromkeys(STORES, "service_healthy")
    for name in STORES:
        assert SERVICES[name]["healthcheck"]["test"], name


def test_scoreboard_may_write_nothing_and_gain_nothing() -> None:
    scoreboard = SERVICES["scoreboard"]
    assert scoreboard["read_only"] is True
    assert scoreboard["cap_drop"] == ["ALL"]
    assert scoreboard["security_opt"] == ["no-new-privileges:true"]
    assert not scoreboard.get("volumes")


def test_secrets_are_the_operators() -> None:
    assert SERVICES["scoreboard"]["environment"]["JWT_SECRET"].startswith("${JWT_SECRET:?")
    for name, service in SERVICES.items():
        for variable, value in service.get("environment", {}).items():
            if re.search(r"SECRET|PASSWORD", variable) and not variable.startswith("GF_"):
                assert re.match(r"\$\{\w+:\?", value), f"{name}: {variable}"


def test_settings_of_the_scoreboard_are_known_to_it() -> None:
    known = {variable for variable, _, _ in config.describe()} | {"PGPASSWORD"}
    assert set(SERVICES["scoreboard"]["environment"]) <= known


def test_docker_waits_longer_than_the_supervisor() -> None:
    grace_s = int(SERVICES["scoreboard"]["stop_grace_period"].removesuffix("s"))
    assert grace_s > 2 * (DRAIN_GRACE_S + 2)  # the server, and then the others


def test_redis_keeps_every_update_and_forgets_no_score() -> None:
    command = SERVICES["redis"]["command"]
    options = dict(zip(command[1::2], command[2::2], strict=True))
    assert options["--appendonly"] == "yes"
    assert options["--maxmemory-policy"] == "noeviction"


def test_stores_keep_their_data_in_volumes_and_are_reached_by_containers_only() -> None:
    for name in STORES:
        assert SERVICES[name]["volumes"][0].partition(":")[0] in COMPOSE["volumes"]
        assert "ports" not in SERVICES[name]
        assert SERVICES[name]["networks"] == ["stores"]
    assert COMPOSE["networks"]["stores"]["internal"] is True


def test_monitoring_is_asked_for_and_open_to_this_machine_only() -> None:
    for name in ("prometheus", "grafana"):
        assert SERVICES[name]["profiles"] == ["monitoring"]
        assert all(port.startswith("127.0.0.1:") for port in SERVICES[name]["ports"])


def test_prometheus_asks_the_ports_that_the_image_opens() -> None:
    scraped = yaml.safe_load((ROOT / "ops/prometheus/prometheus.yml").read_text())["scrape_configs"]
    targets = {target for job in scraped for place in job["static_configs"] for target in place["targets"]}
    assert {f"scoreboard:{port}" for port in last("EXPOSE").split()} <= targets


def test_grafana_is_given_prometheus() -> None:
    (source,) = yaml.safe_load((ROOT / "ops/grafana/provisioning/datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    assert (source["uid"], source["url"]) == ("prometheus", "http://prometheus:9090")
    (provider,) = yaml.safe_load((ROOT / "ops/grafana/provisioning/dashboards/scoreboard.yml").read_text())["providers"]
    assert any(f":{provider['options']['path']}:" in volume for volume in SERVICES["grafana"]["volumes"])


# ---------------------------------------------------------------------- the health of real processes


class AllProcess(Service):
    """`scoreboard all` on a free port, with stores that are not there."""

    def __init__(self, directory: Path, brokers: str = "") -> None:
        self.port = free_port()
        self.metrics_ports = {"server": self.port, "relay": free_port(), "persister": free_port()}
        nowhere = free_port()
        settings = {
            "PORT": str(self.port),
            "RELAY_METRICS_PORT": str(self.metrics_ports["relay"]),
            "PERSISTER_METRICS_PORT": str(self.metrics_ports["persister"]),
            "REDIS_PORT": str(nowhere),
            "KAFKA_BROKERS": brokers or f"{ADDRESS}:{nowhere}",
            "DATABASE_URL": f"postgresql://{ADDRESS}:{nowhere}/scoreboard?connect_timeout=2",
        }
        self.settings = environment({"HOST": ADDRESS, **settings})
        argv = [sys.executable, "-m", "server", "all"]
        super().__init__("all", argv, self.settings, log=directory / "all.log", cwd=ROOT)

    def answers(self) -> bool:
        """Whether every part of it is well."""
        return health(self.settings) == (0, "ok\n")

    def part(self, name: str) -> int:
        """The process id of `serve`, `sync relay` or `sync persister`."""
        return next(pid for pid in self.family() if command_line(pid).endswith(f"-m server {name}"))


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode()
    except OSError:
        return ""


def page(port: int, path: str) -> str:
    """What a GET of it says; "" if nobody listens there."""
    try:
        with urllib.request.urlopen(f"http://{ADDRESS}:{port}{path}", timeout=5) as answer:
            return str(answer.read().decode())
    except urllib.error.URLError:
        return ""


def health(settings: dict[str, str], *options: str) -> tuple[int, str]:
    """What `scoreboard health` does, with `--server` the image's HEALTHCHECK: (exit status, what it says)."""
    argv = [sys.executable, "-m", "server", "health", *options]
    done = subprocess.run(argv, env=settings, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert not done.stderr
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AllProcess]:
    """`scoreboard all`, shared: each test leaves it well."""
    process = AllProcess(tmp_path_factory.mktemp("all"))
    try:
        process.start()
        yield process
    finally:
        process.kill()


def test_container_is_healthy_while_its_stores_are_away(everything: AllProcess) -> None:
    assert health(everything.settings) == (0, "ok\n")
    assert all(map(alive, map(everything.part, ("serve", "sync relay", "sync persister"))))


def test_each_part_tells_its_own_figures_while_its_stores_are_away(everything: AllProcess) -> None:
    own = {"server": "scoreboard_draining", "relay": "scoreboard_relay_events", "persister": "scoreboard_persister_lag"}
    for name, port in everything.metrics_ports.items():
        text = wait_until(lambda port=port: page(port, "/metrics"))  # type: ignore[misc]
        assert {each for each, metric in own.items() if f"\n{metric}" in text} == {name}


@pytest.mark.parametrize(("part", "name"), [("sync relay", "relay"), ("sync persister", "persister")])
def test_paused_part_of_sync_is_ill_and_leaves_the_container_well(everything: AllProcess, part: str, name: str) -> None:
    pid = everything.part(part)
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: health(everything.settings) == (1, f"{name} is paused\n"), 30)
        assert health(everything.settings, "--server") == (0, "ok\n")
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_until(lambda: health(everything.settings) == (0, "ok\n"), 30)


def test_paused_server_is_ill(everything: AllProcess) -> None:
    pid = everything.part("serve")
    os.kill(pid, signal.SIGSTOP)
    try:
        answers = [health(everything.settings, *options) for options in ((), ("--server",))]
    finally:
        os.kill(pid, signal.SIGCONT)
    for status, said in answers:
        assert status == 1
        assert "the server does not answer" in said
    wait_until(lambda: health(everything.settings) == (0, "ok\n"), 30)


def test_paused_supervisor_is_ill(everything: AllProcess) -> None:
    os.kill(everything.pid, signal.SIGSTOP)
    try:
        status, said = health(everything.settings)
    finally:
        os.kill(everything.pid, signal.SIGCONT)
    assert status == 1
    assert "the supervisor does not answer" in said


def test_killed_part_starts_again_and_its_end_is_told(everything: AllProcess) -> None:
    for part, name in (("serve", "server"), ("sync relay", "relay"), ("sync persister", "persister")):
        pid = everything.part(part)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: not alive(pid))  # type: ignore[misc]
        wait_until(lambda: health(everything.settings) == (0, "ok\n"), 30)
        assert everything.part(part) != pid
        assert f"{name} was killed by SIGKILL after" in everything.output_tail(100)


def test_second_one_on_the_same_port_is_refused(everything: AllProcess) -> None:
    argv = [sys.executable, "-m", "server", "all"]
    done = subprocess.run(argv, env=everything.settings, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"PORT: expected a free port at HOST={ADDRESS}, got {everything.port}: another process has it" in done.stderr


def test_second_one_on_the_same_port_is_refused_before_the_first_listens() -> None:
    port = free_port()
    refused = f"PORT: expected one that no other scoreboard has, got {port}"
    with contextlib.closing(Desk(ADDRESS, port)), pytest.raises(ConfigError, match=refused):
        Desk(ADDRESS, port)


def test_stop_lets_the_server_end_first(tmp_path: Path) -> None:
    kafka = MockKafka(("score-updates", "score-updates.dead-letter"))
    kafka.start()
    process = AllProcess(tmp_path, kafka.brokers)
    try:
        process.start()
        family = process.family()
        assert len(family) == 3
        assert process.stop(grace_s=60) == 0
    finally:
        process.kill()
        kafka.stop()
    assert not any(map(alive, family))
    ends = re.findall(r"(\w+) exited with status 0", process.output_tail(100))
    assert ends == ["server", "relay", "persister"]


def test_server_without_sync_is_asked_alone(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path, {"REDIS_PORT": str(free_port())})
    settings = {**environment({}), "HOST": ADDRESS, "PORT": str(server.port)}
    try:
        server.start()
        assert health(settings) == (0, "ok\n")
    finally:
        server.stop()
    status, said = health(settings)
    assert status == 1
    assert "Connection refused" in said


def test_server_is_asked_where_it_listens(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path, {"HOST": "0.0.0.0", "REDIS_PORT": str(free_port())})
    try:
        server.start()
        assert of_server("0.0.0.0", server.port) == []
    finally:
        server.stop()


def test_part_that_ends_again_and_again_is_ill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "FIRST_DELAY_S", 1000.0)  # so that it is seen between two lives
    port = free_port()
    brief = Supervisor([Child("brief", ["sh", "-c", "exit 3"])])
    brief.start()
    wait_until(lambda: brief.children[0].status == 3)
    brief.tend(0)
    with contextlib.closing(Desk(ADDRESS, port)) as desk:
        assert answered(desk, brief.complaints, port) == ["brief exited with status 3"]


def answered(desk: Desk, complaints: Callable[[], list[str]], port: int) -> list[str]:
    """What the desk answers to one who asks from another thread."""
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(of_supervisor, ADDRESS, port)

        def done() -> bool:
            desk.answer(complaints)
            return asked.done()

        wait_until(done)
        return asked.result()
