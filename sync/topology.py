"""Where Redis is: as the settings say, or the master of a slot, for which any node of the cluster is asked anew."""

from __future__ import annotations

import random
from typing import Final

import redis

from server.config import Settings
from server.errors import NotReady
from server.keys import Keys, TaggedKeys
from server.slots import Address, SlotMap, check_mode, check_refusal, seeds
from sync.outbox import connect

_learned: Final[dict[tuple[str, int], set[Address]]] = {}
"""Nodes that were heard of, by REDIS_HOST and REDIS_PORT: those named there may have gone since."""


def keys_in_use(settings: Settings) -> list[Keys]:
    """The keys of every outbox: one, or in a cluster one for each hash tag that has a board."""
    if not settings.redis_cluster:
        return [Keys(settings.redis_key_prefix)]
    return list(TaggedKeys(settings.redis_key_prefix, settings.boards).by_tag.values())


def connect_to(settings: Settings, keys: Keys) -> redis.Redis:
    """A client of the Redis that holds these keys.

    Raises redis.ConnectionError, also when that Redis is not what REDIS_CLUSTER says.
    """
    try:
        if settings.redis_cluster:
            return connect(settings, _master_of(settings, keys.slot))
        client = connect(settings)
        found = client.info("cluster").get("cluster_enabled", 0)
        check_mode(wanted=False, found=bool(found))
    except NotReady as error:
        raise redis.ConnectionError(str(error)) from error
    return client


def _master_of(settings: Settings, slot: int) -> Address:
    known = _learned.setdefault((settings.redis_host, settings.redis_port), set())
    nodes = list({*seeds(settings.redis_host, settings.redis_port), *known})
    random.shuffle(nodes)  # one that was cut off from the others must not be asked for ever
    failure: Exception | None = None
    for node in nodes:
        try:
            with connect(settings, node) as client:
                found = SlotMap(client.execute_command("CLUSTER", "SLOTS"), node)
        except redis.RedisError as error:
            check_refusal(str(error))
            failure = error
            continue
        known |= found.nodes
        return found.master_of(slot)
    tried = ", ".join(f"{host}:{port}" for host, port in sorted(nodes))
    raise NotReady(f"no node of the Redis Cluster answers, tried {tried}: {failure}")
