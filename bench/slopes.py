"""Whether a series of samples grows, or only goes up and down. Pure."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Final, NamedTuple

BLOCKS: Final = 10
"""A block's median counts, not each sample: neighbours are alike, so they would pass for more than they know."""

T_975: Final = 2.306
"""Student's t with BLOCKS - 2 degrees of freedom: one in forty series without a slope passes for growing."""


class Growth(NamedTuple):
    """What a series gained from its beginning to its end along a straight line, and the least that it gained surely."""

    total: float
    least: float


def growth(samples: Sequence[float]) -> Growth:
    """Least squares through the medians of BLOCKS blocks; raises ValueError with fewer samples than blocks."""
    count = len(samples)
    if count < BLOCKS:
        raise ValueError(f"expected at least {BLOCKS} samples, got {count}")
    bounds = [count * block // BLOCKS for block in range(BLOCKS + 1)]
    medians = [statistics.median(samples[first:last]) for first, last in itertools.pairwise(bounds)]
    slope, intercept = statistics.linear_regression(range(BLOCKS), medians)
    residual = sum((median - intercept - slope * block) ** 2 for block, median in enumerate(medians))
    spread = sum((block - (BLOCKS - 1) / 2) ** 2 for block in range(BLOCKS))
    error = math.sqrt(residual / (BLOCKS - 2) / spread)
    return Growth(slope * BLOCKS, (slope - T_975 * error) * BLOCKS)


def grows(samples: Sequence[float], allowed: float) -> bool:
    """Whether it surely gained something, and more than `allowed` all in all."""
    gained = growth(samples)
    return gained.least > 0 and gained.total > allowed
