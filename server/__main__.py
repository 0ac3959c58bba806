"""The command line, and the wiring of the server; nothing else.

scoreboard serve       the server
scoreboard sync        relay and persister; `sync relay` or `sync persister` for one of them
scoreboard all         both of them: what the container runs
scoreboard check       look at the configuration and every connection, and say what to do; changes nothing
scoreboard health      ask how the processes of `all` (or `serve`) are; --server: as the container's health check does
scoreboard migrate     create the Kafka topics and the database schema
scoreboard reconcile   compare Redis with the database; --repair puts the database right
scoreboard dead-letters   list the records that could not be stored; --replay sends them once more
scoreboard token       print a token, or many for a load test
scoreboard dev         everything on this machine, with embedded services
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import resource
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from server import config, listening, logs
from server.errors import ConfigError, ScoreboardError, UwsError

if TYPE_CHECKING:
    from server.database import Database
    from server.keys import BoardsKeys
    from server.routes import Routes
    from server.scores import Scores
    from server.shards import Shards

DRAIN_GRACE_S: Final = 10.0
WEBSOCKET_PATH: Final = "/live-updates"
DATABASE_AT_LEAST_S: Final = 0.25
"""How long a reader waits for the database when Redis is away, however short REQUEST_DEADLINE_MS is."""


def serve(argv: list[str]) -> int:
    """Run the server until SIGTERM; with WORKERS above 1, so many of them."""
    parser = argparse.ArgumentParser(prog="scoreboard serve", description="Run the server.")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # server/workers.py starts those
    is_worker = parser.parse_args(argv).worker
    settings = _load()
    if is_worker or settings.workers == 1:
        _raise_file_limit(settings.live_max_connections)
        from server import uws  # must be the first to open libuv; only this command needs it

        uws.run(_serve(settings, shared_port=is_worker))
    from server.auth import Authenticator
    from server.workers import run

    Authenticator(settings)  # said once here, rather than by workers that start again and again
    return run(settings, DRAIN_GRACE_S + 2)


async def _serve(settings: config.Settings, *, shared_port: bool) -> int:
    from server import uws
    from server.auth import Authenticator
    from server.database import Database
    from server.instruments import Metrics
    from server.live import IDLE_TIMEOUT_S, MAX_FLUSH_BYTES, Live
    from server.metrics import ServerMetrics
    from server.routes import Routes
    from server.subscription import MAX_MESSAGE_BYTES

    # A reader gives Redis half of its time, and the database the other, which must do for a new connection to it.
    database = Database(settings.database_url, max(DATABASE_AT_LEAST_S, settings.request_deadline_ms / 2000 - 0.05))
    try:
        authenticator = Authenticator(settings)
        routes = Routes(settings, authenticator, database)
    except ConfigError as error:
        _say(error)
        return 2
    keys, scores = _scores(settings, database, routes)
    live = Live(settings, keys, scores, authenticator)
    server = uws.Server(request_timeout_s=settings.request_deadline_ms / 1000 + 3)
    metrics = Metrics(ServerMetrics(server, scores, live))
    routes.register(server, scores, live, metrics)
    server.websocket(
        WEBSOCKET_PATH,
        live,
        max_message_bytes=MAX_MESSAGE_BYTES,
        max_backpressure_bytes=settings.live_high_water_bytes + MAX_FLUSH_BYTES,
        idle_timeout_s=IDLE_TIMEOUT_S,
    )
    try:
        if settings.metrics_port:
            metrics.serve(settings.metrics_host, settings.metrics_port, "METRICS_PORT")
        port = server.listen(settings.host, settings.port, shared=shared_port)
    except ScoreboardError as error:
        _say(error)
        return 2
    logging.getLogger(__name__).info("listening on %s:%d", settings.host, port)
    await database.open()
    live.start(server.publish)
    connecting = asyncio.create_task(scores.run())
    received = await uws.stop_signal()
    logging.getLogger(__name__).info("stopping on %s", received.name)
    await server.drain(DRAIN_GRACE_S, live.goodbye(), settings.drain_delay_ms / 1000)
    live.stop()
    connecting.cancel()
    await database.close()
    return 0


def _scores(settings: config.Settings, database: Database, routes: Routes) -> tuple[BoardsKeys, Scores | Shards]:
    """The way to Redis, or to each master of a Redis Cluster that has one of the boards."""
    from server.instruments import RedisFigures
    from server.keys import Keys, TaggedKeys
    from server.rebuild import Verifier
    from server.scores import Locate, Scores
    from server.shards import Shards
    from server.topology import Topology

    figures = RedisFigures()

    def one(keys: Keys, locate: Locate | None = None) -> Scores:
        return Scores(
            settings,
            keys,
            Verifier(settings, keys, database, figures=figures).verify,
            on_outcomes=routes.on_outcomes,
            on_problem=routes.on_problem,
            on_page=routes.on_page,
            locate=locate,
            figures=figures,
        )

    if not settings.redis_cluster:
        keys = Keys(settings.redis_key_prefix)
        return keys, one(keys)
    tagged, topology = TaggedKeys(settings.redis_key_prefix, settings.boards), Topology(settings)
    by_tag = {tag: one(keys, partial(topology.master_of, keys.slot)) for tag, keys in tagged.by_tag.items()}
    return tagged, Shards(by_tag, settings.boards)


def _load() -> config.Settings:
    settings = config.load()
    logs.configure(settings.log_format, settings.log_level)
    return settings


def token(argv: list[str]) -> int:
    """Print tokens signed with JWT_SECRET."""
    from server.auth import MAX_TTL_S, token_for

    parser = argparse.ArgumentParser(prog="scoreboard token", description="Print tokens signed with JWT_SECRET.")
    parser.add_argument("--sub", required=True, help="the player the token speaks for")
    parser.add_argument("--scope", default="", help="scores:write lets it write every player")
    parser.add_argument("--ttl", type=int, default=3600, metavar="SECONDS", help="how long it is valid (3600)")
    parser.add_argument("--count", type=int, metavar="N", help="print N tokens, for SUB1, SUB2, … SUBN")
    arguments = parser.parse_args(argv)
    if arguments.ttl < 1 or arguments.ttl > MAX_TTL_S:
        parser.error(f"--ttl: expected 1 to {MAX_TTL_S} seconds, got {arguments.ttl}")
    if arguments.count is not None and arguments.count < 1:
        parser.error(f"--count: expected at least 1, got {arguments.count}")
    settings = _load()
    subjects = [arguments.sub]
    if arguments.count is not None:
        subjects = [f"{arguments.sub}{number}" for number in range(1, arguments.count + 1)]
    try:
        tokens = [token_for(settings, subject, ttl_s=arguments.ttl, scope=arguments.scope) for subject in subjects]
    except ValueError as error:
        parser.error(f"{error}, got --sub {arguments.sub[:80]!r}")
    sys.stdout.writelines(f"{token}\n" for token in tokens)
    return 0


def sync(argv: list[str]) -> int:
    """Run the relay and the persister."""
    from sync.__main__ import main as run

    return run(argv)


def run_all(argv: list[str]) -> int:
    """Run server, relay and persister until SIGTERM; each that ends is started again, the server not for ever."""
    from server.auth import Authenticator
    from server.health import Desk
    from server.supervisor import Child, Supervisor

    argparse.ArgumentParser(prog="scoreboard all", description="Run server and sync.").parse_args(argv)
    settings = _load()
    # Said once here, rather than by children that start again and again.
    Authenticator(settings)
    listening.check(settings.host, settings.port)
    commands = {"server": ["serve"], "relay": ["sync", "relay"], "persister": ["sync", "persister"]}
    # In the order in which changes move: the server drains while the others still take what it accepted.
    children = [Child(name, [sys.executable, "-m", "server", *command]) for name, command in commands.items()]
    supervisor = Supervisor(children, vital=children[:1])
    grace_s = DRAIN_GRACE_S + 2 + settings.drain_delay_ms / 1000
    if settings.workers > 1:
        grace_s += 2  # their parent gives them as long, and then has to end
    with contextlib.closing(Desk(settings.host, settings.port)) as desk:
        return supervisor.run(grace_s, lambda: desk.answer(supervisor.complaints))


def health(argv: list[str]) -> int:
    """Ask how the processes are."""
    from server.health import health as run

    return run(argv)


def check(argv: list[str]) -> int:
    """Look at configuration and connections."""
    from server.check import main as run

    return run(argv)


def migrate(argv: list[str]) -> int:
    """Create topics and schema."""
    from sync.__main__ import migrate as run

    return run(argv)


def reconcile(argv: list[str]) -> int:
    """Compare Redis with the database."""
    from sync.__main__ import reconcile as run

    return run(argv)


def dead_letters(argv: list[str]) -> int:
    """List or replay what could not be stored."""
    from sync.__main__ import list_dead_letters as run

    return run(argv)


def dev(argv: list[str]) -> int:
    """Run everything on this machine."""
    from server.dev import dev as run

    return run(argv)


COMMANDS: Final[dict[str, Callable[[list[str]], int]]] = {
    "serve": serve,
    "sync": sync,
    "all": run_all,
    "check": check,
    "health": health,
    "migrate": migrate,
    "reconcile": reconcile,
    "dead-letters": dead_letters,
    "token": token,
    "dev": dev,
}


def _raise_file_limit(connections: int) -> None:
    """Let the process open as many files as the system allows it, and say how many that are."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    log = logging.getLogger(__name__)
    log.info("up to %d files may be open", most)
    if connections and most < connections + config.OTHER_FILES:
        log.warning("too few for LIVE_MAX_CONNECTIONS=%d: raise the limit (ulimit -n) or lower that", connections)


def _say(error: Exception) -> None:
    sys.stderr.write(f"scoreboard: {error}\n")


def main() -> int:
    """Run one command; 2 when it was used wrongly or the environment is wrong."""
    usage = (__doc__ or "").partition("\n\n")[2]
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.stderr.write(f"usage:\n{usage}")
        return 0 if sys.argv[1:2] in (["-h"], ["--help"]) else 2
    logs.configure()
    try:
        return COMMANDS[sys.argv[1]](sys.argv[2:])
    except (ConfigError, UwsError) as error:
        _say(error)
        return 2


if __name__ == "__main__":
    sys.exit(main())
