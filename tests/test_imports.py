"""Imports point one way: errors, events, keys, config, database ← … ← live, routes, rebuild ← the command line."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GROUND = {
    "errors", "events", "fences", "keys", "config", "postgres", "database", "kafka_clients", "slots", "instruments",
    "logs",
    "machine", "redis_clock", "parsers", "contradictions", "signing_keys", "listening", "restarts", "signals",
}  # fmt: skip
CORE = {
    "hub", "auth", "scores", "uws", "redis_connection", "event_feed", "batches", "pages",
    "kafka_tail", "replay", "rebuild_lock", "admission", "messages", "subscription", "web_files", "bodies", "openapi",
    "shards", "topology", "answers", "uws_native", "queries", "key_types", "outbox_age", "budget",
    "websocket_protocol",
}  # fmt: skip
UPPER = {"live", "routes", "rebuild", "metrics"}
PROCESSES = {
    "supervisor",
    "child_wrapper",
    "embedded",
    "workers",
    "health",
}  # child processes: apart from everything that serves
COMMANDS = {"__main__", "dev", "dev_screen", "dev_watch", "demo", "check"}
NEVER = {
    "hub": {"asyncio", "uws", "socketify", "redis", "hiredis", "time", "confluent_kafka", "redis_connection"},
    "fences": {"asyncio", "time", "confluent_kafka"},
    "admission": {"asyncio", "time", "uws"},
    "budget": {"asyncio", "time", "uws"},
    "messages": {"asyncio", "time", "uws"},
    "subscription": {"asyncio", "time", "uws"},
    "bodies": {"asyncio", "time", "uws"},
    "queries": {"asyncio", "time", "uws"},
    "openapi": {"asyncio", "time", "uws"},
    "replay": {"asyncio", "time", "redis_connection", "hiredis", "confluent_kafka", "kafka_tail"},
    "child_wrapper": {"server", "sync"},
    "restarts": {"server", "sync"},
    "signals": {"server", "sync"},
    "postgres": {"server", "sync"},
    "errors": {"server", "sync"},
    "keys": {"server", "sync"},
    "parsers": {"config", "sync", "os", "pathlib", "socket", "time"},
    "slots": {"asyncio", "time", "hiredis", "redis"},
}


def imported(path: Path) -> set[str]:
    """Dotted names that a module imports anywhere in it: `from server.keys import Keys` is `server.keys.Keys`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: expected absolute imports"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def siblings(path: Path, package: str) -> set[str]:
    """Modules of `package` that a module imports."""
    return {name.split(".")[1] for name in imported(path) if name.startswith(f"{package}.")}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).glob("*.py"))


@pytest.mark.parametrize("path", modules("server"), ids=lambda path: path.stem)
def test_server_imports_point_one_way(path: Path) -> None:
    name = path.stem
    known = GROUND | CORE | UPPER | PROCESSES | COMMANDS | {"__init__"}
    assert name in known, f"a new module: say in this test where server/{name}.py stands"
    allowed = known if name in COMMANDS else GROUND
    if name in CORE:
        allowed = GROUND | CORE
    elif name in UPPER:
        allowed = GROUND | CORE | ({"live"} if name in ("routes", "metrics") else set())
    elif name in PROCESSES:
        allowed = GROUND | PROCESSES
    assert siblings(path, "server") <= allowed
    if name not in COMMANDS:
        assert not siblings(path, "sync")


@pytest.mark.parametrize("path", modules("sync"), ids=lambda path: path.stem)
def test_sync_stands_on_the_ground_of_server(path: Path) -> None:
    assert siblings(path, "server") <= GROUND | ({"supervisor"} if path.stem == "__main__" else set())


@pytest.mark.parametrize("name", NEVER)
def test_pure_modules_stay_pure(name: str) -> None:
    parts = {part for each in imported(ROOT / f"server/{name}.py") for part in each.split(".")}
    assert not parts & NEVER[name]


def test_only_one_module_touches_uwebsockets() -> None:
    touching = [path.stem for path in modules("server") + modules("sync") if "socketify" in str(imported(path))]
    assert touching == ["uws"]


def test_parameters_of_database_connections_are_made_in_one_place() -> None:
    others = [
        path.stem
        for path in modules("server") + modules("sync")
        if re.search(r"psycopg\.(\w+\.)?connect\(", path.read_text())
    ]
    assert others == []
