"""What one connection may do, at once and on the long run."""

from __future__ import annotations

from server.budget import Budget


def test_budget_is_spent_at_once_and_comes_back() -> None:
    budget = Budget()
    assert [budget.spend(10, 30, 1000.0) for _ in range(4)] == [True, True, True, False]
    assert not budget.spend(10, 30, 1019.0)
    assert budget.spend(10, 30, 1040.0)


def test_budget_of_one_that_spends_slowly_is_never_used_up() -> None:
    budget = Budget()
    assert all(budget.spend(10, 30, float(now_s)) for now_s in range(0, 10_000, 10))


def test_budget_forgets_what_was_long_ago_and_saves_nothing() -> None:
    budget = Budget()
    for _ in range(3):
        budget.spend(10, 30, 0.0)
    assert [budget.spend(10, 30, 3600.0) for _ in range(4)] == [True, True, True, False]
