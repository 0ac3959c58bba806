"""Chain breaks: what is missing between two events of a player is seen, and what comes twice is not taken for it."""

from __future__ import annotations

import random

from server.events import ScoreEvent
from sync.chain import Chain


def events_of(player: str, count: int, first_ms: int = 1000, board: str = "main") -> list[ScoreEvent]:
    """Deltas of 3 from 0 on, several of them in one millisecond."""
    return [
        ScoreEvent(f"{first_ms + i // 3}-{i % 3}-7", board, player, 3, 3 * (i + 1), first_ms + i // 3)
        for i in range(count)
    ]


def breaks_in(*batches: list[ScoreEvent]) -> int:
    chain = Chain()
    for batch in batches:
        chain.follow(batch)
    return chain.breaks


def test_chain_is_whole_however_it_is_cut_into_batches() -> None:
    events = events_of("ann", 20)
    for cut in range(20):
        assert breaks_in(events[:cut], events[cut:]) == 0


def test_each_gap_is_one_break() -> None:
    events = events_of("ann", 20)
    del events[15], events[7:9], events[2]
    assert breaks_in(events) == 3
    assert breaks_in(events[:7], events[7:]) == 3


def test_players_and_boards_are_told_apart() -> None:
    events = [*events_of("ann", 30), *events_of("bob", 30), *events_of("ann", 30, board="weekly")]
    random.Random(1).shuffle(events)
    assert breaks_in(sorted(events, key=lambda event: event.version)) == 0


def test_first_event_that_is_seen_of_a_player_is_none() -> None:
    assert breaks_in(events_of("ann", 20)[10:]) == 0


def test_events_that_come_once_more_are_none() -> None:
    events = events_of("ann", 20)
    assert breaks_in(events, events) == 0
    assert breaks_in(events[:12], events[4:15], events[10:]) == 0
    assert breaks_in(events, events[4:9], events_of("ann", 25)[20:]) == 0


def test_change_and_its_reverse_that_come_once_more_are_none() -> None:
    up, down, up_again = (
        ScoreEvent("1000-0-0", "main", "ann", 1, 1, 1000),
        ScoreEvent("1000-1-0", "main", "ann", -1, 0, 1000),
        ScoreEvent("1001-0-0", "main", "ann", 1, 1, 1001),
    )
    assert breaks_in([up, down, up, down, up_again]) == 0
    assert breaks_in([up, down, up, up_again]) == 0


def test_gap_is_seen_between_many_players_as_well() -> None:
    chain = Chain(players=100)
    crowd = [events_of(f"player{number}", 3) for number in range(90)]
    for turn in range(2):
        chain.follow([events[turn] for events in crowd])
    crowd[17].insert(2, ScoreEvent("1000-9-0", "main", "player17", 3, 12, 1000))
    chain.follow([events[2] for events in crowd])
    assert chain.breaks == 1


def test_players_of_long_ago_are_forgotten_and_their_next_event_is_taken_as_it_comes() -> None:
    chain = Chain(players=10)
    ann = events_of("ann", 3)
    chain.follow(ann[:1])
    chain.follow([events_of(f"player{number}", 1)[0] for number in range(9)])
    chain.follow(ann[2:])  # still known: a break
    assert chain.breaks == 1
    chain.follow([events_of(f"other{number}", 1)[0] for number in range(20)])
    chain.follow(events_of("ann", 9)[8:])
    assert chain.breaks == 1


def test_nothing_is_known_after_other_partitions_were_given() -> None:
    chain, events = Chain(), events_of("ann", 9)
    chain.follow(events[:3])
    chain.forget()
    chain.follow(events[6:])
    assert chain.breaks == 0
