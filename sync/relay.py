"""The relay: moves the outbox into Kafka.

What is in the outbox is what is owed. It is read from its beginning, produced in order, and trimmed through
exactly the prefix that Kafka has confirmed. Whatever is lost (Redis, its epoch, Kafka for good, the lease), the
answer is the same: begin again at the outbox's beginning. Events are then produced twice, which their versions make
harmless; none is left out. Each carries the epoch of the Redis it was read from, so that what that Redis has lost
since does not count (server/fences.py). In front of a broker that forgets, an entry is owed until it is stored
(sync/pacing.py). Knows nothing of scores.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import redis
from confluent_kafka import KafkaError, KafkaException, Message

from server.config import Settings
from server.events import (
    FORMAT_VERSION,
    MEMORY_HEADER,
    BadEvent,
    ScoreEvent,
    encode_event,
    events_of_entry,
    memories_of_entry,
)
from server.fences import EPOCH_HEADER, TAG_HEADER
from server.kafka_clients import is_refusal, refusal
from server.keys import Keys
from server.redis_clock import RedisClock
from sync.kafka import MAX_IN_FLIGHT, new_producer
from sync.lease import RENEW_EVERY_S, Lease
from sync.outbox import Entry, Outbox
from sync.pacing import Progress
from sync.topology import connect_to, keys_in_use
from sync.waiting import Outage, Stop

DRAIN_WITHIN_S: Final = 5.0
"""How long a relay that was asked to stop waits for Kafka's last confirmations."""

SILENT_AFTER_S: Final = 5.0
"""How long Kafka may confirm nothing of what is owed before that is worth a line in the log."""

LONGEST_GATHER_S: Final = 0.02
GATHER_S_PER_RATE: Final = 0.01 / 1000
"""Entries gather for 10 ms per 1000 events/s, 20 ms at most: a lone event leaves at once, while a load costs fewer
reads, and fewer requests to the broker, than it has entries. (A request carries one partition, and costs the broker
far more than the events in it: at 2,000/s it used 0.48 of a core with 2 ms, 0.35 with 5 ms, 0.23 with 10 ms.)"""

TRIM_EVERY_S: Final = 0.02
LOOK_EVERY_S: Final = 0.005
"""How often Kafka's confirmations are collected while some are due; nobody waits for them but the trimming."""

IDLE_S: Final = 0.1
PACED_S: Final = 0.01
"""How often it is looked whether the database has come further."""

RECORD_BYTES: Final = 150
"""What a broker keeps of a record beside key, value and memory: headers, lengths, its share of a batch's head."""

LARGEST_DEAD_LETTER_BYTES: Final = 512 * 1024
"""Half of what a broker takes by default, tried first: not even a monstrous entry may block the outbox."""

_log = logging.getLogger("sync.relay")


class Relays:
    """Relays every outbox there is: one, or in a Redis Cluster one for each hash tag in use, each by a thread."""

    def __init__(self, settings: Settings, stop: Stop) -> None:
        in_use = keys_in_use(settings)
        share = dataclasses.replace(settings, relay_ahead_bytes=settings.relay_ahead_bytes // len(in_use))
        self.all = [Relay(share, stop, keys) for keys in in_use]
        self._stop = stop
        self._failures: list[Exception] = []

    @property
    def relayed_events(self) -> int:
        """Events produced since the start."""
        return sum(relay.relayed_events for relay in self.all)

    @property
    def dead_letters(self) -> int:
        """Entries put aside since the start."""
        return sum(relay.dead_letters for relay in self.all)

    @property
    def kafka_outage(self) -> Outage:
        """For whoever waits for Kafka before there is anything to relay."""
        return self.all[0].kafka_outage

    def run(self) -> None:
        """Return when asked to stop, with everything confirmed trimmed and the leases given back.

        Raises what any of the threads does not expect, once all have stopped.
        """
        first, *others = self.all
        threads = [threading.Thread(target=self._run, args=(relay,), name="relay") for relay in others]
        for thread in threads:
            thread.start()
        self._run(first)  # on the thread that gets the signals
        for thread in threads:
            thread.join()
        if self._failures:
            raise self._failures[0]

    def _run(self, relay: Relay) -> None:
        try:
            relay.run()
        except Exception as error:
            self._failures.append(error)
            self._stop.request()  # rather none than some: whoever started us begins again


class Relay:
    """Relays one outbox until it is asked to stop, while it has the lease; outages are waited through."""

    def __init__(self, settings: Settings, stop: Stop, keys: Keys | None = None) -> None:
        """`keys` are those of the outbox; without them it is that of a Redis which is no cluster."""
        self.relayed_events = 0
        self.dead_letters = 0
        self.turns_lost = 0
        self.holds_lease = False
        self.outbox_entries = 0
        """As of a moment ago; 0 while another relay has the lease."""
        self.oldest_entry: str | None = None
        """The first one that Kafka has not confirmed, as far as we have read; kept while Redis is away."""
        self.oldest_since_s = time.monotonic()
        """Since when that is the first one, by the monotonic clock."""
        self.clock = RedisClock()
        self._settings = settings
        self._keys = keys or Keys(settings.redis_key_prefix)
        self._stop = stop
        self._token = secrets.token_hex(16)  # one for good: after an outage our own lease keeps nobody waiting
        self.redis_outage = Outage(f"Redis with hash tag {self._keys.tag}" if self._keys.tag else "Redis", _log)
        self.kafka_outage = Outage("Kafka", _log, is_refusal)
        self.persister_outage = Outage("the persister", _log)
        """Only where the relay waits for it."""

    @property
    def lag_s(self) -> float:
        """Age of the oldest entry; one with an id in the future is at least as old as it is the oldest."""
        entry_id = self.oldest_entry
        if entry_id is None:
            return 0.0
        return max(self.clock.age_s(int(entry_id.split("-")[0])), time.monotonic() - self.oldest_since_s)

    def note_oldest(self, entry_id: str | None) -> None:
        """Take the first entry that Kafka has not confirmed; a new turn may find the one that was it before."""
        if entry_id != self.oldest_entry:
            self.oldest_since_s = time.monotonic()  # first, for another thread reads both
            self.oldest_entry = entry_id

    def run(self) -> None:
        """Return when asked to stop, with everything confirmed trimmed and the lease given back."""
        while not self._stop.requested:
            try:
                self._take_turn()
            except redis.RedisError as error:
                self._stop.wait(self.redis_outage.failed(error))
            except KafkaException as error:
                self._stop.wait(self.kafka_outage.failed(error))
        _log.info("stopped: %d events relayed, %d dead letters", self.relayed_events, self.dead_letters)

    def _take_turn(self) -> None:
        client, keys = connect_to(self._settings, self._keys), self._keys
        lease = Lease(client, keys.relay_lease, self._token)
        try:
            if self._wait_for(lease, lambda: bool(client.exists(keys.ready))):
                self._relay(lease, Outbox(client, keys))
            lease.release()
        finally:
            self.holds_lease = False
            client.close()

    def _relay(self, lease: Lease, outbox: Outbox) -> None:
        what = f", hash tag {self._keys.tag}" if self._keys.tag else ""
        _log.info("relaying to %s, epoch %s%s", self._settings.kafka_topic, outbox.epoch.decode(), what)
        with contextlib.closing(outbox), contextlib.ExitStack() as stack:
            progress = None
            if self._settings.relay_ahead_bytes:
                progress = stack.enter_context(contextlib.closing(Progress(self._settings)))
            turn = _Turn(self, self._settings, lease, outbox, progress, self._keys.tag)
            try:
                turn.relay_until(self._stop)
            finally:
                turn.abandon()

    def _wait_for(self, lease: Lease, has_epoch: Callable[[], bool]) -> bool:
        """Return with the lease, of a Redis that a server has verified before; False if asked to stop first."""
        told = ""
        while not self._stop.requested:
            why = ""
            self.holds_lease = lease.hold()
            if not self.holds_lease:
                self.outbox_entries, self.oldest_entry = 0, None  # now it is the other one that tells
                why = "another relay has the lease; waiting for it"
            elif not has_epoch():
                why = "Redis has no scoreboard; waiting for a server to fill it"
            self.redis_outage.over()
            if not why:
                return True
            if why != told:
                told = why
                _log.info("%s", why)
            self._stop.wait(IDLE_S)
        return False


class _Owed:
    """An entry on its way: it leaves the outbox once Kafka has confirmed each of its records.

    Where the relay is paced, it also has to be stored: `size_bytes` of it wait at `offsets`, by partition.
    """

    __slots__ = ("entry_id", "error", "offsets", "size_bytes", "unconfirmed")

    def __init__(self, entry_id: str, records: int) -> None:
        self.entry_id = entry_id
        self.unconfirmed = records
        self.error: KafkaError | None = None
        self.size_bytes = 0
        self.offsets: dict[int, int] = {}

    def answered(self, error: KafkaError | None, _: object) -> None:
        """Kafka's answer to one record."""
        if error is None:
            self.unconfirmed -= 1
        else:
            self.error = error

    def placed(self, error: KafkaError | None, message: Message) -> None:
        """The same, where it matters at which offset the record is."""
        if error is None:
            partition, offset = message.partition(), message.offset()
            if partition is None or offset is None:
                # It was sent once more, and Kafka had it already: then nobody says where. Another turn sends it anew.
                error = KafkaError(KafkaError._FAIL, "it is not known where Kafka has a record")
            else:
                self.offsets[partition] = max(offset, self.offsets.get(partition, 0))
        self.answered(error, message)


class _Turn:
    """From the outbox's beginning to the loss of Redis, its epoch, the producer or the lease, or to the end of all."""

    def __init__(
        self, relay: Relay, settings: Settings, lease: Lease, outbox: Outbox, progress: Progress | None, tag: str
    ) -> None:
        self._relay = relay
        self._topic = settings.kafka_topic
        self._dead_letter_topic = settings.dead_letter_topic
        self._lease = lease
        self._outbox = outbox
        self._producer = new_producer(settings, self._on_error)
        self._headers: list[tuple[str, str | bytes | None]] = [("v", FORMAT_VERSION), (EPOCH_HEADER, outbox.epoch)]
        if tag:
            self._headers.append((TAG_HEADER, tag))
        self._ahead_limit = settings.relay_ahead_bytes
        self._ahead_bytes = 0
        self._progress = progress
        self._owed: deque[_Owed] = deque()
        self._done_through: str | None = None
        self._goes_on = True
        now = time.monotonic()
        self._renew_at = now + RENEW_EVERY_S
        self._trim_at = now
        self._progress_at = now
        self._read_at = now
        self._produced_before = relay.relayed_events
        self._rate = 0.0
        self._count()

    def relay_until(self, stop: Stop) -> None:
        """Move entries as they come; returns when asked to stop, and when the lease is lost or the epoch rises.

        Raises RedisError and KafkaException.
        """
        while self._goes_on and not stop.requested:
            due = bool(self._owed) or self._done_through is not None
            entries = self._outbox.arrived(LOOK_EVERY_S if due else IDLE_S)
            for entry in entries:
                if not self._make_room(stop) or (self._progress and not self._wait_for_persister(entry, stop)):
                    break
                self._produce(entry)
            self._producer.poll(0)
            self._tend()
            if entries:
                self._gather()
        self._drain()

    def abandon(self) -> None:
        """Forget what Kafka has not confirmed; the next turn finds it in the outbox."""
        if self._owed:
            self._producer.purge()
            self._producer.poll(0)

    def _make_room(self, stop: Stop) -> bool:
        while len(self._producer) > MAX_IN_FLIGHT - 1000:
            self._producer.poll(IDLE_S)
            self._tend()
            if stop.requested or not self._goes_on:
                return False
        return True

    def _wait_for_persister(self, entry: Entry, stop: Stop) -> bool:
        """Wait until the database is near enough; False if the turn ended before it was."""
        assert self._progress is not None  # called where the relay is paced
        while self._ahead_bytes >= self._ahead_limit or not self._progress.covers_what_was_there():
            if not self._owed:
                self._relay.note_oldest(entry.entry_id)
            self._producer.poll(PACED_S)
            self._tend()
            if stop.requested or not self._goes_on:
                return False
        return True

    def _gather(self) -> None:
        now = time.monotonic()
        produced = self._relay.relayed_events
        rate = (produced - self._produced_before) / max(now - self._read_at, 1e-4)
        self._rate += 0.2 * (rate - self._rate)
        self._read_at, self._produced_before = now, produced
        time.sleep(min(self._rate * GATHER_S_PER_RATE, LONGEST_GATHER_S))

    def _produce(self, entry: Entry) -> None:
        if not self._owed:
            self._progress_at = time.monotonic()
            self._relay.note_oldest(entry.entry_id)
        try:
            if entry.payload is None:
                raise BadEvent("expected the field `batch`")
            events = events_of_entry(entry.entry_id, entry.payload)
            memories = memories_of_entry(entry.memory, len(events))
        except BadEvent as error:
            self._set_aside(entry, error)
            return
        owed = _Owed(entry.entry_id, len(events))
        self._owed.append(owed)
        self._produce_events(events, memories, owed)

    def _produce_events(self, events: list[ScoreEvent], memories: dict[int, str], owed: _Owed) -> None:
        produce, topic = self._producer.produce, self._topic
        answered: Callable[[KafkaError | None, Message], None] = owed.answered
        headers = self._headers
        if self._progress:
            answered = owed.placed
            owed.size_bytes = _size_bytes(events, memories)
            self._ahead_bytes += owed.size_bytes
        for index, event in enumerate(events):
            if memories:
                memory = memories.get(index)
                headers = [*self._headers, (MEMORY_HEADER, memory)] if memory else self._headers
            # Positional: topic, value, key, partition, callback, on_delivery, timestamp, headers.
            produce(topic, encode_event(event), event.player_id, -1, answered, None, event.at, headers)
        self._relay.relayed_events += len(events)

    def _set_aside(self, entry: Entry, reason: BadEvent) -> None:
        owed = _Owed(entry.entry_id, 1)
        self._owed.append(owed)
        headers: list[tuple[str, Any]] = [("reason", str(reason).encode(errors="replace")), ("outbox", entry.entry_id)]
        self._produce_letter(owed, (entry.payload or b"")[:LARGEST_DEAD_LETTER_BYTES], headers)
        self._relay.dead_letters += 1
        _log.error("outbox entry %s goes to %s: %s", entry.entry_id, self._dead_letter_topic, reason)

    def _produce_letter(self, owed: _Owed, payload: bytes, headers: list[tuple[str, Any]]) -> None:
        def answered(error: KafkaError | None, message: object) -> None:
            if error is not None and error.code() == KafkaError.MSG_SIZE_TOO_LARGE and payload:
                self._produce_letter(owed, payload[: len(payload) // 8], headers)
            else:
                owed.answered(error, message)

        self._producer.produce(self._dead_letter_topic, payload, on_delivery=answered, headers=headers)

    def _tend(self) -> None:
        now = time.monotonic()
        self._collect(now)
        if self._done_through is not None and now >= self._trim_at:
            self._trim()
            self._trim_at = now + TRIM_EVERY_S
        if now >= self._renew_at:
            self._renew_at = now + RENEW_EVERY_S
            if self._lease.hold():
                self._count()
            else:
                self._end("another relay took the lease while this one was slow")
        if self._owed and now > self._progress_at + SILENT_AFTER_S:
            if self._owed[0].unconfirmed:
                self._relay.kafka_outage.failed(f"nothing confirmed for {SILENT_AFTER_S:.0f} s")
            else:
                self._relay.persister_outage.failed(f"nothing stored for {SILENT_AFTER_S:.0f} s")

    def _count(self) -> None:
        self._outbox.ask_time(self._relay.clock)
        self._relay.outbox_entries = self._outbox.length()
        if not self._relay.outbox_entries and not self._owed:
            self._relay.note_oldest(None)  # another relay may have dealt with what we left

    def _collect(self, now: float) -> None:
        owed, progress, done = self._owed, self._progress, None
        while owed and not owed[0].unconfirmed:
            self._relay.kafka_outage.over()
            if progress:
                if not progress.covers(owed[0].offsets):
                    break
                self._ahead_bytes -= owed[0].size_bytes
                self._relay.persister_outage.over()
            done = owed.popleft().entry_id
        if done is not None:
            self._done_through = done
            self._relay.note_oldest(owed[0].entry_id if owed else None)
            self._progress_at = now
        if owed and owed[0].error is not None:
            raise KafkaException(refusal(owed[0].error) or owed[0].error)

    def _trim(self) -> None:
        assert self._done_through is not None  # called when there is something to trim
        if not self._outbox.trim_through(self._done_through):
            self._end("Redis is of another epoch now; relaying the outbox from its beginning")
        self._done_through = None

    def _end(self, why: str) -> None:
        self._goes_on = False
        self._relay.turns_lost += 1
        _log.warning("%s", why)

    def _drain(self) -> None:
        deadline = time.monotonic() + DRAIN_WITHIN_S
        while self._owed and self._goes_on and time.monotonic() < deadline:
            self._producer.poll(LOOK_EVERY_S)
            self._tend()
        if self._done_through is not None:
            self._trim()
        if self._owed:
            _log.info("%d entries stay in the outbox, not confirmed by Kafka", len(self._owed))

    def _on_error(self, error: KafkaError) -> None:
        # A fatal error fails every record that is owed, which ends the turn: here it only has to be said.
        self._relay.kafka_outage.failed(error)


def _size_bytes(events: list[ScoreEvent], memories: dict[int, str]) -> int:
    """About what a broker needs for these events, rather more than less."""
    encoded = sum(len(encode_event(event)) + len(event.player_id.encode()) for event in events)
    return encoded + sum(len(memory.encode()) for memory in memories.values()) + RECORD_BYTES * len(events)
