"""Which rate is sustained: the search between two rates, and what speaks against one."""

from __future__ import annotations

import pytest

from bench.gauges import Sample
from bench.posters import Log
from bench.sustain import ALLOWED_MS, PRECISION, against, limit, search, series, waits_ms

S = 1_000_000_000
QUIET = [Sample(1, 10, 500, 20.0)] * 20
ANSWERS = [[1.0, 2.0, 3.0]] * 20


@pytest.mark.parametrize("first", [10.0, 1000.0, 7000.0, 100_000.0])
@pytest.mark.parametrize("most", [950.0, 7123.0, 24_000.0])
def test_search_finds_the_highest_rate_from_below_and_from_above(first: float, most: float) -> None:
    tried: list[float] = []

    def is_sustained(rate: float) -> bool:
        tried.append(rate)
        return rate <= most

    found = search(is_sustained, first)
    assert found <= most < found * PRECISION
    assert len(tried) < 20


def test_search_says_when_no_rate_is_sustained() -> None:
    assert search(lambda _: False, 4000) == 0


def figures(
    samples: list[Sample], answers: list[list[float]], posts_per_s: float = 1000, p99_ms: float = 3
) -> dict[str, object]:
    return {"rate": 1000, "posts_per_s": posts_per_s, "post_p99_ms": p99_ms, **series(samples, answers, 1000)}


def test_nothing_is_against_a_rate_at_which_nothing_grows() -> None:
    assert against(figures(QUIET, ANSWERS), []) == []


def test_each_thing_that_grows_is_named_with_what_moves_it() -> None:
    outbox = [Sample(1, 100 * second, 500, 20.0) for second in range(20)]
    lag = [Sample(1, 10, 500 + 100 * second, 20.0) for second in range(20)]
    delay = [Sample(1, 10, 500, 100.0 * second) for second in range(20)]
    answers = [[100.0 * second] for second in range(20)]
    for samples, waits, said in (
        (outbox, ANSWERS, "the outbox grew by 2,000 ms (relay or Kafka)"),
        (lag, ANSWERS, "the persister's lag grew by 2,000 ms (persister or PostgreSQL)"),
        (delay, ANSWERS, "the delay of live updates grew by 2,000 ms"),
        (QUIET, answers, "the wait for an answer grew by 2,000 ms (server, Redis"),
    ):
        [found] = against(figures(samples, waits), [])
        assert found.startswith(said)


def test_wait_that_does_not_grow_any_more_may_be_too_long_all_the_same() -> None:
    assert against(figures(QUIET, ANSWERS, p99_ms=100), []) == []
    [found] = against(figures(QUIET, ANSWERS, p99_ms=3490), [])
    assert found.startswith("one POST in a hundred waited 3,490 ms and more (server")


def test_growth_within_what_is_allowed_is_chance() -> None:
    little = ALLOWED_MS / 25
    samples = [Sample(1, int(little * second), 500, 20.0) for second in range(20)]
    assert against(figures(samples, ANSWERS), []) == []


def test_posts_that_failed_or_came_to_too_few_are_against_a_rate() -> None:
    found = against(figures(QUIET, ANSWERS, posts_per_s=980), ["503 at once"])
    assert found[0] == "POST failed: 503 at once"
    assert found[1].startswith("only 980 of 1,000 POSTs/s were answered")


def test_wait_counts_from_the_schedule_in_the_second_of_the_answer() -> None:
    log = Log()
    for scheduled_ns, answered_ns in ((9 * S, 11 * S), (10 * S, 10 * S + S // 2), (12 * S, 12 * S), (9 * S, 9 * S)):
        log.scheduled_ns.append(scheduled_ns)
        log.answered_ns.append(answered_ns)
    assert waits_ms(log, 10 * S, 12 * S + S // 2) == [[500.0], [2000.0]]


def test_limit_is_what_stood_against_the_lowest_rate_above_the_sustained_one() -> None:
    cores = {"server": 0.4, "PostgreSQL": 0.9}

    def run(rate: int, *against: str) -> dict[str, object]:
        return {"rate": rate, "against": list(against), "cores": cores, "others_percent": 0}

    said = limit([run(800, "a stranger"), run(1000), run(4000, "all of it"), run(2000, "lag grew")], 1000)
    assert said.startswith("at 2,000/s lag grew. Cores in use: 1.30 of ")
    assert "(PostgreSQL 0.90, server 0.40" in said
