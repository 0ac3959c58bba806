"""No two things share a key, whatever their ids hold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.keys import Keys, encode_id

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
