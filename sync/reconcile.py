"""Reconciliation: does the table `scores` say what Redis says, player by player, and if not, put it right.

Redis holds what is true now. Its scores are read together with the outbox's last id, which is their version, so
whatever is written here yields to every later event and to no earlier one. A player whose events are still on their
way is no difference: what differs is looked at again once all events up to the version read have been stored.
Reads both sides in chunks, and keeps no more than a few of them.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
from confluent_kafka import Consumer, KafkaException, TopicPartition

from server.config import Settings
from server.errors import ScoreboardError
from server.events import INDEX_SPAN, MAX_SCORE
from server.keys import BoardKeys, Keys
from sync.kafka import new_consumer
from sync.store import Store, StoredScore
from sync.topics import look_up
from sync.topology import connect_to, keys_in_use
from sync.waiting import Stop

CHUNK: Final = 1000
"""Players a script reads at once: a game client's update waits for less than 2 ms behind it."""

DOUBTS_AT_ONCE: Final = 10 * CHUNK
SETTLE_WITHIN_S: Final = 10.0
"""How long events on their way are waited for, altogether; what still differs then is a difference."""

_READ: Final = Path(__file__).with_name("read_scores.lua").read_text()
_log = logging.getLogger("sync.reconcile")
_pack: Final = msgspec.msgpack.Encoder().encode
_unpack: Final = msgspec.msgpack.Decoder(tuple[Any, Any, Any, list[Any], list[Any]]).decode
_NO_EVENT: Final = (0, 0)

Version = tuple[int, int]


class NotComparable(ScoreboardError):
    """Redis has no scoreboard to compare with."""


class Difference(NamedTuple):
    """One player that both sides know differently.

    `score` is the score key's and `member` the leaderboard's; None where Redis has none. `row` is the table's.
    """

    board: str
    player: str
    score: int | None
    member: int | None
    version: Version
    row: StoredScore | None

    @property
    def repairable(self) -> bool:
        """Whether Redis has a score, and one that is not older than the table's."""
        return self.score is not None and self._stored != self.score and not self.database_is_later

    @property
    def database_is_later(self) -> bool:
        """Whether the table knows an event that this Redis never had, or has lost."""
        return self.row is not None and self.row.version > self.version

    @property
    def _stored(self) -> int | None:
        return self.row.score if self.row else None

    def __str__(self) -> str:
        name = f"{self.board} {json.dumps(self.player, ensure_ascii=False)}: "
        if self.score != self.member:
            name += f"score key {_shown(self.score)}, leaderboard {_shown(self.member)}, "
        else:
            name += f"Redis {_shown(self.score)}, "
        name += f"database {_shown(self._stored)}"
        if self.score is not None and self.row and self.score != self.row.score:
            name += f" ({self.row.score - self.score:+d})"
        return name + ("; the database knows a later event" if self.database_is_later else "")


class Outcome(NamedTuple):
    """What one comparison came to."""

    compared: int
    differing: int
    repaired: int


class Reconciliation:
    """Compares all boards; `say` is told each difference, in a line."""

    def __init__(self, settings: Settings, stop: Stop, say: Callable[[str], None]) -> None:
        self._settings = settings
        self._stop = stop
        self._say = say
        self._shards: dict[str, _Shard] = {}
        self._store = Store(settings.database_url, "scoreboard-reconcile", self._heed)
        self._pipeline = _Pipeline(settings, self._store)

    def run(self, *, repair: bool) -> Outcome:
        """Compare once, and put right what can be.

        Raises NotComparable, redis.RedisError, psycopg.Error.
        """
        self._patient_until = time.monotonic() + SETTLE_WITHIN_S
        self._compared = self._ranked = self._differing = self._repaired = 0
        self._connect()
        for board in (self._shards[name].keys.board(name) for name in self._settings.boards):
            self._read(board, [])  # is there anything to compare with?
            doubts: list[Difference] = []
            for found in self._doubts(board):
                doubts += found
                if len(doubts) >= DOUBTS_AT_ONCE:
                    self._settle(board.name, doubts, repair=repair)
                    doubts = []
            self._settle(board.name, doubts, repair=repair)
        return Outcome(self._compared, self._differing, self._repaired)

    def close(self) -> None:
        """Give up the connections."""
        self._disconnect()
        self._store.close()
        self._pipeline.close()

    def _heed(self, _waited_s: float = 0.0) -> None:
        if self._stop.requested:
            raise NotComparable("stopped midway")

    def _connect(self) -> None:
        """Find the boards, anew each time: in a cluster they may have moved."""
        self._disconnect()
        for keys in keys_in_use(self._settings):
            shard = _Shard(self._settings, keys)
            self._shards |= {board: shard for board in self._settings.boards if keys.holds(board)}

    def _disconnect(self) -> None:
        while self._shards:
            self._shards.popitem()[1].client.close()

    def _doubts(self, board: BoardKeys) -> Iterator[list[Difference]]:
        """What differs at first sight: players of the table, then those that only the leaderboard has."""
        after, known = "", self._ranked
        while rows := self._store.scores_after(board.name, after, CHUNK):
            yield self._unequal(board, dict(rows))
            after = rows[-1][0]
        client = self._shards[board.name].client
        if client.zcard(board.leaderboard) <= self._ranked - known:
            return  # the table has all of them, which spares as many searches
        cursor = 0
        while True:
            reply: Any = client.zscan(board.leaderboard, cursor, count=CHUNK)
            cursor, members = reply
            players = list(dict.fromkeys(_name(member) for member, _ in members))
            for start in range(0, len(players), CHUNK):  # a small sorted set comes as a whole
                unknown = self._store.without_score(board.name, players[start : start + CHUNK])
                if unknown:
                    yield self._unequal(board, dict.fromkeys(unknown))
            if not cursor:
                return

    def _unequal(self, board: BoardKeys, rows: dict[str, StoredScore | None]) -> list[Difference]:
        # The table was read before Redis. So a row that is later than Redis is no event that came in between.
        self._heed()
        players = list(rows)
        version, _, scores, members = self._read(board, players)
        self._compared += len(players)
        self._ranked += len(members) - members.count(None)
        return [
            Difference(board.name, player, score, member, version, row)
            for (player, row), score, member in zip(rows.items(), scores, members, strict=True)
            if score != member or score != (row.score if row else None)
        ]

    def _read(self, board: BoardKeys, players: list[str]) -> tuple[Version, Version | None, list[Any], list[Any]]:
        shard, scores_of = self._shards[board.name], [board.score(player) for player in players]
        packed = shard.script(
            keys=[shard.keys.outbox], args=[_pack((shard.keys.ready, board.leaderboard, players, scores_of))]
        )
        epoch, last, oldest, scores, members = _unpack(packed)
        if not epoch:
            raise NotComparable("Redis has no scoreboard: a server fills it from the database at its start")
        version = _through(last) if last else _NO_EVENT
        return version, _through(oldest) if oldest else None, list(map(_number, scores)), list(map(_number, members))

    def _settle(self, board: str, doubts: list[Difference], *, repair: bool) -> None:
        """Wait for events on their way, then count, tell and repair what differs nevertheless."""
        if not doubts:
            return
        self._wait_for_events(board, max(doubt.version for doubt in doubts))
        rows = self._store.scores_of(board, [doubt.player for doubt in doubts])
        certain = [now for doubt in doubts if (now := _looked_at_again(doubt, rows.get(doubt.player)))]
        for difference in certain:
            self._say(str(difference))
        self._differing += len(certain)
        if repair:
            wrong = [(one.player, one.score or 0, one.version) for one in certain if one.repairable]
            self._repaired += self._store.correct(board, wrong)

    def _wait_for_events(self, name: str, version: Version) -> None:
        board = self._shards[name].keys.board(name)
        while not self._stop.requested:
            _, oldest, _, _ = self._read(board, [])
            on_its_way = "the outbox" if oldest and oldest <= version else self._pipeline.owes()
            if not on_its_way:
                return
            if time.monotonic() > self._patient_until:
                _log.warning("events are still on their way (%s): the database may only be late", on_its_way)
                return
            self._stop.wait(0.1)


class _Shard:
    """The Redis that has some of the boards: all of them, or in a cluster those of one hash tag."""

    def __init__(self, settings: Settings, keys: Keys) -> None:
        self.keys = keys
        self.client = connect_to(settings, keys)
        self.script = self.client.register_script(_READ)


class _Pipeline:
    """How far the persister is behind Kafka."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self._settings = settings
        self._store = store
        self._consumer: Consumer | None = None

    def owes(self) -> str:
        """Where events are on their way, or why nobody knows; empty when all are stored."""
        name = self._settings.kafka_topic
        if self._consumer is None:
            self._consumer = new_consumer(self._settings, "scoreboard-reconcile", lambda _: None)
        try:
            topic = look_up(self._settings)
            ends = [
                self._consumer.get_watermark_offsets(TopicPartition(name, partition), timeout=2)
                for partition in range(topic.partitions)
            ]
        except KafkaException as error:
            return f"Kafka does not say: {error}"
        stored = self._store.offsets(name)
        behind = 0
        for partition, (low, high) in enumerate(ends):
            offset = stored.get(partition)
            known = offset and offset.topic_id == topic.topic_id
            behind += high - (offset.next_offset if offset and known else low)
        return f"{behind} in Kafka" if behind > 0 else ""

    def close(self) -> None:
        if self._consumer:
            self._consumer.close()


def _name(member: bytes) -> str:
    """A player's name; of a member that is none, one that nobody has: the database takes no NUL."""
    return member.decode("utf-8", "backslashreplace").replace("\0", "\\x00")


def _looked_at_again(doubt: Difference, row: StoredScore | None) -> Difference | None:
    """What is left of a difference, now that all events up to its version are stored."""
    if row != doubt.row and row and row.version > doubt.version:
        return None  # an event came after we read Redis, and each brings the whole score
    now = doubt._replace(row=row)
    stored = row.score if row else None
    return now if now.score != now.member or now.score != stored else None


def _through(entry_id: bytes | str) -> Version:
    """The version that is above all events of this entry and below all of the next one."""
    ms, seq = (entry_id if isinstance(entry_id, str) else entry_id.decode()).split("-")
    return int(ms), int(seq) * INDEX_SPAN + INDEX_SPAN - 1


def _number(raw: Any) -> int | None:
    """A score; None for what is none, which is anything beyond MAX_SCORE, too."""
    if not raw:
        return None
    try:
        score = int(raw)
    except ValueError:
        try:
            score = int(float(raw))  # as a sorted set writes large ones
        except (ValueError, OverflowError):
            return None
    return score if abs(score) <= MAX_SCORE else None


def _shown(score: int | None) -> str:
    return "none" if score is None else str(score)
