"""`scoreboard dev`: everything on this machine, one screen that says what runs where, and one Ctrl-C that ends it.

Whatever the environment does not name is embedded (server/embedded.py), with its data in a directory that the next
start takes up again. Knows the processes of the scoreboard by their command lines and by what can be asked from outside.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import http.client
import json
import logging
import os
import secrets
import shlex
import signal
import socket
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TextIO

import confluent_kafka
import jwt
import psycopg
import redis

from server import config
from server.config import Settings
from server.demo import DemoPlayers
from server.embedded import MockKafka, PostgresServer, RedisServer, Service, ServiceError, free_port
from server.errors import ConfigError, ScoreboardError
from server.keys import Keys
from server.supervisor import Child, Supervisor, alive, ended

DEMO_PLAYER: Final = "player123"
TOKEN_DAYS: Final = 30
READY_WITHIN_S: Final = 60.0
DRAIN_WITHIN_S: Final = 8.0
LOCK_WITHIN_S: Final = 10.0
"""How long the stores of a `dev` that was killed may take to close their data."""


class DevError(ScoreboardError):
    """Why `dev` cannot start or go on, in a sentence."""


class _Impatient(BaseException):
    """The second Ctrl-C."""


def dev(argv: list[str]) -> int:
    """Run everything until SIGINT or SIGTERM; 1 when something could not be started."""
    parser = argparse.ArgumentParser(prog="scoreboard dev", description="Run everything on this machine.")
    parser.add_argument("--no-demo", action="store_true", help="no demo players")
    parser.add_argument("--data", type=Path, default=Path(".scoreboard"), metavar="DIR", help="default: .scoreboard")
    parser.add_argument("--port", type=int, metavar="PORT", help="instead of the variable PORT")
    arguments = parser.parse_args(argv)
    if arguments.port is not None:
        os.environ["PORT"] = str(arguments.port)
    settings = config.load()
    stop_signals = _StopSignals()
    try:
        with _lock(arguments.data) as lock, contextlib.ExitStack() as at_exit:
            stack = _Stack(settings, arguments.data, lock, at_exit, stop_signals)
            stack.start()
            stack.show(demo=not arguments.no_demo)
            stack.tend()
            stack.stop()
    except (DevError, ServiceError) as error:
        sys.stderr.write(f"scoreboard dev: {error}\n")
        return 1
    except _Impatient:
        _say("Stopped at once; what was on its way to the database is lost with the in-memory broker.")
        return 130
    return 0


class _StopSignals:
    """The first SIGINT, SIGTERM or SIGHUP asks for an orderly stop, the second for one at once."""

    def __init__(self) -> None:
        self.came = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)

    def _on_signal(self, *_: object) -> None:
        if not self.came:
            self.came = True
            return
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # the end is under way
        raise _Impatient


class _Stopped(DevError):
    """A stop was asked for before everything was up."""
