"""What the three processes tell Prometheus: right names, right figures, and all that alerts and dashboard ask for."""

from __future__ import annotations

import itertools
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest
import yaml
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from websockets.sync.client import connect as watch

from server.config import Settings, load
from server.embedded import ADDRESS, PostgresServer, RedisServer, Service, free_port
from server.errors import ProblemType
from sync.metrics import RelayMetrics
from sync.relay import Relays
from sync.waiting import Stop
from tests.client import board, can_write, get, post, post_body
from tests.services import ROOT, KafkaBroker, ServerProcess, SyncProcess, environment, wait_until
from tests.sync_parts import event, put_records
from tests.test_operate import anchors

pytestmark = [pytest.mark.redis, pytest.mark.postgres, pytest.mark.kafka]

ALERTS: Final[list[dict[str, Any]]] = [
    rule
    for group in yaml.safe_load((ROOT / "ops/prometheus/alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
DASHBOARD: Final[dict[str, Any]] = json.loads((ROOT / "ops/grafana/dashboards/scoreboard.json").read_text())
PANELS: Final = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS: Final = {
    **{rule["alert"]: rule["expr"] for rule in ALERTS},
    **{f"{panel['title']} {at['refId']}": at["expr"] for panel in PANELS for at in panel["targets"]},
}
JOBS: Final = ("scoreboard-server", "scoreboard-relay", "scoreboard-persister")
ACCEPTED: Final = 30


def told(port: int) -> str:
    """What Prometheus would get there; "" while nobody listens."""
    try:
        with urllib.request.urlopen(f"http://{ADDRESS}:{port}/metrics", timeout=10) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=")
            return str(answer.read().decode())
    except urllib.error.URLError:
        return ""


class Scoreboard:
    """Server, relay and persister, each with a port for its figures."""

    def __init__(self, directory: Path, settings: dict[str, str], redis: RedisServer, kafka: KafkaBroker) -> None:
        self.ports = {"relay": free_port(), "persister": free_port()}
        ports = {f"{part.upper()}_METRICS_PORT": str(port) for part, port in self.ports.items()}
        self.variables = {**settings, **ports}
        self.redis, self.kafka = redis, kafka
        self.server = ServerProcess(directory, self.variables)
        self.sync = SyncProcess(directory, self.variables)
        self.ports["server"] = self.server.port

    @property
    def settings(self) -> Settings:
        return load(environment(self.variables))

    def scrape(self, part: str) -> str:
        return told(self.ports[part])

    def figure(self, name: str, **labels: str) -> float:
        """A value, of the process that its name tells."""
        part = next((part for part in ("relay", "persister") if f"_{part}_" in name), "server")
        found = [
            sample.value
            for family in text_string_to_metric_families(self.scrape(part))
            for sample in family.samples
            if sample.name == name and sample.labels == labels
        ]
        assert len(found) == 1, f"expected one {name}{labels}, got {found}"
        return float(found[0])

    def settled(self) -> bool:
        """Whether everything that was accepted has arrived everywhere."""
        return not any(
            self.figure(name)
            for name in (
                "scoreboard_relay_lag_seconds",
                "scoreboard_relay_outbox_entries",
                "scoreboard_persister_lag_seconds",
                "scoreboard_persister_lag_events",
            )
        )


@pytest.fixture(scope="module")
def scoreboard(
    tmp_path_factory: pytest.TempPathFactory, postgres_server: PostgresServer, kafka_broker: KafkaBroker
) -> Iterator[Scoreboard]:
    """One for all tests, each of which leaves it settled."""
    directory = tmp_path_factory.mktemp("metrics")
    name = f"metrics_{free_port()}"  # when tests run in parallel, one process may come to this module twice
    redis = RedisServer(directory / "redis")
    with psycopg.connect(postgres_server.url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    settings = {
        "REDIS_HOST": redis.host,
        "REDIS_PORT": str(redis.port),
        "KAFKA_BROKERS": kafka_broker.brokers,
        "KAFKA_TOPIC": f"score-updates-{name}",
        "KAFKA_PARTITIONS": "3",
        "HISTORY_DAYS": "0",
        "DATABASE_URL": postgres_server.url_of(name),
    }
    scoreboard = Scoreboard(directory, settings, redis, kafka_broker)
    started: list[Service] = [redis, scoreboard.sync, scoreboard.server]
    try:
        for service in started:
            service.start()
        ready = {"write", "live"}
        wait_until(lambda: all(get(scoreboard.server, "/readyz").json()[it]["ok"] for it in ready), 40, "not ready")
        wait_until(scoreboard.settled, 40, "there is a lag before there are events")
        yield scoreboard
    finally:
        for service in reversed(started):
            service.stop()


@pytest.fixture(scope="module")
def families(scoreboard: Scoreboard) -> dict[str, list[Metric]]:
    """What each process tells after some traffic: 30 updates accepted, others refused, a board read, one watched."""
    server = scoreboard.server
    with watch(f"ws://{ADDRESS}:{server.port}/live-updates") as watcher:
        watcher.recv(timeout=10)
        for number in range(ACCEPTED):
            assert post(server, f"player{number % 10}", 5).status == 200
        watcher.recv(timeout=10)
    assert post_body(server, b"{}").status == 401
    assert post(server, "ann", board="none").status == 404
    assert post(server, "ann", subject="bob").status == 403
    assert len(board(server)) == 10
    wait_until(lambda: scoreboard.figure("scoreboard_persister_events_total") == ACCEPTED and scoreboard.settled(), 30)
    wait_until(lambda: scoreboard.figure("scoreboard_live_changes_total") > 0, 30, "no event reached the live pages")
    wait_until(lambda: scoreboard.figure("scoreboard_feed_delay_seconds_count") > 0, 5, "no delay was measured")
    return {part: list(text_string_to_metric_families(scoreboard.scrape(part))) for part in scoreboard.ports}


# ---------------------------------------------------------------------- names, as promtool's `check metrics` has them

OURS: Final = "scoreboard_"
NOT_BASE_UNITS: Final = {
    "milliseconds", "microseconds", "nanoseconds", "minutes", "hours", "days", "weeks", "percent", "kilobytes",
    "megabytes", "gigabytes", "bits", "kilobits", "fahrenheit", "kelvin", "grams", "kilometers",
}  # fmt: skip
ABBREVIATED_UNITS: Final = {"s", "ms", "us", "ns", "sec", "m", "min", "h", "hr", "d", "b", "kb", "mb", "gb", "tb"}


@pytest.mark.parametrize("part", ["server", "relay", "persister"])
def test_names_follow_the_conventions_of_prometheus(families: dict[str, list[Metric]], part: str) -> None:
    for family in families[part]:
        name, words = family.name, family.name.split("_")
        assert family.documentation, f"{name} has no help"
        assert re.fullmatch(r"[a-z][a-z0-9_]*", name), "no colons, no camelCase"
        assert not {"gauge", "counter", "histogram", "summary"} & set(words), f"{name} says its type"
        assert not NOT_BASE_UNITS & set(words), f"{name} is not in base units"
        assert not ABBREVIATED_UNITS & set(words), f"{name} abbreviates its unit"
        samples = {sample.name for sample in family.samples}
        if family.type == "counter":
            assert {each for each in samples if not each.endswith("_created")} <= {f"{name}_total"}
        elif family.type == "histogram":
            assert samples <= {f"{name}_bucket", f"{name}_count", f"{name}_sum"}
        else:
            assert samples <= {name}
            assert not re.search("_(total|count|sum|bucket)$", name), f"{name} looks like another type"


@pytest.mark.parametrize("part", ["server", "relay", "persister"])
def test_every_metric_has_one_type_and_help_and_says_what_it_is(families: dict[str, list[Metric]], part: str) -> None:
    names = [family.name for family in families[part]]
    assert len(names) == len(set(names))
    for family in families[part]:
        assert family.type in ("counter", "gauge", "histogram"), family.name
        assert not family.name.startswith(OURS) or family.documentation.endswith("."), family.name
    assert {"process_open_fds", "process_max_fds", "process_resident_memory_bytes", f"{OURS}build_info"} <= set(names)


@pytest.mark.parametrize("part", ["server", "relay", "persister"])
def test_buckets_rise_to_the_count(families: dict[str, list[Metric]], part: str) -> None:
    for family in families[part]:
        if family.type != "histogram":
            continue
        by_labels: dict[tuple[tuple[str, str], ...], list[tuple[float, float]]] = {}
        counts = {}
        for sample in family.samples:
            labels = tuple(sorted((name, value) for name, value in sample.labels.items() if name != "le"))
            if sample.name.endswith("_bucket"):
                by_labels.setdefault(labels, []).append((float(sample.labels["le"]), sample.value))
            elif sample.name.endswith("_count"):
                counts[labels] = sample.value
        assert by_labels
        assert by_labels.keys() == counts.keys(), family.name
        for labels, buckets in by_labels.items():
            assert buckets == sorted(buckets), family.name
            assert buckets[-1] == (float("inf"), counts[labels]), family.name


def test_labels_take_no_value_that_a_client_makes_up(scoreboard: Scoreboard, families: dict[str, list[Metric]]) -> None:
    server = scoreboard.server
    for number in range(20):
        get(server, f"/{number}/nowhere?limit={number}")
        post(server, f"made-up-{number}", board=f"made-up-{number}")
    now = text_string_to_metric_families(scoreboard.scrape("server"))
    ours = [sample for family in now if family.name.startswith(OURS) for sample in family.samples]
    assert {name for sample in ours for name in sample.labels} <= {"route", "status", "kind", "le", "version"}
    assert {sample.labels["kind"] for sample in ours if "kind" in sample.labels} <= set(ProblemType)
    assert all(re.fullmatch(r"\d{3}", sample.labels["status"]) for sample in ours if "status" in sample.labels)
    routes = {sample.labels["route"] for sample in ours if "route" in sample.labels}
    before = {it.labels["route"] for family in families["server"] for it in family.samples if "route" in it.labels}
    assert routes == before
    assert not any("nowhere" in route for route in routes)


# ---------------------------------------------------------------------- alerts and dashboard

NOT_METRICS: Final = {"and", "or", "unless", "by", "without", "on", "ignoring", "bool", "offset"}


def selectors(expression: str) -> list[tuple[str, str]]:
    """(metric, what is between its braces) of each selector in a PromQL expression."""
    bare = re.sub(r"\[[^]]*\]", "", expression)
    bare = re.sub(r"\b(by|without|on|ignoring)\s*\([^)]*\)", " ", bare)
    found = re.findall(r"(?<!\w)([a-zA-Z_:][\w:]*)\s*(\(|\{[^}]*\})?", bare)
    return [(name, behind.strip("{}")) for name, behind in found if behind != "(" and name not in NOT_METRICS]


def test_selectors_are_found() -> None:
    expression = 'histogram_quantile(0.9, sum by (le, x) (rate(a_bucket{b="c (d)",e=~"5.."}[5m]))) > 1e3 and f / max(g)'
    assert selectors(expression) == [("a_bucket", 'b="c (d)",e=~"5.."'), ("f", ""), ("g", "")]


@pytest.mark.parametrize("where", EXPRESSIONS)
def test_what_an_expression_asks_for_is_told(families: dict[str, list[Metric]], where: str) -> None:
    told_by: dict[str, list[dict[str, str]]] = {"up": [{"job": job, "instance": "here"} for job in JOBS]}
    for part, of_part in families.items():
        for family in of_part:
            for sample in family.samples:
                labels = {**sample.labels, "job": f"scoreboard-{part}", "instance": "here"}
                told_by.setdefault(sample.name, []).append(labels)
    found = selectors(EXPRESSIONS[where])
    assert found
    for metric, matchers in found:
        assert metric in told_by, f"nobody tells {metric}"
        for label, operator, value in re.findall(r'(\w+)(=~|=)"([^"]*)"', matchers):
            values = {labels.get(label) for labels in told_by[metric]}
            assert None not in values, f"{metric} has no label {label}"
            pattern = value if operator == "=~" else re.escape(value)
            if label != "status":  # a 5xx has not happened
                assert any(re.fullmatch(pattern, str(each)) for each in values), f"{metric} has no {label} {value}"


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: str(rule["alert"]))
def test_alert_says_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning")
    notes = rule["annotations"]
    assert set(notes) == {"summary", "description", "runbook"}
    assert re.fullmatch(r"\d+m", rule.get("for", "0m"))
    assert notes["runbook"] == f"docs/operate.md#{rule['alert'].lower()}"


def test_every_alert_has_its_section_and_every_section_its_alert() -> None:
    section = (ROOT / "docs/operate.md").read_text().partition("\n## Alerts\n")[2].partition("\n## ")[0]
    headings = [heading for heading in section.splitlines() if heading.startswith("### ")]
    assert headings == [f"### {rule['alert']}" for rule in ALERTS]
    assert {rule["annotations"]["runbook"].partition("#")[2] for rule in ALERTS} == anchors(section)
    for rule, text in zip(ALERTS, section.split("\n### ")[1:], strict=True):
        assert text.splitlines()[2].lower().startswith(rule["labels"]["severity"] + "."), rule["alert"]


def test_jobs_are_those_that_prometheus_scrapes() -> None:
    scraped = yaml.safe_load((ROOT / "ops/prometheus/prometheus.yml").read_text())["scrape_configs"]
    assert set(JOBS) <= {job["job_name"] for job in scraped}


def test_panels_ask_the_source_that_grafana_is_given_and_overlap_nowhere() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        taken = set(itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])))
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in taken) < 24, panel["title"]
        cells |= taken
    for panel in PANELS:
        assert {it["datasource"]["uid"] for it in [panel, *panel["targets"]]} == {"prometheus"}
        assert panel["fieldConfig"]["defaults"]["unit"]


# ---------------------------------------------------------------------- figures


def test_figures_are_those_of_what_was_sent(families: dict[str, list[Metric]], scoreboard: Scoreboard) -> None:
    def before(name: str, **labels: str) -> float:
        all_of_them = [sample for of_part in families.values() for family in of_part for sample in family.samples]
        return sum(sample.value for sample in all_of_them if sample.name == name and sample.labels == labels)

    for name in ("scoreboard_relay_events_total", "scoreboard_persister_events_total", "scoreboard_batch_updates_sum"):
        assert before(name) == ACCEPTED, name
    assert before("scoreboard_persister_batch_events_sum") == ACCEPTED
    assert before("scoreboard_persister_batch_events_count") == before("scoreboard_persister_batch_seconds_count") > 0
    for status, count in (("200", ACCEPTED), ("401", 1), ("403", 1), ("404", 1)):
        assert before("scoreboard_http_requests_total", route="/update-score", status=status) == count
    assert before("scoreboard_http_problems_total", route="/update-score", kind="forbidden") == 1
    assert before("scoreboard_http_request_duration_seconds_count", route="/leaderboard") == 1
    assert before("scoreboard_feed_delay_seconds_count") > 0
    for part in ("relay_dead_letters", "relay_turns_lost", "persister_dead_letters", "persister_void_events"):
        assert before(f"scoreboard_{part}_total") == 0
    assert before("scoreboard_persister_chain_breaks_total") == 0
    assert before("scoreboard_relay_lease_held") == before("scoreboard_relay_outboxes") == 1
    for up in ("redis_ready", "write_ready", "live_ready", "relay_redis_up", "relay_kafka_up", "persister_database_up"):
        assert before(f"scoreboard_{up}") == 1, up


def test_what_is_missing_between_events_and_what_is_none_is_counted(scoreboard: Scoreboard) -> None:
    names = ("chain_breaks", "dead_letters", "events")
    before = [scoreboard.figure(f"scoreboard_persister_{name}_total") for name in names]
    whole = [event("chained", 1000 + i, delta=2, score=2 * i) for i in range(1, 9)]
    put_records(scoreboard.settings, [*whole[:3], *whole[1:4], b"no event", *whole[6:], *whole[6:]])

    def counted() -> list[float]:
        now = [scoreboard.figure(f"scoreboard_persister_{name}_total") for name in names]
        return [after - then for after, then in zip(now, before, strict=True)]

    wait_until(lambda: counted() == [1, 1, 6], 20, f"expected 1 break, 1 letter, 6 events; at first: {counted()}")
    wait_until(scoreboard.settled, 20)


def grows(read: Callable[[], float], above: float) -> bool:
    """Whether a figure goes above a limit and then further."""
    first = wait_until(lambda: value if (value := read()) > above else 0.0, 20, "the lag does not grow")
    wait_until(lambda: read() > first, 5, "the lag stands still")
    return True


def test_relay_lag_grows_while_kafka_is_away_and_is_gone_afterwards(scoreboard: Scoreboard) -> None:
    scoreboard.kafka.pause()
    try:
        assert post(scoreboard.server, "ann", 5).status == 200
        assert grows(lambda: scoreboard.figure("scoreboard_relay_lag_seconds"), 0.5)
        assert grows(lambda: scoreboard.figure("scoreboard_outbox_oldest_age_seconds"), 0.5)
        wait_until(lambda: scoreboard.figure("scoreboard_relay_outbox_entries") == 1)
        assert scoreboard.figure("scoreboard_outbox_used_ratio") > 0
    finally:
        scoreboard.kafka.resume()
    wait_until(scoreboard.settled, 30, "the lag stays")
    wait_until(lambda: scoreboard.figure("scoreboard_outbox_oldest_age_seconds") == 0)


def test_relay_lag_goes_on_growing_while_redis_is_away_too(scoreboard: Scoreboard) -> None:
    scoreboard.kafka.pause()
    try:
        assert post(scoreboard.server, "ann", 5).status == 200
        wait_until(lambda: scoreboard.figure("scoreboard_relay_lag_seconds") > 0)
        scoreboard.redis.pause()
        try:
            wait_until(lambda: not scoreboard.figure("scoreboard_relay_redis_up"), 20, "Redis is not missed")
            assert scoreboard.figure("scoreboard_relay_lease_held") == 0
            assert grows(lambda: scoreboard.figure("scoreboard_relay_lag_seconds"), 2.0)
        finally:
            scoreboard.redis.resume()
    finally:
        scoreboard.kafka.resume()
    wait_until(scoreboard.settled, 30, "the lag stays")
    wait_until(lambda: scoreboard.figure("scoreboard_relay_redis_up"))
    wait_until(lambda: scoreboard.figure("scoreboard_relay_lease_held") == 1)
    wait_until(lambda: can_write(scoreboard.server), 20)


def test_persister_lag_grows_while_the_database_is_away_and_is_gone_afterwards(
    scoreboard: Scoreboard, postgres_server: PostgresServer
) -> None:
    before = scoreboard.figure("scoreboard_persister_outages_total")
    database = scoreboard.settings.database_url.rpartition("/")[2]
    with psycopg.connect(postgres_server.url, autocommit=True) as admin:
        admin.execute(f"ALTER DATABASE {database} ALLOW_CONNECTIONS false")
        try:
            admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [database])
            for _ in range(3):
                assert post(scoreboard.server, "ann", 5).status == 200
            assert grows(lambda: scoreboard.figure("scoreboard_persister_lag_seconds"), 0.5)
            wait_until(lambda: scoreboard.figure("scoreboard_persister_lag_events") > 0)
            assert scoreboard.figure("scoreboard_persister_database_up") == 0
        finally:
            admin.execute(f"ALTER DATABASE {database} ALLOW_CONNECTIONS true")
    wait_until(scoreboard.settled, 30, "the lag stays")
    assert scoreboard.figure("scoreboard_persister_database_up") == 1
    assert scoreboard.figure("scoreboard_persister_outages_total") == before + 1
    assert scoreboard.figure("scoreboard_persister_chain_breaks_total") <= 1  # that of the test above


def test_relay_that_waits_tells_of_nothing_that_is_not_its_own(scoreboard: Scoreboard, tmp_path: Path) -> None:
    port = free_port()
    other = SyncProcess(tmp_path, {**scoreboard.variables, "RELAY_METRICS_PORT": str(port)}, "relay")
    other.start()
    try:
        wait_until(lambda: "another relay has the lease" in other.output_tail(), 20)
        families = text_string_to_metric_families(told(port))
        values = {sample.name: sample.value for family in families for sample in family.samples}
        for name in ("relay_lease_held", "relay_outbox_entries", "relay_lag_seconds", "relay_events_total"):
            assert values[f"scoreboard_{name}"] == 0, name
    finally:
        other.stop()


def test_persister_that_starts_without_its_database_has_a_lag_that_grows(
    scoreboard: Scoreboard, tmp_path: Path
) -> None:
    port = free_port()
    nowhere = f"postgresql://{ADDRESS}:{free_port()}/none"
    variables = {**scoreboard.variables, "DATABASE_URL": nowhere, "PERSISTER_METRICS_PORT": str(port)}
    other = SyncProcess(tmp_path, variables, "persister")

    def figure(name: str) -> float:
        (value,) = re.findall(rf"^scoreboard_persister_{name} (\S+)$", told(port), re.MULTILINE) or ["1"]
        return float(value)

    other.start()
    try:
        wait_until(lambda: figure("database_up") == 0, 20, "the database is not missed")
        assert grows(lambda: figure("lag_seconds"), 1.5)
    finally:
        other.stop()


def test_relay_of_a_redis_cluster_tells_the_sum_of_its_outboxes_and_the_worst_lag() -> None:
    relays = Relays(Settings(redis_cluster=1, boards=("main", "weekly", "daily")), Stop())
    first, *others = relays.all
    assert others
    for relay in others:
        relay.holds_lease, relay.outbox_entries, relay.relayed_events = True, 3, 10
    first.oldest_entry, others[0].oldest_entry = f"{int(time.time() * 1000) - 60_000}-0", "1000-5"
    first.kafka_outage.failed("gone")
    values = {sample.name: sample.value for each in RelayMetrics(relays).collect() for sample in each.samples}
    assert values["scoreboard_relay_outboxes"] == len(relays.all)
    assert values["scoreboard_relay_lease_held"] == len(others)
    assert values["scoreboard_relay_outbox_entries"] == 3 * len(others)
    assert values["scoreboard_relay_events_total"] == 10 * len(others)
    assert values["scoreboard_relay_lag_seconds"] > 1_000_000_000
    assert (values["scoreboard_relay_kafka_up"], values["scoreboard_relay_redis_up"]) == (0, 1)


@pytest.mark.parametrize("part", ["relay", "persister"])
def test_port_that_is_taken_is_said_with_its_variable(scoreboard: Scoreboard, tmp_path: Path, part: str) -> None:
    second = SyncProcess(tmp_path, scoreboard.variables, part)
    second.start()
    try:
        wait_until(lambda: not second.running, 20, "it runs without telling anything")
    finally:
        second.kill()
    assert second.status == 2
    assert f"{part.upper()}_METRICS_PORT: expected a free port" in second.output_tail()
