"""The live board's feed: who changed comes through, whatever else is in the topic."""

from __future__ import annotations

import asyncio
import logging

import pytest

from server.config import Settings
from server.event_feed import EventFeed
from server.events import MAX_BOARD, MAX_PLAYER
from sync.topics import ensure_topics
from tests.odd_records import put_odd_records
from tests.services import KafkaBroker
from tests.sync_parts import event, put_records

pytestmark = pytest.mark.kafka


def test_odd_records_hold_up_nobody(
    kafka_broker: KafkaBroker, kafka_topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(kafka_brokers=kafka_broker.brokers, kafka_topic=kafka_topic, kafka_partitions=1)
    ensure_topics(settings)
    changed: set[tuple[str, str]] = set()

    async def watch() -> None:
        reading, told = asyncio.Event(), asyncio.Event()

        def on_changed(changes: set[tuple[str, str]], _: int | None) -> None:
            changed.update(changes)
            if ("main", "ann") in changed:
                told.set()

        feed = EventFeed(settings, on_changed, reading.set)
        feed.watch(True)
        feed.start()
        try:
            async with asyncio.timeout(30):
                await reading.wait()
                await asyncio.to_thread(put_odd_records, settings)
                await asyncio.to_thread(put_records, settings, [event("ann", 1000)])
                await told.wait()
        finally:
            feed.stop()
            await asyncio.to_thread(feed.join, 10)

    with caplog.at_level(logging.WARNING):
        asyncio.run(watch())
    assert "beginning again" not in caplog.text
    assert all(len(board) <= MAX_BOARD and len(player) <= MAX_PLAYER for board, player in changed)
