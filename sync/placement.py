"""Where to begin reading a partition: pure, so that every way in which log and database may disagree can be tested.

Rather refuses than guesses. Knows no Kafka client and no database.
"""

from __future__ import annotations

from collections.abc import Mapping

from server.errors import ScoreboardError, TopicChanged
from sync.store import StoredOffset
from sync.topics import Topic


class LogGap(ScoreboardError):
    """The log does not hold what the stored offsets expect of it: some events can no longer be read."""


def check_topic(name: str, topic: Topic, stored: Mapping[int, StoredOffset]) -> None:
    """Pass offsets that belong to this very topic.

    Raises TopicChanged or LogGap, saying what to do.
    """
    others = sorted({offset.topic_id for offset in stored.values()} - {topic.topic_id})
    if others:
        raise TopicChanged(
            f"the topic {name} was made anew: the stored offsets belong to the id {', '.join(others)}, it has "
            f"{topic.topic_id}. If its predecessor held nothing that is not stored yet, set "
            f"KAFKA_NEW_TOPIC=restart to start over with the new one; `scoreboard reconcile` then mends the scores. "
            f"If it is the wrong broker, mend KAFKA_BROKERS"
        )
    beyond = sorted(partition for partition in stored if partition >= topic.partitions)
    if beyond:
        raise LogGap(
            f"the topic {name} has {topic.partitions} partitions, but offsets are stored for {beyond}. {_remedy(name)}"
        )


def first_offset(name: str, partition: int, stored: StoredOffset | None, low: int, high: int) -> int:
    """The offset to begin at, where `low` is the log's first and `high` is one past its last.

    Raises LogGap, saying what to do.
    """
    if stored is None:
        return low
    if stored.next_offset < low:
        raise LogGap(
            f"{low - stored.next_offset} records of {name}/{partition} expired before they were stored: "
            f"the log begins at {low}, the database goes on at {stored.next_offset}. {_remedy(name)}"
        )
    if stored.next_offset > high:
        raise LogGap(
            f"the log of {name}/{partition} was cut short: it ends at {high}, "
            f"the database goes on at {stored.next_offset}. {_remedy(name)}"
        )
    return stored.next_offset


def _remedy(name: str) -> str:
    return (
        "What is gone from the log is gone from the history. To go on with what there is, delete the rows of "
        f"{name} from the table consumer_offsets; `scoreboard reconcile` then mends the scores"
    )
