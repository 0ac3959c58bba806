"""What the server measures, as Prometheus gets it."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from server.instruments import answers, counter, gauge, histogram
from server.live import Live
from server.scores import Scores
from server.shards import Shards
from server.uws import Server


class ServerMetrics(Collector):
    """Collects the figures of one server process when asked, also on another thread than the loop's."""

    def __init__(self, server: Server, scores: Scores | Shards, live: Live) -> None:
        self._server = server
        self._scores = scores
        self._live = live

    def collect(self) -> Iterator[Metric]:
        """prometheus_client: all metrics of ours."""
        yield from answers(list(self._server.answers.items()))
        yield gauge("scoreboard_draining", "Whether SIGTERM was received.", self._server.draining)
        yield from self._of_redis()
        yield from self._of_live()

    def _of_redis(self) -> Iterator[Metric]:
        scores, figures = self._scores, self._scores.figures
        yield histogram("scoreboard_batch_updates", "Updates in a batch sent to Redis.", figures.batch_updates)
        yield histogram("scoreboard_redis_round_trip_seconds", "From a batch to its reply.", figures.round_trip_s)
        ready = scores.epoch is not None
        yield gauge("scoreboard_redis_ready", "Whether Redis is there and verified.", ready)
        yield gauge("scoreboard_write_ready", "Whether updates are accepted.", ready and not scores.outbox_full)
        yield gauge("scoreboard_outbox_bytes", "What Redis holds for Kafka.", scores.outbox_bytes)
        used = scores.outbox_used
        yield gauge("scoreboard_outbox_used_ratio", "Part of OUTBOX_MAX_BYTES in use; above 1 updates stop.", used)
        since_s = scores.outbox_since_s
        oldest_s = 0.0 if since_s is None else max(0.0, time.monotonic() - since_s)
        yield gauge("scoreboard_outbox_oldest_age_seconds", "Age of what is owed to Kafka for longest.", oldest_s)
        yield counter("scoreboard_rebuilds", "Times that this server rebuilt Redis.", figures.rebuilds)
        yield counter("scoreboard_replays", "Times that it gave Redis back what that had lost.", figures.replays)
        yield gauge("scoreboard_mending", "Rebuilds and replays that go on in this server.", figures.mending)

    def _of_live(self) -> Iterator[Metric]:
        live = self._live
        yield gauge("scoreboard_live_ready", "Whether events arrive from Kafka.", live.is_live)
        yield gauge("scoreboard_live_connections", "WebSocket connections.", live.connections)
        yield gauge("scoreboard_live_lagging", "Connections that do not keep up.", live.lagging)
        yield counter("scoreboard_live_resyncs", "Whole lists sent to connections that lagged.", live.resyncs)
        yield counter("scoreboard_live_dismissed", "Connections closed for lagging too long.", live.dismissed)
        yield histogram("scoreboard_live_flush_seconds", "What a flush takes of the loop's time.", live.flush_s)
        yield counter("scoreboard_live_changes", "Changed scores in the events that arrived.", live.changes)
        skipped = live.score_updates_skipped
        yield counter("scoreboard_live_score_updates_skipped", "Scores left out of a flush that had too many.", skipped)
        yield histogram("scoreboard_feed_delay_seconds", "From a change to its event's arrival.", live.feed_delay_s)
