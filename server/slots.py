"""Which node of a Redis Cluster has a slot: what CLUSTER SLOTS says, and what a node says that has it not.

Pure: server/ and sync/ ask in ways of their own.
"""

from __future__ import annotations

import re
from typing import Any, Final

from server.errors import NotReady

Address = tuple[str, int]
"""Host and port of a node."""

_NOT_HERE: Final = re.compile(
    "MOVED |ASK |TRYAGAIN|CLUSTERDOWN|ERR .*attempted to access a non local key", re.IGNORECASE
)
_NO_CLUSTER: Final = re.compile("(ERR )?This instance has cluster support disabled")


def seeds(hosts: str, port: int) -> list[Address]:
    """The nodes that REDIS_HOST names: `host` or `host:port`, separated by commas; `port` where none is given."""
    found = []
    for host in filter(None, map(str.strip, hosts.split(","))):
        name, _, own = host.rpartition(":")
        # An IPv6 address brings colons of its own, and brackets where there is a port behind it.
        has_port = own.isdigit() and bool(name) and (":" not in name or name.endswith("]"))
        found.append((name.strip("[]"), int(own)) if has_port else (host.strip("[]"), port))
    return found


def is_elsewhere(error: str) -> bool:
    """Whether a node refused a call because it does not have the slot, or not all of its keys: it has done nothing.

    Of our script that holds too while a slot moves, since all it writes has been read before.
    """
    return _NOT_HERE.match(error) is not None


def check_mode(wanted: bool, found: bool) -> None:
    """Pass a Redis that is what REDIS_CLUSTER says.

    Raises NotReady, saying what to set.
    """
    if wanted and not found:
        raise NotReady("REDIS_CLUSTER=1: expected a node of a Redis Cluster, got a Redis without cluster mode")
    if found and not wanted:
        raise NotReady("REDIS_CLUSTER=0: expected a Redis without cluster mode, got a node of a Redis Cluster")


def check_refusal(error: str) -> None:
    """Pass a node's refusal to answer CLUSTER SLOTS, unless it is no node.

    Raises NotReady.
    """
    check_mode(wanted=True, found=_NO_CLUSTER.match(error) is None)


class SlotMap:
    """What one node answered to CLUSTER SLOTS."""

    def __init__(self, reply: list[Any], asked: Address) -> None:
        """`asked` is the node that answered; it may not know its own address."""
        self._ranges = [
            (first, last, [_address(node, asked) for node in nodes if node[1]]) for first, last, *nodes in reply
        ]

    @property
    def nodes(self) -> set[Address]:
        """Masters and replicas."""
        return {node for _, _, nodes in self._ranges for node in nodes}

    def master_of(self, slot: int) -> Address:
        """The master that has the slot.

        Raises NotReady when none has.
        """
        for first, last, nodes in self._ranges:
            if first <= slot <= last and nodes:
                return nodes[0]
        raise NotReady(f"no node of the Redis Cluster has the slot {slot}: is the cluster whole?")


def _address(node: list[Any], asked: Address) -> Address:
    host = node[0].decode() if node[0] else ""
    return (host if host not in ("", "?") else asked[0]), int(node[1])
