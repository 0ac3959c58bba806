"""How long the oldest entry of an outbox waits, by what looks once a second find."""

from __future__ import annotations

import pytest

from server.outbox_age import LOOKS_KEPT, OutboxAge
from server.redis_clock import RedisClock

HOUR_MS = 3_600_000
NOW_S = 50_000.0
NOW_MS = 1_700_000_000_000


@pytest.fixture
def age() -> OutboxAge:
    """With a clock that says NOW_MS at NOW_S."""
    clock = RedisClock()
    clock.learn((NOW_MS // 1000, 0), NOW_S, NOW_S)
    return OutboxAge(clock)


def entry(ms: int, seq: int = 0) -> bytes:
    return b"%d-%d" % (ms, seq)


def test_empty_outbox_has_no_age(age: OutboxAge) -> None:
    age.look(None, b"0-0", NOW_S)
    assert age.since_s is None


def test_age_of_what_was_there_before_the_first_look_is_what_its_id_says(age: OutboxAge) -> None:
    age.look(entry(NOW_MS - 60_000), entry(NOW_MS), NOW_S)
    assert age.since_s == NOW_S - 60


def test_age_of_an_entry_from_the_future_is_what_was_seen_of_it(age: OutboxAge) -> None:
    ahead = NOW_MS + HOUR_MS
    age.look(None, entry(ahead), NOW_S)
    age.look(entry(ahead, 1), entry(ahead, 5), NOW_S + 1)
    assert age.since_s == NOW_S + 1
    age.look(entry(ahead, 1), entry(ahead, 9), NOW_S + 2)
    assert age.since_s == NOW_S + 1, "it does not move"
    age.look(entry(ahead, 5), entry(ahead, 12), NOW_S + 3)
    assert age.since_s == NOW_S + 1, "it moves, but is no younger"
    age.look(entry(ahead, 12), entry(ahead, 12), NOW_S + 4)
    assert age.since_s == NOW_S + 3
    age.look(entry(ahead, 13), entry(ahead, 20), NOW_S + 5)
    assert age.since_s == NOW_S + 5
    age.look(None, entry(ahead, 20), NOW_S + 6)
    assert age.since_s is None


def test_clock_set_ahead_makes_no_new_entry_old(age: OutboxAge) -> None:
    age.look(None, entry(NOW_MS - HOUR_MS), NOW_S)
    age.look(entry(NOW_MS - HOUR_MS + 900), entry(NOW_MS - HOUR_MS + 900), NOW_S + 1)
    assert age.since_s == NOW_S


def test_stuck_entry_keeps_its_age_through_any_number_of_looks(age: OutboxAge) -> None:
    ahead = NOW_MS + HOUR_MS
    for second in range(LOOKS_KEPT * 2):
        age.look(entry(ahead), entry(ahead, second), NOW_S + second)
    assert age.since_s is not None
    assert age.since_s <= NOW_S + LOOKS_KEPT


def test_ids_that_begin_anew_are_no_older_than_their_first_look(age: OutboxAge) -> None:
    age.look(None, entry(NOW_MS + HOUR_MS), NOW_S)
    age.look(entry(NOW_MS + 5000), entry(NOW_MS + 5000), NOW_S + 5)
    assert age.since_s == NOW_S + 5
