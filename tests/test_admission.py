"""How many may watch at once."""

from __future__ import annotations

import pytest

from server.admission import Admission
from server.errors import Problem


def entered(admission: Admission, address: str) -> bool:
    """Whether somebody from there was let in."""
    try:
        admission.check_total()
        admission.check_address(address)
    except Problem:
        return False
    admission.enter(address)
    return True


def test_address_has_a_limit_of_its_own_until_somebody_leaves() -> None:
    admission = Admission(most=0, most_per_address=2)
    assert [entered(admission, "a") for _ in range(3)] == [True, True, False]
    assert entered(admission, "b")
    admission.leave("a")
    assert [entered(admission, "a") for _ in range(2)] == [True, False]
    assert admission.connections == 3


def test_total_is_limited_whatever_the_address() -> None:
    admission = Admission(most=2, most_per_address=0)
    assert [entered(admission, address) for address in "abc"] == [True, True, False]
    admission.leave("b")
    assert entered(admission, "c")


def test_limit_of_0_is_none() -> None:
    admission = Admission(most=0, most_per_address=0)
    assert all(entered(admission, "a") for _ in range(1000))


def test_connection_of_no_address_counts_in_total_only() -> None:
    admission = Admission(most=3, most_per_address=1)
    admission.enter(None)
    admission.enter(None)
    assert [entered(admission, "a") for _ in range(2)] == [True, False]
    assert not entered(admission, "b"), "expected three in total"
    admission.leave(None)
    assert entered(admission, "b")


def test_addresses_that_left_are_forgotten() -> None:
    admission = Admission(most=0, most_per_address=5)
    for number in range(100):
        admission.enter(f"a{number}")
        admission.leave(f"a{number}")
    assert admission.connections == 0
    assert not admission._by_address


def test_refusal_names_the_setting() -> None:
    admission = Admission(most=1, most_per_address=1)
    admission.enter("a")
    with pytest.raises(Problem, match="LIVE_MAX_CONNECTIONS") as refusal:
        admission.check_total()
    assert (refusal.value.status, refusal.value.kind) == (503, "too-many-connections")
    assert dict(refusal.value.headers)["Retry-After"] == "5"
    with pytest.raises(Problem, match="LIVE_MAX_PER_IP"):
        admission.check_address("a")
