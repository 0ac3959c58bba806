"""The live page in a real Chromium: what one sees, does and hears there, and that nothing complains.

Server, Redis and relay are real; Kafka is the one of `scoreboard dev`, since nothing is claimed of it. What the server
says only in trouble, a stand-in says.
"""

from __future__ import annotations

import itertools
import json
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.embedded import MockKafka, RedisServer, free_port
from tests.browser import Chromium, Page
from tests.client import connect, get, post, trust, wait_until_writable
from tests.page_server import PageServer, Visitor
from tests.services import ServerProcess, SyncProcess, wait_until

pytestmark = pytest.mark.browser

TOPIC = "browser"
PLAYERS = "[...document.querySelectorAll('#ranking tr')].map((row) => row.dataset.player)"
STATE = "document.body.dataset.state"
ROW = "[...document.querySelectorAll('#ranking tr')].find((row) => row.dataset.player === {})"
MOVES = "document.getAnimations().length"
# What the browser itself says of a server that is away: no page can keep it from that.
WHILE_AWAY = ("WebSocket connection to", "ERR_CONNECTION_REFUSED")


@pytest.fixture
def page(chromium: Chromium, stand_in: PageServer) -> Iterator[Page]:
    """A page that has nothing to complain about in the end; not even that the stand-in is gone, which outlives it."""
    with chromium.page() as page:
        yield page
        assert page.problems == []


@pytest.fixture
def stand_in() -> Iterator[PageServer]:
    with PageServer() as server:
        yield server


class World:
    """The real thing: a POST comes to the page through Redis, relay and Kafka."""

    def __init__(self, redis: RedisServer, kafka: MockKafka, directory: Path) -> None:
        settings = {
            "REDIS_PORT": str(redis.port),
            "KAFKA_BROKERS": kafka.brokers,
            "KAFKA_TOPIC": TOPIC,
            "KAFKA_FETCH_WAIT_MS": "10",
            "DATABASE_URL": f"postgresql://127.0.0.1:{free_port()}/none",
            "BOARDS": "weekly,main",
        }
        self.redis = redis
        self.server = ServerProcess(directory, settings)
        self.relay = SyncProcess(directory, settings, "relay")

    @property
    def url(self) -> str:
        return self.server.url + "/"

    def add(self, player: str, delta: int, **fields: Any) -> None:
        assert post(self.server, player, delta, **fields).status == 200


@pytest.fixture(scope="module")
def running_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("browser")
    redis = RedisServer(directory / "redis", options={"appendonly": "no"})
    kafka = MockKafka((TOPIC, f"{TOPIC}.dead-letter"))
    redis.start()
    kafka.start()
    world = World(redis, kafka, directory)
    try:
        with connect(redis) as client:
            trust(client)
        world.server.start()
        world.relay.start()
        wait_until_writable(world.server)
        yield world
    finally:
        world.relay.stop()
        world.server.stop()
        kafka.stop()
        redis.stop()


@pytest.fixture
def world(running_world: World) -> World:
    """The world with empty boards, and all that was said before told."""
    with connect(running_world.redis) as client:
        wait_until(lambda: client.xlen("outbox") == 0, 20)
        for key in client.scan_iter("*player:*"):
            client.delete(key)
        client.delete("leaderboard", "board:weekly:leaderboard")
    wait_until(lambda: get(running_world.server, "/readyz").json()["live"]["ok"], 20)
    return running_world


def visit(page: Page, stand_in: PageServer, *scores: tuple[str, int], query: str = "") -> Visitor:
    """Open the page and show it a first list."""
    page.open(stand_in.url + query)
    visitor = stand_in.welcome()
    visitor.show(*scores)
    page.wait(f"{STATE} === 'live' && {PLAYERS}.length === {len(scores)}")
    return visitor


def query_of(visitor: Visitor) -> dict[str, str]:
    return dict(urllib.parse.parse_qsl(visitor.path.partition("?")[2]))


def row(player: str) -> str:
    return ROW.format(json.dumps(player))


def choose(page: Page, control: str, value: str) -> None:
    page.evaluate(f"""{{
        const control = document.getElementById({json.dumps(control)});
        control.value = {json.dumps(value)};
        control.dispatchEvent(new Event("change", {{ bubbles: true }}));
    }}""")


def text_of(page: Page, control: str) -> str:
    return str(page.evaluate(f"document.getElementById({json.dumps(control)}).textContent"))


def search(page: Page, text: str) -> None:
    page.evaluate("document.getElementById('name').focus()")
    page.type(text)


# ---------------------------------------------------------------------- the board


def test_top_list_is_there_and_reorders_when_scores_change(page: Page, world: World) -> None:
    world.add("ann", 30)
    world.add("bob", 20)
    world.add("cid", 10)
    page.open(world.url)
    page.wait(f"{STATE} === 'live' && {PLAYERS}.join() === 'ann,bob,cid'")
    assert page.evaluate(f"{row('ann')}.innerText").split() == ["1", "ann", "30"]
    world.add("cid", 1500)
    page.wait(f"{PLAYERS}.join() === 'cid,ann,bob'")
    assert page.evaluate(f"{row('cid')}.querySelector('.total').textContent") == "1,510"
    assert page.evaluate(f"{row('bob')}.querySelector('.place').textContent") == "3"


def test_changed_score_is_shown_for_a_moment(page: Page, stand_in: PageServer) -> None:
    visitor = visit(page, stand_in, ("ann", 30), ("bob", 20))
    assert page.evaluate("document.querySelectorAll('[data-changed]').length") == 0
    visitor.show(("ann", 1030), ("bob", 15))
    page.wait(f"{row('ann')}.dataset.changed === 'up' && {row('bob')}.dataset.changed === 'down'")
    assert page.evaluate(f"{row('ann')}.querySelector('.delta').textContent") == "+1,000"
    assert page.evaluate(f"{row('bob')}.querySelector('.delta').textContent") == "-5"
    page.wait("document.querySelectorAll('[data-changed]').length === 0")
    assert page.evaluate(f"{row('ann')}.querySelector('.delta').textContent") == ""


def test_rows_move_from_where_they_were(page: Page, stand_in: PageServer) -> None:
    visitor = visit(page, stand_in, ("ann", 30), ("bob", 20), ("cid", 10))
    page.evaluate(f"""
        window.tops = [];
        (function look() {{
            window.tops.push({row("cid")}.getBoundingClientRect().top);
            requestAnimationFrame(look);
        }})();
    """)
    before = page.evaluate(f"{row('cid')}.getBoundingClientRect().top")
    visitor.show(("cid", 40), ("ann", 30), ("bob", 20))
    page.wait(f"{PLAYERS}[0] === 'cid' && {MOVES} === 0")
    after = page.evaluate(f"{row('cid')}.getBoundingClientRect().top")
    on_the_way = page.evaluate(f"window.tops.filter((top) => top > {after} + 1 && top < {before} - 1).length")
    assert on_the_way >= 2, (before, after, page.evaluate("window.tops"))


@pytest.mark.parametrize(
    "player",
    [
        "<script>alert(1)</script>",
        '"><img src=x onerror=alert(1)>',
        "شخص يكتب من اليمين",
        "🦊🚀",
        "a,b & c",
        "W" * 128,
    ],
)
def test_name_is_shown_as_text(page: Page, world: World, player: str) -> None:
    world.add(player, 7)
    page.open(world.url)
    page.wait(f"{PLAYERS}.length === 1")
    assert page.evaluate("document.querySelector('#ranking .name').textContent") == player
    assert page.evaluate("document.querySelector('#ranking .name').title") == player
    assert page.evaluate("document.querySelectorAll('#ranking script, #ranking img').length") == 0
    page.evaluate("document.querySelector('#ranking .pin button').click()")
    page.wait("document.querySelector('#pins .name') !== null")
    assert page.evaluate("document.querySelector('#pins .name').textContent") == player
    page.reload()
    page.wait("document.querySelector('#pins .total')?.textContent === '7'")
    world.add(player, 1)
    page.wait("document.querySelector('#pins .total').textContent === '8'")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_longest_names_and_largest_scores_fit_on_the_smallest_phone(page: Page, stand_in: PageServer) -> None:
    page.emulate(width=320, height=640)
    most = 2**53 - 1
    visit(page, stand_in, *((f"{number}" + "W" * 120, most - number) for number in range(10)))
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    edge = "row.querySelector('{}').getBoundingClientRect().{}"
    apart = f"{edge.format('.name', 'right')} <= {edge.format('.sum', 'left')}"
    assert page.evaluate(f"[...document.querySelectorAll('#ranking tr')].every((row) => {apart})")


def test_board_without_scores_says_so(page: Page, stand_in: PageServer) -> None:
    visitor = visit(page, stand_in)
    page.wait("document.getElementById('empty').checkVisibility()")
    visitor.show(("ann", 1))
    page.wait(f"{PLAYERS}.length === 1 && !document.getElementById('empty').checkVisibility()")


# ---------------------------------------------------------------------- choosing


def test_board_and_length_are_chosen_and_kept_in_the_address(page: Page, world: World) -> None:
    for number in range(30):
        world.add(f"p{number:02}", 100 - number)
    world.add("weekly winner", 5, board="weekly")
    page.open(world.url)
    page.wait(f"{PLAYERS}.length === 10")
    assert (
        page.evaluate("[...document.getElementById('board').options].map(({ value }) => value).join()") == "weekly,main"
    )
    assert page.evaluate("document.getElementById('board').value") == "main"
    choose(page, "limit", "25")
    page.wait(f"{PLAYERS}.length === 25")
    choose(page, "board", "weekly")
    page.wait(f"{PLAYERS}.join() === 'weekly winner'")
    assert page.evaluate("location.search") == "?limit=25&board=weekly"
    page.reload()
    page.wait(f"{PLAYERS}.join() === 'weekly winner'")
    assert page.evaluate("document.getElementById('limit').value") == "25"


def test_other_board_shows_nothing_of_the_one_before(page: Page, stand_in: PageServer) -> None:
    visit(page, stand_in, ("ann", 30))
    choose(page, "board", "weekly")
    visitor = stand_in.welcome()
    assert query_of(visitor)["board"] == "weekly"
    page.wait(f"{PLAYERS}.length === 0")
    assert page.evaluate(STATE) == "connecting"
    assert not page.evaluate("document.getElementById('empty').checkVisibility()")


def test_nonsense_in_the_address_is_the_default(page: Page, stand_in: PageServer) -> None:
    visit(page, stand_in, query="?board=%3Cb%3E&limit=7")
    assert page.evaluate("document.getElementById('board').value + document.getElementById('limit').value") == "main10"


def test_theme_is_chosen_and_kept(page: Page, stand_in: PageServer) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    page.emulate(dark=True)
    visit(page, stand_in)
    dark = page.evaluate(background)
    page.evaluate("document.getElementById('theme').click()")
    light = page.wait(f"{background} !== '{dark}' && {background}")
    page.reload()
    assert page.evaluate(background) == light
    assert page.evaluate("document.getElementById('theme').getAttribute('aria-label')") == "Colours: light"
    page.evaluate("document.getElementById('theme').click()")
    assert page.evaluate(background) == dark
    page.evaluate("document.getElementById('theme').click()")
    page.emulate(dark=False)
    assert page.evaluate(background) == light


# ---------------------------------------------------------------------- players


def test_search_marks_who_is_in_the_list_and_offers_to_pin_what_was_typed(page: Page, stand_in: PageServer) -> None:
    visitor = visit(page, stand_in, ("Hannah", 30), ("bob", 20), ("ann", 10))
    search(page, "ANN")
    page.wait("document.querySelectorAll('.found').length === 2")
    assert text_of(page, "found") == "Ranks 1 and 3"
    assert text_of(page, "pin") == "Pin “ANN”"
    page.press("Enter")
    assert visitor.heard() == {"type": "subscribe", "players": ["ANN"]}
    page.wait("document.querySelector('#pins .total')?.textContent === 'no score yet'")
    assert page.evaluate("document.querySelectorAll('.found').length") == 0
    visitor.say("scoreUpdate", board="main", playerId="ANN", newScore=1234)
    page.wait("document.querySelector('#pins .total').textContent === '1,234'")


def test_pinned_player_is_subscribed_to_and_outlives_a_reload(page: Page, stand_in: PageServer) -> None:
    visitor = visit(page, stand_in, ("ann", 30), ("bob", 20))
    page.evaluate(f"{row('bob')}.querySelector('button').click()")
    assert visitor.heard() == {"type": "subscribe", "players": ["bob"]}
    page.wait(f"{row('bob')}.querySelector('button').getAttribute('aria-pressed') === 'true'")
    assert page.evaluate("document.querySelector('#pins li').innerText").split() == ["2", "bob", "20"]
    page.reload()
    visitor = stand_in.welcome()
    assert query_of(visitor)["players"] == "bob"
    visitor.show(("ann", 30))
    visitor.say("scoreUpdate", board="main", playerId="bob", newScore=20)
    page.wait("document.querySelector('#pins li')?.innerText.trim() === 'bob\\n20'")
    page.evaluate("document.querySelector('#pins button').click()")
    assert visitor.heard() == {"type": "unsubscribe", "players": ["bob"]}
    page.wait("document.querySelectorAll('#pins li').length === 0")
    page.reload()
    assert "players" not in query_of(stand_in.welcome())


def test_pins_belong_to_their_board(page: Page, stand_in: PageServer) -> None:
    visit(page, stand_in, ("ann", 30))
    page.evaluate(f"{row('ann')}.querySelector('button').click()")
    choose(page, "board", "weekly")
    assert "players" not in query_of(stand_in.welcome())
    page.wait("document.querySelectorAll('#pins li').length === 0")
    choose(page, "board", "main")
    assert query_of(stand_in.welcome())["players"] == "ann"


def test_hundred_pins_of_any_length_reach_the_real_server(page: Page, world: World) -> None:
    names = [f"{number:03}," + "🦊" * 120 for number in range(50)] + [
        f"{number:03}" + "ü" * 120 for number in range(50)
    ]
    for name in (names[0], names[-1]):
        world.add(name, 5)
    for number in range(10):
        world.add(f"top {number}", 100)  # so that neither is in the list
    page.open(world.url)
    page.evaluate(f"localStorage.setItem('pins:main', {json.dumps(json.dumps(names))})")
    page.reload()
    shown = "[...document.querySelectorAll('#pins .total')].filter((each) => each.textContent === '{}').length"
    page.wait(f"{STATE} === 'live' && {shown.format(5)} === 2 && {shown.format('no score yet')} === 98")
    world.add(names[0], 1)
    world.add(names[-1], 1)
    page.wait(f"{shown.format(6)} === 2")
    search(page, "one too many")
    page.press("Enter")
    page.wait("document.getElementById('found').textContent === 'At most 100 players can be pinned'")


@pytest.mark.parametrize("character", ["W", "ü", "山", "🦊"])
def test_names_are_counted_in_characters(page: Page, stand_in: PageServer, character: str) -> None:
    visitor = visit(page, stand_in, ("ann", 30))
    page.evaluate("document.getElementById('name').focus()")
    for length in (129, 128):
        page.evaluate("document.getElementById('name').select()")
        page.command("Input.insertText", text=character * length)
        page.press("Enter")
        if length == 129 and character == "🦊":  # the box ends at 128 of them
            break
        if length == 129:
            page.wait("document.getElementById('found').textContent === 'A name has at most 128 characters'")
            assert page.evaluate("document.querySelectorAll('#pins li').length") == 0
    assert visitor.heard() == {"type": "subscribe", "players": [character * 128]}
    page.wait("document.querySelectorAll('#pins li').length === 1")


def test_half_a_character_is_no_name(page: Page, stand_in: PageServer) -> None:
    visit(page, stand_in, ("ann", 30))
    page.evaluate("""{
        const name = document.getElementById("name");
        name.value = "fox \\ud83e";
        name.dispatchEvent(new Event("input", { bubbles: true }));
        document.getElementById("find").requestSubmit();
    }""")
    assert text_of(page, "found") == "That is no name"
    assert page.evaluate("document.querySelectorAll('#pins li').length") == 0


NO_PINS = [
    "", "nonsense", "{", "{}", "null", "5", '"ann"', "[[]]", "[null]", '[{"filter":1}]', '[""]', "true", "\x00",
]  # fmt: skip


@pytest.mark.parametrize("kept", NO_PINS)
def test_nonsense_in_the_storage_is_no_pin(page: Page, stand_in: PageServer, kept: str) -> None:
    script = f"localStorage.setItem('pins:main', {json.dumps(kept)}); localStorage.setItem('theme', {json.dumps(kept)})"
    page.command("Page.addScriptToEvaluateOnNewDocument", source=script)
    visitor = visit(page, stand_in, ("ann", 30))
    assert "players" not in query_of(visitor)
    assert page.evaluate("document.documentElement.dataset.theme") == "system"
    page.evaluate(f"{row('ann')}.querySelector('button').click()")
    assert visitor.heard() == {"type": "subscribe", "players": ["ann"]}
    assert page.evaluate("localStorage.getItem('pins:main')") == '["ann"]'


def test_names_in_the_storage_that_the_server_would_refuse_are_left_out(page: Page, world: World) -> None:
    world.add("ann", 30)
    kept = ["x" * 129, "🦊" * 129, 7, "", "ann", "ann", *(f"p{number}" for number in range(200))]
    stored = json.dumps(json.dumps(kept)[:-1] + ', "half \\ud83e"]')
    page.command("Page.addScriptToEvaluateOnNewDocument", source=f"localStorage.setItem('pins:main', {stored})")
    page.open(world.url)
    page.wait(f"{STATE} === 'live' && document.querySelector('#pins .total')?.textContent === '30'")
    assert page.evaluate("[...document.querySelectorAll('#pins .name')].length") == 100


FORBIDDEN = (
    "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('no', 'SecurityError'); } })"
)
FULL = "Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); }"


@pytest.mark.parametrize("storage", [FORBIDDEN, FULL], ids=["forbidden", "full"])
def test_page_works_without_storage(page: Page, stand_in: PageServer, storage: str) -> None:
    page.command("Page.addScriptToEvaluateOnNewDocument", source=storage)
    visitor = visit(page, stand_in, ("ann", 30))
    page.evaluate(f"{row('ann')}.querySelector('button').click()")
    assert visitor.heard() == {"type": "subscribe", "players": ["ann"]}
    page.wait("document.querySelector('#pins .total')?.textContent === '30'")
    page.evaluate("document.getElementById('theme').click()")
    assert page.evaluate("document.documentElement.dataset.theme") == "light"


# ---------------------------------------------------------------------- the connection


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_page_survives_a_restart_of_the_server(chromium: Chromium, world: World, end: str) -> None:
    with chromium.page() as page:
        world.add("ann", 30)
        page.open(world.url)
        page.wait(f"{STATE} === 'live' && {PLAYERS}.join() === 'ann'")
        getattr(world.server, end)()
        page.wait(f"{STATE} === 'reconnecting' && document.getElementById('state').textContent === 'Reconnecting'")
        assert page.evaluate(PLAYERS) == ["ann"]
        world.server.start()
        wait_until_writable(world.server)
        world.add("bob", 40)
        page.wait(f"{STATE} === 'live' && {PLAYERS}.join() === 'bob,ann'", 40)
        assert [each for each in page.problems if not any(part in each for part in WHILE_AWAY)] == []


def test_restart_is_waited_for_as_long_as_the_server_says(page: Page, stand_in: PageServer) -> None:
    # A random part of the time would do; all of it shows in what it counts down.
    page.command("Page.addScriptToEvaluateOnNewDocument", source="Math.random = () => 0.999")
    visitor = visit(page, stand_in, ("ann", 30))
    visitor.close(1001, "restarting; reconnect within 100 s")
    page.wait(f"{STATE} === 'reconnecting'")
    assert text_of(page, "countdown") in ("in 100 s", "in 99 s")
    assert page.evaluate("document.getElementById('countdown').ariaHidden") == "true"
    page.evaluate("dispatchEvent(new Event('online'))")
    stand_in.welcome().show(("bob", 20))
    page.wait(f"{STATE} === 'live' && {PLAYERS}.join() === 'bob'")


@pytest.mark.parametrize("code", [1002, 1007, 1008, 1009])
def test_server_that_does_not_want_us_is_not_connected_to_again(page: Page, stand_in: PageServer, code: int) -> None:
    visitor = visit(page, stand_in, ("ann", 30))
    # Every timer is due at once, so that a second connection would be there by the time it is looked for.
    page.evaluate("{ const later = setTimeout; window.setTimeout = (work) => later(work, 0); }")
    visitor.close(code, "too many messages")
    page.wait(f"{STATE} === 'closed'")
    assert text_of(page, "state") == "Closed: too many messages"
    page.evaluate("dispatchEvent(new Event('online')); new Promise((done) => setTimeout(() => setTimeout(done)))")
    assert stand_in.nobody_came
    choose(page, "limit", "25")
    stand_in.welcome()


def test_other_ends_are_connected_to_again(page: Page, stand_in: PageServer) -> None:
    for code in (1013, 1011):
        visit(page, stand_in, ("ann", 30)).close(code, "because")
        stand_in.welcome().show(("ann", 30))
        page.wait(f"{STATE} === 'live'")


def test_delayed_board_says_so_until_it_is_live_again(page: Page, stand_in: PageServer) -> None:
    visitor = visit(page, stand_in, ("ann", 30))
    visitor.say("status", live=False)
    page.wait(f"{STATE} === 'delayed'")
    assert text_of(page, "state") == "Delayed"
    visitor.show(("ann", 31))
    page.wait(f"{row('ann')}.querySelector('.total').textContent === '31'")
    assert page.evaluate(STATE) == "delayed"
    visitor.say("status", live=False, detail="Kafka does not answer")
    page.wait("document.getElementById('state').textContent === 'Delayed: Kafka does not answer'")
    visitor.say("status", live=True)
    page.wait(f"{STATE} === 'live'")
    assert text_of(page, "state") == "Live"


def test_resync_is_called_lagging_for_a_while(page: Page, stand_in: PageServer) -> None:
    visitor = visit(page, stand_in, ("ann", 30))
    visitor.show(("bob", 30), resync=True)
    page.wait(f"{STATE} === 'lagging' && {PLAYERS}.join() === 'bob'")
    assert text_of(page, "state") == "Lagging"
    page.wait(f"{STATE} === 'live'")


def test_page_that_could_not_keep_up_says_so(page: Page, stand_in: PageServer) -> None:
    visit(page, stand_in, ("ann", 30))
    page.evaluate("for (const end = performance.now() + 3500; performance.now() < end; );")
    page.wait(f"{STATE} === 'lagging'")


# ---------------------------------------------------------------------- charts


def test_delay_and_rate_are_shown_as_they_come(page: Page, stand_in: PageServer) -> None:
    visitor = visit(page, stand_in, ("ann", 30))
    now = "document.querySelector('#{} .now').textContent"
    page.wait(f"{now.format('rate')} === '0'")
    assert page.evaluate(now.format("delay")) == "\u2013"
    visitor.show(("ann", 31), delayMs=17)
    visitor.say("scoreUpdate", board="main", playerId="ann", newScore=31)
    visitor.say("scoreUpdatesSkipped", count=1199)
    page.wait(f"{now.format('delay')} === '17 ms'")
    label = "document.querySelector('#{} svg').getAttribute('aria-label')"
    assert page.evaluate(label.format("delay")) == "Delay, the last minute: 17 ms at most"
    # 1,200 of them within a second, or in two where one began between them.
    most = int(page.evaluate(label.format("rate")).split()[-3].replace(",", ""))
    assert 500 <= most <= 1210
    assert page.evaluate("document.querySelector('#delay .line').getAttribute('d')").startswith("M")


# ---------------------------------------------------------------------- for everybody


@pytest.mark.parametrize("phone", [False, True], ids=["desktop", "phone"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_nothing(page: Page, stand_in: PageServer, axe: str, dark: bool, phone: bool) -> None:
    size = {"width": 390, "height": 844} if phone else {}
    page.emulate(phone=phone, dark=dark, reduced_motion=True, **size)
    visitor = visit(page, stand_in, *((f"player {number}", 100 - number) for number in range(10)))
    page.evaluate(f"{row('player 1')}.querySelector('button').click()")
    visitor.show(*((f"player {number}", 110 - 2 * number) for number in range(10)), delayMs=5)
    search(page, "player 3")
    page.wait("document.querySelectorAll('[data-changed]').length > 0 && document.querySelector('.found') !== null")
    for state in ("live", "delayed", "closed"):
        if state == "delayed":
            visitor.say("status", live=False)
        elif state == "closed":
            visitor.close(1008, "because")
        page.wait(f"{STATE} === '{state}'")
        assert page.violations(axe) == [], state


def test_every_control_is_reached_and_works_with_the_keyboard(page: Page, stand_in: PageServer) -> None:
    visitor = visit(page, stand_in, ("ann", 30), ("bob", 20))
    focus = "document.activeElement.id || document.activeElement.getAttribute('aria-label') || ''"
    page.press("Tab")
    assert page.evaluate(focus) == "name"
    page.type("cid")
    page.press("Tab")
    assert page.evaluate(focus) == "pin"
    page.press("Enter")
    assert visitor.heard() == {"type": "subscribe", "players": ["cid"]}
    page.wait("document.querySelector('#pins li') !== null")
    assert page.evaluate(focus) == "name"
    order = []
    for _ in range(6):
        page.press("Tab")
        order.append(page.evaluate(focus))
    assert order == ["board", "limit", "theme", "Unpin cid", "Pin ann", "Pin bob"]
    page.press("Space")
    assert visitor.heard() == {"type": "subscribe", "players": ["bob"]}
    page.evaluate("document.getElementById('limit').focus()")
    page.press("ArrowDown")
    assert query_of(stand_in.welcome())["limit"] == "25"
    page.evaluate("document.getElementById('theme').focus()")
    page.press("Enter")
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    page.evaluate("document.querySelector('#pins button').focus()")
    page.press("Enter")
    page.wait("document.querySelectorAll('#pins li').length === 1")
    assert page.evaluate(focus) == "Unpin bob"


def test_focus_stays_on_a_row_that_moves(page: Page, stand_in: PageServer) -> None:
    visitor = visit(page, stand_in, ("ann", 30), ("bob", 20), ("cid", 10))
    for player, order in (("cid", "cid,ann,bob"), ("ann", "ann,cid,bob")):
        page.evaluate(f"{row(player)}.querySelector('button').focus()")
        visitor.show(*((each, 100 - number) for number, each in enumerate(order.split(","))))
        page.wait(f"{PLAYERS}.join() === '{order}'")
        assert page.evaluate("document.activeElement.getAttribute('aria-label')") == f"Pin {player}"


def test_nothing_moves_where_that_is_not_wanted(page: Page, stand_in: PageServer) -> None:
    page.emulate(reduced_motion=True)
    visitor = visit(page, stand_in, ("ann", 30), ("bob", 20))
    page.evaluate("""
        window.most = 0;
        (function look() {
            window.most = Math.max(window.most, document.getAnimations().length);
            requestAnimationFrame(look);
        })();
    """)
    visitor.show(("bob", 50), ("cid", 40), ("ann", 30))
    page.wait("document.querySelectorAll('[data-changed]').length > 0")
    page.wait("document.querySelectorAll('[data-changed]').length === 0")
    assert page.evaluate("window.most") == 0


def test_nothing_moves_in_a_tab_that_nobody_sees(page: Page, stand_in: PageServer) -> None:
    visitor = visit(page, stand_in, ("ann", 30), ("bob", 20))
    page.evaluate("void Object.defineProperty(document, 'hidden', { get: () => true, configurable: true })")
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    visitor.show(("bob", 50), ("ann", 30))
    page.wait(f"{PLAYERS}.join() === 'bob,ann'")
    assert page.evaluate(MOVES) == 0
    assert page.evaluate("document.querySelectorAll('[data-changed]').length") == 0


def test_live_region_says_a_sentence_in_ten_seconds_at_most(page: Page, stand_in: PageServer) -> None:
    visitor = visit(page, stand_in, ("ann", 30), ("bob", 20))
    page.evaluate(f"{row('bob')}.querySelector('button').click()")
    page.evaluate("""
        window.said = [];
        new MutationObserver(() => {
            window.said.push([performance.now(), document.getElementById('announcer').textContent]);
        }).observe(document.getElementById('announcer'), { childList: true, characterData: true, subtree: true });
    """)
    # Scores alone are nothing to be told.
    visitor.show(("ann", 31), ("bob", 21))
    page.wait(f"{row('ann')}.querySelector('.total').textContent === '31'")
    assert page.evaluate("window.said") == []
    for score in range(100, 160):
        leader, other = ("bob", "ann") if score % 2 else ("ann", "bob")
        visitor.show((leader, score), (other, score - 1))
        page.wait(f"{row(leader)}.querySelector('.total').textContent === '{score}'")
    page.wait("window.said.length >= 2 && window.said.at(-1)[1] === 'bob leads with 159'", 60)
    said = page.evaluate("window.said")
    assert said[0][1] in ("bob leads with 101", "bob is now 1, with 101")
    for (earlier, _), (later, _) in itertools.pairwise(said):
        assert later - earlier > 9_990  # timers may be early by a hair


def test_state_is_told_when_it_changes_and_not_counted_down(page: Page, stand_in: PageServer) -> None:
    page.command("Page.addScriptToEvaluateOnNewDocument", source="Math.random = () => 0.999")
    visitor = visit(page, stand_in, ("ann", 30))
    page.evaluate("""
        window.told = [];
        new MutationObserver(() => window.told.push(document.querySelector('[role=status]').textContent))
            .observe(document.querySelector('[role=status]'), { childList: true, characterData: true, subtree: true });
    """)
    visitor.close(1001, "restarting; reconnect within 100 s")
    page.wait("document.getElementById('countdown').textContent === 'in 98 s'")
    assert page.evaluate("window.told") == ["Reconnecting"]
