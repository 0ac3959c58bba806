"""Writing TimescaleDB: the schema, batches of events, and the offsets they came from.

Knows SQL and nothing of Kafka beyond the numbers it keeps for it. What was written twice counts once: rows are
told apart by version, and an offset never goes back.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import psycopg
from psycopg import sql

from server import postgres
from server.errors import ScoreboardError
from server.events import PERSISTER_GROUP, ScoreEvent
from server.fences import Epochs
from server.postgres import Connection
from sync.session import Session, nothing

IDLE_MS: Final = 60_000
"""After which the database ends a migration that it hears nothing of: others wait for its locks."""

TIDY_WITHIN_S: Final = 60.0
"""What dropping old events may take: it waits for everybody who reads them."""

_BAD_DATA: Final = ("22", "23", "44", "54")
"""Classes of SQLSTATE that say "never this row", not "not now"; 54 are limits, as of what an index holds of a row."""

_SCHEMA: Final = Path(__file__).with_name("schema.sql").read_text()
_PERSIST: Final = Path(__file__).with_name("persist_batch.sql").read_text().encode()
_OFFSETS: Final = """
    SELECT partition, topic_id, next_offset,
           CASE WHEN epoch > 0 THEN jsonb_build_object('', epoch) ELSE '{}' END || tag_epochs
    FROM consumer_offsets WHERE consumer_group = %s AND topic = %s
"""
_SCORES_AFTER: Final = """
    SELECT player_id, score, ver_ms, ver_seq FROM scores WHERE board = %s AND player_id > %s
    ORDER BY player_id LIMIT %s
"""
_SCORES_OF: Final = """
    SELECT player_id, score, ver_ms, ver_seq FROM scores WHERE board = %s AND player_id = ANY (%s::text[])
"""
_WITHOUT_SCORE: Final = """
    SELECT player_id FROM unnest(%s::text[]) AS asked (player_id)
    WHERE NOT EXISTS (SELECT FROM scores WHERE board = %s AND scores.player_id = asked.player_id)
"""
# At the very version of the row, too: then it was written here, and Redis was changed by hand since.
_CORRECT: Final = """
    INSERT INTO scores AS s (board, player_id, score, ver_ms, ver_seq, updated_at)
    SELECT %(board)s, player_id, score, ver_ms, ver_seq, to_timestamp(ver_ms::float8 / 1000)
    FROM unnest(%(players)s::text[], %(scores)s::bigint[], %(ms)s::bigint[], %(seq)s::bigint[])
         AS t (player_id, score, ver_ms, ver_seq)
    ORDER BY player_id
    ON CONFLICT (board, player_id) DO UPDATE
        SET score = EXCLUDED.score, ver_ms = EXCLUDED.ver_ms, ver_seq = EXCLUDED.ver_seq,
            updated_at = EXCLUDED.updated_at
        WHERE (EXCLUDED.ver_ms, EXCLUDED.ver_seq) >= (s.ver_ms, s.ver_seq)
"""
_HAS_CHUNKS: Final = "SELECT 1 FROM pg_extension WHERE extname = 'timescaledb'"
_DROP_CHUNKS: Final = "SELECT drop_chunks('score_events', older_than => make_interval(days => %s))"
_BACKEND: Final = "SELECT pg_backend_pid()"
_BEGIN: Final = """
    SELECT set_config('scoreboard.history_days', %(history_days)s, true),
           set_config('idle_in_transaction_session_timeout', %(idle_ms)s, true)
"""
_IS_ACTIVE: Final = "SELECT 1 FROM pg_stat_activity WHERE pid = %s AND state = 'active'"
_DELETE_OLD: Final = """
    DELETE FROM score_events WHERE ctid = ANY (ARRAY(
        SELECT ctid FROM score_events WHERE at < now() - make_interval(days => %s) LIMIT %s
    ))
"""
_log = logging.getLogger("sync.store")


class StoredOffset(NamedTuple):
    """Where to go on in one partition of the topic that had this id."""

    topic_id: str
    next_offset: int
    epochs: Epochs = MappingProxyType({})
    """Of the last fences before that offset, see server/fences.py."""


class StoredScore(NamedTuple):
    """A row of `scores`: the score, and the version of the event that made it."""

    score: int
    version: tuple[int, int]


class CommitsLost(ScoreboardError):
    """The database has forgotten what it confirmed: another host took over, or an old copy was restored."""


class Persisted(NamedTuple):
    """What a batch changed: rows of history, current scores, offsets. All 0 for a batch seen before."""

    new_events: int
    players_advanced: int
    offsets_advanced: int


class WrongEncoding(ScoreboardError):
    """A database that cannot hold every player's name: waiting does not mend it."""


def migrate(database_url: str, history_days: int = 0, meanwhile: Callable[[float], None] = nothing) -> None:
    """Bring the schema up to date; harmless when it is, and when others do the same.

    `history_days` is how long a TimescaleDB that does it by itself keeps events; 0 is for ever.
    Takes as long as the database works on it, for a long history may be written anew; `meanwhile` as in a Session.
    Raises psycopg.Error, WrongEncoding for a database that does not hold every name, and what `meanwhile` raises.
    """

    def apply(connection: Connection) -> None:
        check_encoding(connection)
        connection.add_notice_handler(_warn)
        with connection.transaction():
            (backend,) = connection.execute(_BACKEND).fetchone() or (None,)
            connection.is_at_work = lambda: _is_active(database_url, backend)
            # Indexes that are built anew may take longer than others wait.
            connection.execute("SET LOCAL statement_timeout = 0")
            connection.execute(_BEGIN, {"history_days": str(history_days), "idle_ms": str(IDLE_MS)})
            connection.execute(sql.SQL(_SCHEMA))

    session = Session(database_url, "scoreboard-migrate", meanwhile)
    try:
        session.run(apply)
    finally:
        session.close()


def _is_active(database_url: str, backend: int | None) -> bool:
    """Whether the database works for this backend: asked over another connection, for its own may have gone silent."""
    try:
        with postgres.connect(database_url, "scoreboard-migrate") as another:
            return another.execute(_IS_ACTIVE, (backend,)).fetchone() is not None
    except psycopg.Error:
        return False


def check_encoding(connection: psycopg.Connection[Any]) -> None:
    """Pass a database that keeps text as UTF-8.

    Raises WrongEncoding: another one refuses names, or, as SQL_ASCII, keeps bytes that it does not look at.
    """
    encoding = connection.info.parameter_status("server_encoding")
    if encoding != "UTF8":
        raise WrongEncoding(
            f"the database {connection.info.dbname}: expected the encoding UTF8, which holds every name, got "
            f"{encoding}; make another with CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0"
        )


def _warn(notice: psycopg.errors.Diagnostic) -> None:
    if notice.severity_nonlocalized == "WARNING":
        _log.warning("%s", notice.message_primary)


class Store:
    """What is written and read, over one connection; see Session for `meanwhile`."""

    def __init__(
        self, database_url: str, role: str = "scoreboard persister", meanwhile: Callable[[float], None] = nothing
    ) -> None:
        self._session = Session(database_url, role, meanwhile, self._examine)
        self._confirmed: dict[tuple[str, str], dict[int, int]] = {}
        """By topic and its id: the next offset of each partition, as the database last confirmed it."""

    def persist(
        self,
        events: Sequence[ScoreEvent],
        topic: str,
        topic_id: str,
        next_offsets: Mapping[int, int],
        epochs: Mapping[int, Epochs] = MappingProxyType({}),
    ) -> Persisted:
        """Write the events and move the offsets, with the epochs of the last fences before them, all or nothing.

        Raises psycopg.DataError or IntegrityError when the database refuses what it was given, OperationalError when it
        is away, and another psycopg.Error when it does not let us; nothing was written then. Raises CommitsLost, once,
        when the database no longer has what it confirmed before: then `offsets` says where to go on.
        """
        parameters = _columns(events) | {
            "consumer_group": PERSISTER_GROUP,
            "topic": topic,
            "topic_id": topic_id,
            "partitions": list(next_offsets.keys()),
            "next_offsets": list(next_offsets.values()),
            "epochs": [epochs.get(partition, {}).get("", 0) for partition in next_offsets],
            "tag_epochs": [_tagged(epochs.get(partition, {})) for partition in next_offsets],
        }

        def write(connection: Connection) -> Any:
            try:
                return connection.execute(_PERSIST, parameters).fetchone()
            except psycopg.Error as error:
                if (error.sqlstate or "")[:2] in _BAD_DATA and not isinstance(error, psycopg.IntegrityError):
                    raise psycopg.DataError(str(error)) from error
                raise

        row = self._session.run(write)
        assert row is not None  # the statement returns one row
        self._confirm(topic, topic_id, next_offsets)
        return Persisted(*row)

    def offsets(self, topic: str) -> dict[int, StoredOffset]:
        """Where to go on, by partition; a partition nothing was stored of is missing."""
        self._confirmed = {}  # from here on counts what the database says now
        rows = self._session.run(lambda connection: connection.execute(_OFFSETS, (PERSISTER_GROUP, topic)).fetchall())
        found = {partition: StoredOffset(*offset) for partition, *offset in rows}
        for partition, offset in found.items():
            self._confirm(topic, offset.topic_id, {partition: offset.next_offset})
        return found

    def _confirm(self, topic: str, topic_id: str, next_offsets: Mapping[int, int]) -> None:
        confirmed = self._confirmed.setdefault((topic, topic_id), {})
        for partition, offset in next_offsets.items():
            confirmed[partition] = max(offset, confirmed.get(partition, 0))

    def _examine(self, connection: Connection) -> None:
        # An offset never goes back by itself. So one that did tells that events behind it are missing, too.
        for (topic, topic_id), offsets in self._confirmed.items():
            rows = connection.execute(_OFFSETS, (PERSISTER_GROUP, topic)).fetchall()
            stored = {partition: offset for partition, its_id, offset, _ in rows if its_id == topic_id}
            behind = sum(max(0, offset - stored.get(partition, 0)) for partition, offset in offsets.items())
            if behind:
                self._confirmed = {}
                raise CommitsLost(f"the database has lost up to {behind} events of {topic} that it had stored")

    def forget_offsets(self, topic: str, but_of: str) -> None:
        """Delete the offsets of topics that had this name, except of the one with the id `but_of`."""
        self._confirmed = {}
        query = "DELETE FROM consumer_offsets WHERE consumer_group = %s AND topic = %s AND topic_id <> %s"
        self._session.run(lambda connection: connection.execute(query, (PERSISTER_GROUP, topic, but_of)))

    def drop_history(self, days: int, most: int) -> bool:
        """Delete events older than that, `most` at once where each is deleted by itself; says if more are left."""
        run = self._session.run
        if run(lambda connection: connection.execute(_HAS_CHUNKS).fetchone()):
            run(lambda connection: connection.execute(_DROP_CHUNKS, (days,)), TIDY_WITHIN_S)
            return False
        return run(lambda connection: connection.execute(_DELETE_OLD, (days, most)).rowcount, TIDY_WITHIN_S) == most

    def scores_after(self, board: str, player: str, limit: int) -> list[tuple[str, StoredScore]]:
        """The next `limit` players of a board behind `player`, in the index's order; "" is before the first."""
        return self._scores(_SCORES_AFTER, (board, player, limit))

    def scores_of(self, board: str, players: Sequence[str]) -> dict[str, StoredScore]:
        """Those of these players that have a row."""
        return dict(self._scores(_SCORES_OF, (board, _text_array(players))))

    def without_score(self, board: str, players: Sequence[str]) -> list[str]:
        """Those of these players that have no row."""
        rows = self._session.run(
            lambda connection: connection.execute(_WITHOUT_SCORE, (_text_array(players), board)).fetchall()
        )
        return [player for (player,) in rows]

    def correct(self, board: str, scores: Sequence[tuple[str, int, tuple[int, int]]]) -> int:
        """Write (player, score, version) where the table knows nothing later; returns how many rows that were."""
        parameters = {
            "board": board,
            "players": _text_array([player for player, _, _ in scores]),
            "scores": _number_array([score for _, score, _ in scores]),
            "ms": _number_array([ms for _, _, (ms, _) in scores]),
            "seq": _number_array([seq for _, _, (_, seq) in scores]),
        }
        return self._session.run(lambda connection: connection.execute(_CORRECT, parameters).rowcount) if scores else 0

    def _scores(self, query: str, parameters: tuple[Any, ...]) -> list[tuple[str, StoredScore]]:
        rows = self._session.run(lambda connection: connection.execute(query, parameters).fetchall())
        return [(player, StoredScore(score, (ms, seq))) for player, score, ms, seq in rows]

    def close(self) -> None:
        """Give up the connection."""
        self._session.close()


def _tagged(epochs: Epochs) -> str:
    return json.dumps({tag: epoch for tag, epoch in epochs.items() if tag})


def _columns(events: Sequence[ScoreEvent]) -> dict[str, Any]:
    versions = [event.version for event in events]
    return {
        "board": _text_array([event.board for event in events]),
        "player": _text_array([event.player_id for event in events]),
        "ms": _number_array([ms for ms, _ in versions]),
        "seq": _number_array([seq for _, seq in versions]),
        "delta": _number_array([event.score_delta for event in events]),
        "score": _number_array([event.new_score for event in events]),
    }


# Array literals, made here: psycopg's own way with a list costs three times as much as all the rest of a batch.


def _number_array(values: Iterable[int]) -> str:
    return "{" + ",".join(map(str, values)) + "}"


def _text_array(values: Iterable[str]) -> str:
    quoted = ",".join(['"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"' for value in values])
    return "{" + quoted + "}"
