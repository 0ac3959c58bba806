"""Growth is told from noise: what rises slowly but surely grows, what only goes up and down does not."""

from __future__ import annotations

import math
import random

import pytest

from bench.slopes import grows, growth


def noise(seed: int, size: float) -> float:
    return random.Random(seed).gauss(0, size)


def test_straight_line_gains_what_it_rises() -> None:
    gained = growth([2.0 * second for second in range(100)])
    assert gained.total == pytest.approx(200)
    assert gained.least == pytest.approx(200)


def test_growth_under_noise_as_large_as_itself_is_seen() -> None:
    samples = [0.01 * second + noise(second, 1.5) for second in range(300)]
    assert grows(samples, allowed=0.5)
    assert not grows(samples, allowed=5)


@pytest.mark.parametrize("seed", range(20))
def test_noise_alone_does_not_grow_by_more_than_a_little(seed: int) -> None:
    assert not grows([100 + noise(1000 * seed + second, 20) for second in range(300)], allowed=20)


def test_sawtooth_does_not_grow() -> None:
    assert not grows([second % 7 * 1000.0 for second in range(300)], allowed=500)


def test_one_outburst_does_not_grow() -> None:
    samples = [5.0] * 300
    samples[200:212] = [10_000.0] * 12
    assert not grows(samples, allowed=50)


def test_nothing_and_what_shrinks_do_not_grow() -> None:
    assert not grows([0.0] * 20, allowed=0)
    assert not grows([100.0 - second for second in range(50)], allowed=0)


def test_growth_that_slows_down_grows() -> None:
    assert grows([1000 * math.sqrt(second) for second in range(60)], allowed=500)


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="expected at least 10 samples, got 9"):
        growth([1.0] * 9)
