"""Players on the board main, as the server would have put them there: through its script, batch by batch.

So Redis holds the very keys that it holds in production. What the outbox would owe Kafka is deleted: nothing may read
it meanwhile.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import redis

import server.scores
from server.batches import APPLIED, Lane, Script, Updates, read_reply
from server.config import Settings
from server.events import MAX_BATCH
from server.keys import Keys

BATCHES_AT_ONCE: Final = 32
HIGHEST_SCORE: Final = 1_000_000

_SCRIPT: Final = Path(server.scores.__file__).with_name("apply_updates.lua").read_text()


def player_name(number: int) -> str:
    """Of one length, and no hint of the score."""
    return f"player-{number:09d}"


def fill(client: redis.Redis, numbers: range, settings: Settings, say: Callable[[int], None]) -> None:
    """Let each of these new players score once; `say` gets how many have.

    Raises RuntimeError when the script refuses, as it does where Redis was not verified.
    """
    keys = Keys(settings.redis_key_prefix)
    epoch: Any = client.hget(keys.ready, "epoch")
    lane = Lane(keys.board("main"), keys.session("bench"))
    script, sha = Script(settings, keys), client.script_load(_SCRIPT)
    pipeline = client.pipeline(transaction=False)
    for first in numbers[:: MAX_BATCH * BATCHES_AT_ONCE]:
        some = range(first, min(first + MAX_BATCH * BATCHES_AT_ONCE, numbers.stop))
        for updates in _updates(lane, some):
            lane.number += 1
            pipeline.evalsha(sha, 1, keys.outbox, script.argument(lane, epoch.decode(), updates))
        pipeline.xtrim(keys.outbox, maxlen=0, approximate=False)
        *replies, _ = pipeline.execute()
        for reply in replies:
            state, results = read_reply(reply)
            if state != APPLIED or any(results[::2]):
                raise RuntimeError(f"expected every update to be applied, got {state}, {results[:4]}")
        say(some.stop)
    client.delete(lane.session)


def _updates(lane: Lane, numbers: range) -> Iterator[Updates]:
    rng = random.Random(numbers.start)
    for first in numbers[::MAX_BATCH]:
        some = Updates()
        for number in range(first, min(first + MAX_BATCH, numbers.stop)):
            player = player_name(number)
            some.players.append(player)
            some.score_keys.append(lane.keys.score(player))
            some.deltas.append(rng.randint(1, HIGHEST_SCORE))
            some.subjects.append(player)
            some.which.append(0)
            some.keys.append(None)
        yield some
