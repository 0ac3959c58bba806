"""What the live benchmark counts: frames however they are cut, and of each change the delay that is its own."""

from __future__ import annotations

import asyncio

import pytest

from bench.live import delays
from bench.posters import LEADERS, Log
from bench.watchers import ACCEPT, Chunk, Crowd, Watcher

LIST = b'{"type":"leaderboardUpdate","board":"main","seq":%d,"topScores":[{"playerId":"leader0","score":%d}]}'
SCORE = b'{"type":"scoreUpdate","board":"main","playerId":"leader0","newScore":7}'
MS = 1_000_000


def frame(payload: bytes) -> bytes:
    """A text frame as servers send it."""
    length = len(payload)
    if length < 126:
        return bytes([0x81, length]) + payload
    if length < 65_536:
        return b"\x81\x7e" + length.to_bytes(2, "big") + payload
    return b"\x81\x7f" + length.to_bytes(8, "big") + payload


def watcher_that_got(data: bytes, piece_bytes: int) -> Watcher:
    async def receive() -> Watcher:
        crowd = Crowd(1, 1, "limit=10&scores=none")
        [watcher] = crowd.watchers
        head = b"HTTP/1.1 101 Switching Protocols\r\nSec-WebSocket-Accept: " + ACCEPT + b"\r\n\r\n"
        for begin in range(0, len(head), piece_bytes):
            watcher.data_received(head[begin : begin + piece_bytes])
        watcher.data_received(frame(LIST % (1, 1)))
        crowd.begin()
        for begin in range(0, len(data), piece_bytes):
            watcher.data_received(data[begin : begin + piece_bytes])
        return watcher

    return asyncio.run(receive())


@pytest.mark.parametrize("piece_bytes", [1, 2, 3, 130, 1000, 1_000_000])
def test_frames_are_counted_however_they_are_cut(piece_bytes: int) -> None:
    long, longest = LIST.replace(b"main", b"m" * 200) % (2, 2), LIST.replace(b"main", b"m" * 70_000) % (3, 3)
    messages = [SCORE, LIST % (1, 1), long, SCORE, longest, SCORE, SCORE]
    watcher = watcher_that_got(b"".join(map(frame, messages)), piece_bytes)
    assert (watcher.frames, watcher.boards) == (7, 3)
    told = [chunk.told("none") for _, chunk in watcher.arrivals]
    shown = [score for scores, _ in told for player, score in scores if player == "leader0"]
    assert shown == [7, 1, 2, 7, 3, 7, 7]


def test_same_bytes_again_count_again() -> None:
    data = frame(LIST % (2, 5))
    watcher = watcher_that_got(data * 3, len(data))
    assert (watcher.frames, watcher.boards) == (3, 3)
    assert len({id(chunk) for _, chunk in watcher.arrivals}) == 1


def test_skipped_changes_are_added_up() -> None:
    skipped = frame(b'{"type":"scoreUpdatesSkipped","count":40}')
    assert Chunk(skipped + frame(SCORE) + skipped).told("all") == ([("leader0", 7)], 80)


def log_of(*posts: tuple[int, int, int, int]) -> Log:
    """(player, new score, ms scheduled, ms answered) each."""
    log = Log()
    for player, new_score, scheduled_ms, answered_ms in posts:
        log.players.append(player)
        log.new_scores.append(new_score)
        log.scheduled_ns.append(scheduled_ms * MS)
        log.answered_ns.append(answered_ms * MS)
    return log


def test_changes_merged_into_one_frame_have_a_delay_each() -> None:
    log = log_of((0, 5, 10, 12), (0, 8, 20, 23), (1, 3, 21, 25))
    chunks = [([("leader0", 2)], 0), ([("leader0", 8), ("leader1", 3)], 0)]
    answers_ms, seen_ms, unseen = delays(log, chunks, [[(15 * MS, 0), (30 * MS, 1)]], 0, 100 * MS)
    assert list(answers_ms) == [2, 3, 4]
    assert sorted(seen_ms) == [9, 10, 20]
    assert unseen == 0


def test_first_frame_that_shows_a_change_counts_and_not_a_later_one() -> None:
    chunks = [([("leader0", 5)], 0), ([("leader0", 9)], 0)]
    _, seen_ms, _ = delays(log_of((0, 5, 10, 11)), chunks, [[(12 * MS, 0), (13 * MS, 0), (40 * MS, 1)]], 0, 100 * MS)
    assert list(seen_ms) == [2]


def test_every_watcher_counts_and_one_that_saw_nothing_is_told_of() -> None:
    chunks = [([("leader0", 5)], 0)]
    _, seen_ms, unseen = delays(log_of((0, 5, 10, 11)), chunks, [[(12 * MS, 0)], [(15 * MS, 0)], []], 0, 100 * MS)
    assert sorted(seen_ms) == [2, 5]
    assert unseen == 1


def test_what_was_posted_before_or_by_those_behind_the_list_is_no_delay() -> None:
    log = log_of((0, 5, 9, 10), (LEADERS, 5, 20, 21), (0, 6, 100, 101))
    answers_ms, seen_ms, unseen = delays(log, [([("leader0", 9)], 0)], [[(110 * MS, 0)]], 10 * MS, 100 * MS)
    assert list(answers_ms) == [1]
    assert (len(seen_ms), unseen) == (0, 0)
