"""What relay and persister measure, as Prometheus gets it: read on another thread, from plain attributes only."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from server.instruments import counter, gauge, histogram
from sync.persister import Persister
from sync.redis_time import RedisTime
from sync.relay import Relays


class RelayMetrics(Collector):
    """Collects the figures of a relay process: sums over its outboxes, and the worst of their lags."""

    def __init__(self, relays: Relays) -> None:
        self._relays = relays

    def collect(self) -> Iterator[Metric]:
        """prometheus_client: all metrics of ours."""
        relays = self._relays.all
        events, letters = self._relays.relayed_events, self._relays.dead_letters
        yield counter("scoreboard_relay_events", "Events given to Kafka; repeated ones count again.", events)
        yield counter("scoreboard_relay_dead_letters", "Outbox entries put aside: they hold no events.", letters)
        lost = sum(relay.turns_lost for relay in relays)
        yield counter("scoreboard_relay_turns_lost", "Times that a lease was lost or the epoch rose.", lost)
        yield gauge("scoreboard_relay_outboxes", "Outboxes there are: 1, or one for each hash tag in use.", len(relays))
        held = sum(relay.holds_lease for relay in relays)
        yield gauge("scoreboard_relay_lease_held", "Outboxes of which this relay has the lease.", held)
        entries = sum(relay.outbox_entries for relay in relays)
        yield gauge("scoreboard_relay_outbox_entries", "Entries in the outboxes that it relays.", entries)
        lag_s = max(relay.lag_s for relay in relays)
        yield gauge("scoreboard_relay_lag_seconds", "Age of the oldest entry not confirmed by Kafka; 0: none.", lag_s)
        redis_up = not any(relay.redis_outage.goes_on for relay in relays)
        yield gauge("scoreboard_relay_redis_up", "Whether Redis answered when it was last needed.", redis_up)
        kafka_up = not any(relay.kafka_outage.goes_on for relay in relays)
        yield gauge("scoreboard_relay_kafka_up", "Whether Kafka answered when it was last needed.", kafka_up)


class PersisterMetrics(Collector):
    """Collects the figures of a persister process."""

    def __init__(self, persister: Persister, redis_time: RedisTime) -> None:
        self._persister = persister
        self._redis_time = redis_time

    def collect(self) -> Iterator[Metric]:
        """prometheus_client: all metrics of ours."""
        it = self._persister
        self._redis_time.ask()
        yield counter("scoreboard_persister_events", "Events stored that were not stored before.", it.persisted_events)
        yield histogram("scoreboard_persister_batch_events", "Events in a batch for the database.", it.batch_events)
        yield histogram("scoreboard_persister_batch_seconds", "What the database took for a batch.", it.batch_s)
        yield gauge("scoreboard_persister_lag_events", "Records to the end of what it reads from Kafka.", it.lag_events)
        # In this order: the persister sets the one before it clears the other.
        lag_s = max(it.clock.age_s(it.in_hand_since_ms), it.clock.age_s(it.behind_since_ms))
        yield gauge("scoreboard_persister_lag_seconds", "Age of the oldest event not stored; 0: none.", lag_s)
        yield counter("scoreboard_persister_dead_letters", "Records put aside: they cannot be stored.", it.dead_letters)
        voids = it.void_events
        yield counter("scoreboard_persister_void_events", "Events that Redis had lost before Kafka had them.", voids)
        breaks = it.chain.breaks
        yield counter("scoreboard_persister_chain_breaks", "Scores that do not go on from the one before.", breaks)
        yield counter("scoreboard_persister_outages", "Times that database or Kafka was waited for.", it.outages)
        database_up = not it.database_outage.goes_on
        yield gauge("scoreboard_persister_database_up", "Whether the database answered when last needed.", database_up)
        kafka_up = not it.kafka_outage.goes_on
        yield gauge("scoreboard_persister_kafka_up", "Whether Kafka answered when it was last needed.", kafka_up)
