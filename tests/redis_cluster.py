"""A Redis Cluster of six real nodes: three masters, each with a replica; slots can be moved, masters killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import redis

from server.embedded import RedisServer, free_port
from server.keys import SLOTS, Keys, tag_of
from tests.services import wait_until

MASTERS = 3
NODE_TIMEOUT_MS = 2000
"""Longer than a busy machine keeps a process waiting: a master is replaced only when it was killed."""

_OPTIONS = {
    "cluster-enabled": "yes",
    "cluster-node-timeout": str(NODE_TIMEOUT_MS),
    "cluster-require-full-coverage": "no",  # what is whole goes on while a master is replaced
    "cluster-replica-validity-factor": "0",
    "repl-diskless-sync-delay": "0",
}


class Node(RedisServer):
    """One node, known by its id."""

    def __init__(self, data: Path) -> None:
        super().__init__(data, options={**_OPTIONS, "cluster-port": str(free_port())})
        self.client = redis.Redis(host=self.host, port=self.port, socket_timeout=10)
        self.bus_port = int(self.argv[self.argv.index("--cluster-port") + 1])

    @property
    def node_id(self) -> str:
        """Its name in the cluster."""
        return str(self.ask("CLUSTER", "MYID").decode())

    def ask(self, *command: str | int) -> Any:
        """The reply to a command, as it comes."""
        return self.client.execute_command(*command)

    @property
    def state(self) -> dict[str, str]:
        """CLUSTER INFO."""
        lines = self.ask("CLUSTER", "INFO").decode().split()
        return dict(line.split(":", 1) for line in lines)


class RedisCluster:
    """Started by `start`, stopped by `stop`; every board is found where it is now."""

    def __init__(self, directory: Path) -> None:
        self.nodes = [Node(directory / f"node-{number}") for number in range(2 * MASTERS)]

    @property
    def settings(self) -> dict[str, str]:
        """The variables that lead to it: two nodes, so that one may be away."""
        hosts = ",".join(f"{node.host}:{node.port}" for node in self.nodes[:2])
        return {"REDIS_CLUSTER": "1", "REDIS_HOST": hosts}

    def start(self) -> None:
        """Start the nodes and join them."""
        for node in self.nodes:
            node.launch()
        for node in self.nodes:
            wait_until(node.answers, 30, "a node does not answer")
        first, masters = self.nodes[0], self.nodes[:MASTERS]
        for number, node in enumerate(masters):
            begin, end = number * SLOTS // MASTERS, (number + 1) * SLOTS // MASTERS - 1
            node.ask("CLUSTER", "ADDSLOTSRANGE", begin, end)
            node.ask("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for node in self.nodes[1:]:
            node.ask("CLUSTER", "MEET", first.host, first.port, first.bus_port)
        everybody = str(len(self.nodes))
        wait_until(lambda: all(node.state["cluster_known_nodes"] == everybody for node in self.nodes), 30)
        for master, replica in zip(masters, self.nodes[MASTERS:], strict=True):
            replica.ask("CLUSTER", "REPLICATE", master.node_id)
        self.wait_until_whole()

    def stop(self) -> None:
        """Stop all nodes."""
        for node in self.nodes:
            node.client.close()
            node.stop()

    def wait_until_whole(self) -> None:
        """Wait until every slot has a master, and every master a replica that follows it."""
        wait_until(
            lambda: all(node.state["cluster_state"] == "ok" for node in self.running), 30, "not every slot is held"
        )
        wait_until(lambda: len(self.followers) == len(self.running) - MASTERS, 30, "not every replica follows")

    @property
    def running(self) -> list[Node]:
        """The nodes that are not killed."""
        return [node for node in self.nodes if node.running]

    @property
    def masters(self) -> list[Node]:
        """The nodes that have slots."""
        return [node for node in self.running if node.client.info("replication")["role"] == "master"]

    @property
    def followers(self) -> list[Node]:
        """The replicas that are in step with their masters."""
        info = [(node, node.client.info("replication")) for node in self.running]
        return [node for node, it in info if it["role"] == "slave" and it["master_link_status"] == "up"]

    def keys(self, board: str) -> Keys:
        """The keys of the board's hash tag."""
        return Keys(tag=tag_of(board))

    def master_of(self, board: str) -> Node:
        """Where a board is now, as its master says."""
        slot = self.keys(board).slot
        for node in self.running:
            for first, last, (_, port, *_), *_ in node.ask("CLUSTER", "SLOTS"):
                if first <= slot <= last and port == node.port:
                    return node
        raise AssertionError(f"nobody has the board {board}")

    def scores(self, board: str) -> dict[str, int]:
        """Scores by player, after a check that score keys and leaderboard say the same."""
        client, keys = self.master_of(board).client, self.keys(board).board(board)
        ranked: Any = client.zrange(keys.leaderboard, 0, -1, withscores=True)
        found = {player.decode(): int(score) for player, score in ranked}
        assert found == {player: int(client.get(keys.score(player)) or 0) for player in found}
        return found

    def last_ms(self, board: str) -> int:
        """The Unix time in the last id of the board's outbox."""
        state: Any = self.master_of(board).client.xinfo_stream(self.keys(board).outbox)
        return int(state["last-generated-id"].split(b"-")[0])

    def begin_move(self, board: str, target: Node) -> Node:
        """Let the board's slot be one that moves to `target`, with all keys still where they were; returns there."""
        slot, source = self.keys(board).slot, self.master_of(board)
        target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", source.node_id)
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", target.node_id)
        return source

    def move_keys(self, board: str, source: Node, target: Node, count: int) -> int:
        """Move some keys of the board's slot; how many that were."""
        keys = source.ask("CLUSTER", "GETKEYSINSLOT", self.keys(board).slot, count)
        if keys:
            source.ask("MIGRATE", target.host, target.port, "", 0, 5000, "KEYS", *keys)
        return len(keys)

    def end_move(self, board: str, owner: Node) -> None:
        """Tell everybody who has the board's slot from now on, its new owner first."""
        slot = self.keys(board).slot
        for node in sorted(self.masters, key=lambda each: each is not owner):
            node.ask("CLUSTER", "SETSLOT", slot, "NODE", owner.node_id)
