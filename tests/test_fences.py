"""Which records of the log count: fences by themselves, and what every reader of the log makes of them."""

from __future__ import annotations

import pytest

from server.events import BadEvent
from server.fences import EPOCH_HEADER, FENCE_HEADER, MOST_FENCE_DIGITS, Fences


def of_epoch(epoch: int) -> list[tuple[str, object]]:
    return [("v", b"1"), (EPOCH_HEADER, str(epoch).encode())]


def fence(epoch: int) -> list[tuple[str, object]]:
    return [("v", b"1"), (FENCE_HEADER, str(epoch).encode())]


def test_event_of_an_older_epoch_is_void_behind_a_fence_only() -> None:
    fences = Fences()
    assert fences.admits(0, of_epoch(5))
    assert not fences.admits(0, fence(7)), "a fence is no event"
    assert not fences.admits(0, of_epoch(5))
    assert not fences.admits(0, of_epoch(6))
    assert fences.admits(0, of_epoch(7))
    assert fences.admits(0, of_epoch(8))
    assert fences.void == 2


def test_fence_stands_in_its_own_partition_alone() -> None:
    fences = Fences()
    fences.admits(0, fence(7))
    assert fences.admits(1, of_epoch(5))


def test_fence_behind_that_of_a_later_epoch_takes_nothing_back() -> None:
    fences = Fences()
    fences.admits(0, fence(7))
    fences.admits(0, fence(6))
    assert not fences.admits(0, of_epoch(6))
    assert fences.epochs == {0: {"": 7}}


@pytest.mark.parametrize("headers", [None, [], [("v", b"1")]])
def test_event_without_an_epoch_always_counts(headers: list[tuple[str, object]] | None) -> None:
    assert Fences({0: {"": 7}}).admits(0, headers)


def test_reader_that_begins_elsewhere_takes_over_the_fences_before() -> None:
    fences = Fences({0: {"": 7}})
    assert not fences.admits(0, of_epoch(6))
    fences.begin({0: {}, 1: {"": 9}})
    assert fences.admits(0, of_epoch(6))
    assert not fences.admits(1, of_epoch(8))


@pytest.mark.parametrize("value", [b"", b"x", b"-1", None, b"1_0", "\u0661".encode(), b"9" * 19, b"9" * 5000])
@pytest.mark.parametrize("header", [EPOCH_HEADER, FENCE_HEADER])
def test_epoch_that_is_no_number_makes_a_bad_event(header: str, value: bytes | None) -> None:
    with pytest.raises(BadEvent, match=f"header {header}: expected digits"):
        Fences().admits(0, [(header, value)])


def test_fence_of_one_tag_concerns_no_other() -> None:
    fences = Fences()
    fences.admits(0, [*fence(7), ("tag", b"3")])
    assert not fences.admits(0, [*of_epoch(6), ("tag", b"3")])
    assert not fences.admits(0, [("tag", b"3"), *of_epoch(6)]), "headers come in any order"
    assert fences.admits(0, [*of_epoch(6), ("tag", b"a")])
    assert fences.admits(0, of_epoch(6))
    assert (fences.highest("3"), fences.highest("a"), fences.highest("")) == (7, 0, 0)


@pytest.mark.parametrize("value", [b"", b"{3}", None, b"10", b"F", b"\xff", b"a" * 10**6])
def test_tag_that_is_no_word_makes_a_bad_event(value: bytes | None) -> None:
    with pytest.raises(BadEvent, match="header tag: expected a hexadecimal digit"):
        Fences().admits(0, [("tag", value)])


def test_epoch_above_any_fence_can_be_told() -> None:
    highest = int("9" * MOST_FENCE_DIGITS)
    fences = Fences()
    assert not fences.admits(0, fence(highest))
    assert fences.admits(0, of_epoch(highest + 1))
    with pytest.raises(BadEvent, match=f"expected digits, {MOST_FENCE_DIGITS} at most"):
        fences.admits(0, fence(highest + 1))
    assert fences.highest("") == highest
