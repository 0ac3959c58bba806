"""Where the masters of a Redis Cluster are, asked anew for each connection: who answers also says who else there is."""

from __future__ import annotations

import random
from typing import Final

import hiredis

from server.config import Settings
from server.errors import NotReady
from server.redis_connection import open_connection
from server.slots import Address, SlotMap, check_refusal, seeds

_UNREACHABLE: Final = (OSError, TimeoutError, hiredis.HiredisError)


class Topology:
    """The nodes of one cluster that are known so far."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._seeds = seeds(settings.redis_host, settings.redis_port)
        self._learned: set[Address] = set()

    async def master_of(self, slot: int) -> Address:
        """The master of a slot, as some node knows it that answers.

        Raises NotReady when no node answers, or the master is not known.
        """
        nodes = list({*self._seeds, *self._learned})
        # In any order: one that was cut off from the others knows only what was, and must not be asked for ever.
        random.shuffle(nodes)
        failure: BaseException | None = None
        for node in nodes:
            try:
                found = await self._ask(node)
            except _UNREACHABLE as error:
                check_refusal(str(error))
                failure = error
                continue
            self._learned = found.nodes
            return found.master_of(slot)
        tried = ", ".join(f"{host}:{port}" for host, port in sorted(nodes))
        raise NotReady(f"no node of the Redis Cluster answers, tried {tried}: {failure}")

    async def _ask(self, node: Address) -> SlotMap:
        connection = await open_connection(self._settings, lambda lost: None, node)
        try:
            return SlotMap(await connection.execute("CLUSTER", "SLOTS"), node)
        finally:
            connection.close()
