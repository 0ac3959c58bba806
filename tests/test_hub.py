"""The hub with a made-up clock: what each connection gets to see, whatever happens in between."""

from __future__ import annotations

import json
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from server.hub import (
    FLUSH_SHARE,
    LAGGING_LIMIT_MS,
    MAX_FRAMES,
    MAX_SCORE_UPDATES,
    SHARD_SIZE,
    Hub,
    Publish,
    Send,
    Shard,
    Watcher,
)

INTERVAL_MS = 16


def test_nobody_but_lagging_watchers_means_no_whole_board_is_read() -> None:
    hub = Hub(INTERVAL_MS)
    watcher = Watcher("main", 10, True, set())
    hub.join(watcher)
    hub.lag(watcher, 0)
    hub.mark([("main", "ann")])
    assert [read.limit for read in hub.begin_flush()] == [1]


class Client:
    """The far end of a connection: what it was sent, and what it therefore believes."""

    def __init__(self, hub: Hub, *, limit: int = 10, all_scores: bool = True, players: tuple[str, ...] = ()) -> None:
        self.watcher = Watcher("main", limit, all_scores, set(players), connection=self)
        self.topic: Shard | None = None
        self.messages: list[dict[str, Any]] = []
        self.top: list[tuple[str, int]] | None = None
        self.scores: dict[str, int] = {}
        hub.join(self.watcher)

    def take(self, texts: list[bytes]) -> None:
        for text in texts:
            message = json.loads(text)
            self.messages.append(message)
            if message["type"] == "leaderboardUpdate":
                self.top = [(each["playerId"], each["score"]) for each in message["topScores"]]
            elif message["type"] == "scoreUpdate":
                self.scores[message["playerId"]] = message["newScore"]

    def kinds(self) -> list[str]:
        return [message["type"] for message in self.messages]


class Board:
    """A hub with what stands around it: Redis as a dict, topics as sets."""

    def __init__(self) -> None:
        self.hub = Hub(INTERVAL_MS)
        self.redis: dict[str, int] = {}
        self.clients: list[Client] = []

    def join(self, **wishes: Any) -> Client:
        client = Client(self.hub, **wishes)
        self.clients.append(client)
        return client

    def change(self, player: str, score: int) -> None:
        self.redis[player] = score
        self.hub.mark([("main", player)])

    def top(self, limit: int) -> list[tuple[str, int]]:
        return sorted(self.redis.items(), key=lambda entry: (entry[1], entry[0].encode()), reverse=True)[:limit]

    def flush(self, unix_ms: int | None = None) -> list[Publish | Send]:
        reads = self.hub.begin_flush()
        steps = []
        for read in reads:
            scores = {player: self.redis[player] for player in read.players if player in self.redis}
            for step in self.hub.publish(read.board, self.top(read.limit), scores, unix_ms):
                steps.append(step)
                self.carry_out(step)
        return steps

    def carry_out(self, step: Publish | Send) -> None:
        if isinstance(step, Publish):
            for client in self.clients:
                if client.topic is step.shard:
                    client.take(step.messages)
            return
        client = step.watcher.connection
        if step.watcher.lagging_since_ms is None:
            client.take(step.messages)
            if step.joined:
                client.topic = step.watcher.shard

    def lag(self, client: Client, now_ms: int = 0) -> None:
        self.hub.lag(client.watcher, now_ms)
        client.topic = None

    def leave(self, client: Client) -> None:
        self.clients.remove(client)
        self.hub.leave(client.watcher)


@pytest.fixture
def board() -> Board:
    return Board()


def test_new_connection_gets_the_list_at_once_even_if_it_is_empty(board: Board) -> None:
    client = board.join()
    board.flush()
    assert client.messages == [{"type": "leaderboardUpdate", "board": "main", "seq": 1, "topScores": []}]


def test_new_connection_gets_the_scores_of_the_players_it_names(board: Board) -> None:
    board.redis.update(ann=5, bob=3)
    client = board.join(all_scores=False, players=("bob", "nobody"))
    board.flush()
    assert client.scores == {"bob": 3}


def test_change_reaches_everyone_who_watches(board: Board) -> None:
    clients = [board.join(), board.join(limit=25), board.join(all_scores=False)]
    board.flush()
    board.change("ann", 5)
    board.flush()
    assert [client.top for client in clients] == [[("ann", 5)]] * 3
    assert [client.scores for client in clients] == [{"ann": 5}, {"ann": 5}, {}]


def test_list_that_did_not_change_is_not_sent_again(board: Board) -> None:
    board.redis.update({f"p{number}": 100 + number for number in range(10)})
    client = board.join()
    board.flush()
    board.change("low", 1)
    board.flush()
    assert client.kinds() == ["leaderboardUpdate", "scoreUpdate"]


def test_seq_rises_by_one_with_every_change_of_the_list(board: Board) -> None:
    client = board.join()
    for score in (0, 1, 2, 3):
        board.change("ann", score)
        board.flush()
    assert [message["seq"] for message in client.messages if "seq" in message] == [1, 2, 3, 4]


def test_list_tells_how_long_ago_the_oldest_of_its_changes_was_applied(board: Board) -> None:
    watcher = board.join()
    board.flush()
    board.redis = {"ann": 1, "bob": 2}
    board.hub.mark([("main", "ann")], 1000)
    board.hub.mark([("main", "bob")], 1030)
    board.flush(unix_ms=1042)
    board.redis["ann"] = 3
    board.hub.mark([("main", "ann")])  # read once more from before the connection: nobody waited for it
    board.flush(unix_ms=5000)
    board.redis["ann"] = 4
    board.hub.mark([("main", "ann")], 6010)
    board.flush(unix_ms=6000)  # by a clock that is behind that of Redis
    assert [message.get("delayMs") for message in watcher.messages if "topScores" in message] == [None, 42, None, 0]


def test_failed_read_adds_to_the_delay(board: Board) -> None:
    watcher = board.join()
    board.flush()
    board.redis["ann"] = 1
    board.hub.mark([("main", "ann")], 1000)
    board.hub.begin_flush()
    board.hub.abandon_flush()
    board.hub.mark([("main", "ann")], 1200)
    board.flush(unix_ms=1250)
    assert watcher.messages[-2]["delayMs"] == 250


def test_repeated_and_late_events_show_what_redis_says_now(board: Board) -> None:
    client = board.join()
    board.flush()
    board.change("ann", 9)
    board.hub.mark([("main", "ann")] * 3)
    board.flush()
    board.hub.mark([("main", "ann")])
    board.flush()
    assert [message["newScore"] for message in client.messages if "newScore" in message] == [9, 9]


def test_changes_that_gather_go_out_once_with_the_latest_score(board: Board) -> None:
    client = board.join()
    board.flush()
    for score in range(50):
        board.change("ann", score)
    board.flush()
    assert client.kinds() == ["leaderboardUpdate", "leaderboardUpdate", "scoreUpdate"]
    assert client.scores == {"ann": 49}


def test_flood_sends_the_wanted_first_and_says_how_many_were_skipped(board: Board) -> None:
    client, named = board.join(), board.join(players=("z1", "z2"))
    board.flush()
    board.redis.update({f"top{number}": 10**6 + number for number in range(10)})
    for number in range(MAX_SCORE_UPDATES + 50):
        board.change(f"p{number}", number)
    for player in ("z1", "z2", "top3"):
        board.change(player, 10**6 + 3 if player == "top3" else 5)
    board.flush()
    skipped = [message["count"] for message in client.messages if message["type"] == "scoreUpdatesSkipped"]
    assert skipped == [53]
    assert client.kinds().count("scoreUpdate") == MAX_SCORE_UPDATES
    assert {"z1", "z2", "top3"} <= client.scores.keys()
    assert named.scores.keys() >= {"z1", "z2"}


def test_more_watchers_get_fewer_scores_but_those_they_name(board: Board) -> None:
    crowd = [board.join() for _ in range(MAX_FRAMES // 20)]
    named = board.join(players=tuple(f"z{number}" for number in range(30)))
    board.flush()
    for number in range(30):
        board.change(f"z{number}", number)
    board.flush()
    assert crowd[0].kinds().count("scoreUpdate") == 19
    assert len(named.scores) == 30


def test_named_player_is_followed_without_all_scores(board: Board) -> None:
    client = board.join(all_scores=False, players=("ann",))
    board.flush()
    board.change("ann", 1)
    board.change("bob", 2)
    board.flush()
    assert client.scores == {"ann": 1}


def test_subscribe_is_answered_with_current_scores_and_unsubscribe_ends_it(board: Board) -> None:
    board.redis.update(ann=4)
    client = board.join(all_scores=False)
    board.flush()
    board.hub.subscribe(client.watcher, {"ann"})
    board.flush()
    assert client.scores == {"ann": 4}
    board.hub.unsubscribe(client.watcher, {"ann"})
    board.change("ann", 5)
    board.flush()
    assert client.scores == {"ann": 4}


def test_nobody_gets_the_same_flush_twice(board: Board) -> None:
    client = board.join(players=("ann",))
    board.change("ann", 1)
    board.flush()
    assert client.kinds() == ["leaderboardUpdate", "scoreUpdate"]


def test_connection_that_joins_during_a_flush_is_served_by_the_next(board: Board) -> None:
    early = board.join()
    reads = board.hub.begin_flush()
    late = board.join(limit=100, players=("ann",))
    board.redis.update(ann=1)
    for step in board.hub.publish("main", [], {}):
        board.carry_out(step)
    assert [read.limit for read in reads] == [10]
    assert early.top == []
    assert late.messages == []
    board.flush()
    assert (late.top, late.scores, early.top) == ([("ann", 1)], {"ann": 1}, [("ann", 1)])


def test_list_that_changes_and_changes_back_around_a_join_is_right_for_both(board: Board) -> None:
    board.redis.update(ann=1)
    old = board.join()
    board.flush()
    board.redis.update(ann=2)
    new = board.join()
    board.flush()
    board.change("ann", 1)
    board.flush()
    assert old.top == new.top == [("ann", 1)]


def test_failed_read_is_made_up_for(board: Board) -> None:
    client = board.join(players=("ann",))
    board.change("ann", 3)
    board.hub.begin_flush()
    board.hub.abandon_flush()
    assert board.hub.flush_delay_ms(0) == 0
    board.flush()
    assert (client.top, client.scores) == ([("ann", 3)], {"ann": 3})


def test_lagging_connection_gets_nothing_until_it_drains_and_then_a_resync(board: Board) -> None:
    client = board.join(players=("ann",))
    board.flush()
    board.lag(client)
    before = len(client.messages)
    board.change("ann", 7)
    board.flush()
    assert len(client.messages) == before
    board.hub.drained(client.watcher)
    board.flush()
    assert client.messages[before]["resync"] is True
    assert (client.top, client.scores) == ([("ann", 7)], {"ann": 7})
    board.change("ann", 8)
    board.flush()
    assert client.scores == {"ann": 8}


def test_connection_that_lags_too_long_is_overdue(board: Board) -> None:
    client = board.join()
    board.flush()
    board.lag(client, now_ms=1000)
    assert board.hub.overdue(1000 + LAGGING_LIMIT_MS) == []
    assert board.hub.overdue(1001 + LAGGING_LIMIT_MS) == [client.watcher]
    board.hub.drained(client.watcher)
    assert board.hub.overdue(10**9) == []


def test_shards_stay_below_their_size_and_are_refilled(board: Board) -> None:
    clients = [board.join() for _ in range(2 * SHARD_SIZE + 1)]
    board.flush()
    assert sorted(len(shard.watchers) for shard in board.hub.shards) == [1, SHARD_SIZE, SHARD_SIZE]
    for client in clients[:100]:
        board.leave(client)
    for _ in range(99):
        board.join()
    board.flush()
    shards = list(board.hub.shards)
    assert sum(len(shard.watchers) for shard in shards) == 2 * SHARD_SIZE
    assert len({shard.topic for shard in shards}) == len(shards) <= 3


def test_flush_publishes_shard_by_shard(board: Board) -> None:
    for _ in range(SHARD_SIZE + 1):
        board.join()
    board.flush()
    board.change("ann", 1)
    assert [type(step) for step in board.flush()] == [Publish, Publish]


def test_shard_whose_last_watcher_left_is_gone(board: Board) -> None:
    client = board.join()
    board.flush()
    board.leave(client)
    assert list(board.hub.shards) == []
    assert board.hub.watchers == 0


def test_first_change_after_a_pause_goes_out_at_once_and_the_next_waits(board: Board) -> None:
    board.join()
    assert board.hub.flush_delay_ms(now_ms=1000) == 0
    board.flush()
    board.hub.end_flush(started_ms=1000, busy_ms=1)
    assert board.hub.flush_delay_ms(now_ms=1001) is None
    board.change("ann", 1)
    assert board.hub.flush_delay_ms(now_ms=1001) == INTERVAL_MS - 1
    assert board.hub.flush_delay_ms(now_ms=5000) == 0


def test_interval_stretches_until_flushing_keeps_to_its_share_of_the_time_and_shrinks_back(board: Board) -> None:
    board.join()
    board.hub.end_flush(started_ms=0, busy_ms=70)
    assert board.hub.flush_delay_ms(now_ms=70) == pytest.approx(70 / FLUSH_SHARE - 70)
    board.hub.end_flush(started_ms=200, busy_ms=1)
    assert board.hub.flush_delay_ms(now_ms=201) == INTERVAL_MS - 1


def test_board_that_nobody_watches_costs_nothing(board: Board) -> None:
    client = board.join()
    board.flush()
    board.leave(client)
    board.change("ann", 1)
    assert board.hub.flush_delay_ms(0) is None
    assert board.hub.begin_flush() == []


players = st.sampled_from(["ann", "bob", "eve", "joe"])
steps = st.lists(
    st.one_of(
        st.tuples(st.just("change"), players, st.integers(-3, 3)),
        st.tuples(st.just("repeat"), players),
        st.tuples(st.just("join"), st.sampled_from([10, 25]), st.booleans(), st.sets(players, max_size=2)),
        st.tuples(st.just("leave"), st.integers(0, 9)),
        st.tuples(st.just("lag"), st.integers(0, 9)),
        st.tuples(st.just("drain"), st.integers(0, 9)),
        st.tuples(st.just("subscribe"), st.integers(0, 9), players),
        st.tuples(st.just("unsubscribe"), st.integers(0, 9), players),
        st.tuples(st.just("begin")),
        st.tuples(st.just("fail")),
        st.tuples(st.just("publish"), st.integers(0, 4)),
    ),
    max_size=60,
)


class Interleaving:
    """Runs steps in any order, a flush being three of them: read, then publish a few steps at a time."""

    def __init__(self) -> None:
        self.board = Board()
        self.publishing: Any = None
        self.read: Any = None

    def begin(self) -> None:
        if self.read is None and self.publishing is None:
            reads = self.board.hub.begin_flush()
            if reads:
                redis = dict(self.board.redis)
                scores = {player: redis[player] for player in reads[0].players if player in redis}
                self.read = (self.board.top(reads[0].limit), scores)

    def fail(self) -> None:
        if self.read is not None:
            self.read = None
            self.board.hub.abandon_flush()

    def publish(self, count: int) -> None:
        if self.read is not None:
            self.publishing, self.read = self.board.hub.publish("main", *self.read), None
        for _ in range(count):
            step = next(self.publishing, None) if self.publishing is not None else None
            if step is None:
                self.publishing = None
                return
            self.board.carry_out(step)

    def finish(self) -> None:
        self.publish(10**6)
        while self.board.hub.flush_delay_ms(0) is not None:
            self.begin()
            self.publish(10**6)


@hypothesis.given(steps=steps)
def test_connection_that_reads_ends_up_with_the_board_whatever_happened(steps: list[tuple[Any, ...]]) -> None:
    run = Interleaving()
    board = run.board
    for name, *arguments in steps:
        if name == "change":
            player, delta = arguments
            board.change(player, board.redis.get(player, 0) + delta)
        elif name == "repeat":
            board.hub.mark([("main", arguments[0])])
        elif name == "join":
            limit, all_scores, named = arguments
            board.join(limit=limit, all_scores=all_scores, players=tuple(named))
        elif name in ("begin", "fail", "publish"):
            getattr(run, name)(*arguments)
        elif board.clients:
            client = board.clients[arguments[0] % len(board.clients)]
            if name == "leave":
                board.leave(client)
            elif name == "lag":
                board.lag(client)
            elif name == "drain":
                board.hub.drained(client.watcher)
            else:
                getattr(board.hub, name)(client.watcher, {arguments[1]})
    for client in board.clients:
        board.hub.drained(client.watcher)
    run.finish()
    for client in board.clients:
        assert client.top == board.top(client.watcher.limit)
        followed = board.redis.keys() & client.watcher.players
        assert {player: client.scores.get(player) for player in followed} == {
            each: board.redis[each] for each in followed
        }


@hypothesis.given(st.lists(st.tuples(st.sampled_from(["begin", "publish", "join", "repeat", "lag", "drain"]), players)))
def test_score_that_only_rises_never_falls_for_anyone(steps: list[tuple[str, str]]) -> None:
    run = Interleaving()
    board = run.board
    board.join(players=("ann",), all_scores=False)
    for name, player in steps:
        board.change(player, board.redis.get(player, 0) + 1)
        if name == "begin":
            run.begin()
        elif name == "publish":
            run.publish(2)
        elif name == "join":
            board.join(players=(player,))
        elif name == "lag":
            board.lag(board.clients[-1])
        elif name == "drain":
            board.hub.drained(board.clients[-1].watcher)
    run.finish()
    for client in board.clients:
        for player in board.redis:
            seen = [each["newScore"] for each in client.messages if each.get("playerId") == player]
            assert seen == sorted(seen)
