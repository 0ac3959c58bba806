"""Redis' clock, whatever this machine's says."""

from __future__ import annotations

import time

from server.redis_clock import RedisClock


def test_clock_is_this_machines_until_redis_has_spoken() -> None:
    assert abs(RedisClock().now_ms() - 1000 * time.time()) < 1000


def test_clock_goes_on_from_what_redis_said() -> None:
    clock = RedisClock()
    clock.learn([b"1000", b"500000"], asked_s=7.0, answered_s=7.2)
    assert clock.at_ms(7.1) == 1_000_500
    assert clock.at_ms(8.1) == 1_001_500
    assert clock.moment_s(1_001_500) == 8.1


def test_age_is_measured_by_that_clock_and_never_negative() -> None:
    clock, now_s = RedisClock(), time.monotonic()
    clock.learn((5000, 0), now_s, now_s)
    assert 60 <= clock.age_s(4_940_000) < 120
    assert clock.age_s(9_000_000) == 0
    assert clock.age_s(None) == 0
