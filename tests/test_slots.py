"""Where a slot is: what a cluster says, and what its nodes say when they are asked in vain."""

from __future__ import annotations

from typing import Any

import pytest

from server.errors import NotReady
from server.slots import SlotMap, check_mode, check_refusal, is_elsewhere, seeds

REPLY: list[Any] = [
    [0, 99, [b"10.0.0.1", 7000, b"id", []], [b"10.0.0.2", 7001, b"id", []]],
    [100, 199, [b"", 7002, b"id", []], [b"?", 7003, b"id", []], [None, 0, b"id", []]],
    [300, 300, [b"10.0.0.1", 7000, b"id", []]],
]


def test_master_is_the_first_of_the_nodes_that_have_the_slot() -> None:
    slots = SlotMap(REPLY, ("asked", 1))
    assert [slots.master_of(slot) for slot in (0, 99, 300)] == [("10.0.0.1", 7000)] * 3


def test_node_that_does_not_know_its_address_is_where_it_was_asked() -> None:
    slots = SlotMap(REPLY, ("asked", 1))
    assert slots.master_of(100) == ("asked", 7002)
    assert slots.nodes == {("10.0.0.1", 7000), ("10.0.0.2", 7001), ("asked", 7002), ("asked", 7003)}


def test_slot_that_nobody_has_is_said() -> None:
    with pytest.raises(NotReady, match="has the slot 200"):
        SlotMap(REPLY, ("asked", 1)).master_of(200)


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        ("redis", [("redis", 6379)]),
        ("a:7000, b", [("a", 7000), ("b", 6379)]),
        ("::1", [("::1", 6379)]),
        ("[::1]:7000,[::2]", [("::1", 7000), ("::2", 6379)]),
    ],
)
def test_seeds_are_hosts_with_or_without_a_port(hosts: str, expected: list[tuple[str, int]]) -> None:
    assert seeds(hosts, 6379) == expected


@pytest.mark.parametrize(
    ("error", "elsewhere"),
    [
        ("MOVED 5 10.0.0.1:7000", True),
        ("ASK 5 10.0.0.1:7000", True),
        ("TRYAGAIN Multiple keys request during rehashing of slot", True),
        ("CLUSTERDOWN The cluster is down", True),
        ("ERR Script attempted to access a non local key in a cluster node script: 5, on @user_script:40.", True),
        ("ERR Attempted to access a non local key in a cluster node script: on @user_script:40.", True),
        ("OOM command not allowed when used memory > 'maxmemory'.", False),
        ("WRONGTYPE Operation against a key", False),
        ("READONLY You can't write against a read only replica.", False),
    ],
)
def test_refusal_of_a_slot_is_told_from_other_errors(error: str, elsewhere: bool) -> None:
    assert is_elsewhere(error) == elsewhere


def test_mode_that_is_not_as_said_names_the_variable() -> None:
    check_mode(wanted=True, found=True)
    check_mode(wanted=False, found=False)
    with pytest.raises(NotReady, match=r"^REDIS_CLUSTER=1: expected a node of a Redis Cluster, got a Redis without"):
        check_refusal("ERR This instance has cluster support disabled")
    with pytest.raises(NotReady, match=r"^REDIS_CLUSTER=0: expected a Redis without cluster mode, got a node"):
        check_mode(wanted=False, found=True)
    check_refusal("CLUSTERDOWN The cluster is down")
