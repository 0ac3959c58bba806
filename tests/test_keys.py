"""No two things share a key, whatever their ids hold."""

from __future__ import annotations

from binascii import crc_hqx

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.keys import TAGS, Keys, TaggedKeys, encode_id, idempotency_name, tag_of

ids = st.text("ab:%3A25", min_size=1)


def test_keys_are_the_ones_that_were_promised() -> None:
    keys = Keys()
    assert keys.board("main").score("player123") == "player:player123:score"
    assert keys.board("main").leaderboard == "leaderboard"
    assert keys.ratelimit == "ratelimit:"
    assert keys.outbox == "outbox"
    assert keys.ready == "scoreboard:ready"
    assert keys.session("abc") == "session:abc"


def test_other_boards_have_keys_of_their_own() -> None:
    board = Keys().board("weekly")
    assert board.score("ada") == "board:weekly:player:ada:score"
    assert board.leaderboard == "board:weekly:leaderboard"


def test_prefix_stands_before_every_key() -> None:
    keys = Keys("game1:")
    every = [keys.outbox, keys.ready, keys.rebuild_lock, keys.relay_lease, keys.ratelimit, keys.session("a")]
    for name in ("main", "weekly"):
        every += [keys.board(name).leaderboard, keys.board(name).score("a")]
    assert all(key.startswith("game1:") for key in every)
    assert len(set(every)) == len(every)


@pytest.mark.parametrize(
    ("raw", "encoded"), [("ada", "ada"), ("a:b", "a%3Ab"), ("100%", "100%25"), ("%3A", "%253A"), ("é", "é"), ("", "")]
)
def test_colon_and_percent_are_encoded(raw: str, encoded: str) -> None:
    assert encode_id(raw) == encoded


@given(ids, ids)
def test_different_ids_have_different_keys(one: str, other: str) -> None:
    keys = Keys()
    assert (encode_id(one) == encode_id(other)) == (one == other)
    assert (keys.board("main").score(one) == keys.board("main").score(other)) == (one == other)


@given(ids, ids)
def test_player_of_one_board_is_no_player_of_another(one: str, other: str) -> None:
    keys = Keys()
    assert keys.board("main").score(one) != keys.board("weekly").score(other)


def test_board_is_made_once() -> None:
    keys = Keys()
    assert keys.board("main") is keys.board("main")


def test_all_keys_of_a_tag_share_the_slot_that_a_cluster_gives_them() -> None:
    slots = set()
    for tag in {tag_of(f"board{number}") for number in range(200)}:
        keys = Keys("game1:", tag)
        every = [keys.outbox, keys.ready, keys.rebuild_lock, keys.relay_lease, f"{keys.ratelimit}1", keys.session("a")]
        every += [keys.answer + idempotency_name("a{b}", "{c}"), f"{keys.answer_count}1"]
        every += [keys.board("weekly").leaderboard, keys.board("main").score("{ann}")]
        assert {crc_hqx(key.split("{")[1].split("}")[0].encode(), 0) % 16384 for key in every} == {keys.slot}
        slots.add(keys.slot)
    assert len(slots) == TAGS


def test_tag_of_a_board_never_changes() -> None:
    # What Redis, Kafka and the database hold is told apart by it.
    assert [tag_of(name) for name in ("main", "weekly", "daily", "eu")] == ["5", "2", "f", "d"]


def test_tags_without_a_board_are_not_in_use() -> None:
    keys = TaggedKeys("game1:", ("main", "weekly"))
    assert set(keys.by_tag) == {tag_of("main"), tag_of("weekly")}
    assert keys.board("weekly").leaderboard == f"game1:{{{tag_of('weekly')}}}:board:weekly:leaderboard"
    assert keys.by_tag[tag_of("main")].holds("main")
    assert Keys().holds("main")
