"""Databases as they are in the world: of other encodings and orders, and with the tables of earlier versions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg

from server.embedded import PostgresServer
from sync import store

_numbers = itertools.count(1)


@contextmanager
def database_of(server: PostgresServer, encoding: str) -> Iterator[str]:
    """The URL of an empty database with this encoding; it is gone afterwards."""
    name = f"test_{encoding.lower()}_{next(_numbers)}"
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute(
            f"CREATE DATABASE {name} ENCODING '{encoding}' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'"
        )
        try:
            yield server.url_of(name)
        finally:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def migrate_as_before(url: str) -> None:
    """Make the tables as they were before their keys had an order of their own."""
    before = store._SCHEMA.replace('COLLATE "C"', "")
    assert before != store._SCHEMA
    with psycopg.connect(url) as connection:
        connection.execute(before.encode())
