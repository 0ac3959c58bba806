"""Pages that nobody reads are forgotten, the ones asked for longest ago first; those with readers never are."""

from __future__ import annotations

from server.keys import Keys
from server.pages import KEPT_PAGES, Pages


def test_page_is_the_same_while_it_is_asked_for() -> None:
    pages = Pages(Keys())
    first = pages.of("main", 10)
    for limit in range(11, 1001):
        pages.of("main", limit)
        assert pages.of("main", 10) is first
        assert len(list(pages)) <= KEPT_PAGES


def test_page_asked_for_longest_ago_goes() -> None:
    pages = Pages(Keys())
    made = {limit: pages.of("main", limit) for limit in range(1, KEPT_PAGES + 2)}
    assert pages.of("main", KEPT_PAGES + 1) is made[KEPT_PAGES + 1]
    assert pages.of("main", 2) is made[2]
    assert pages.of("main", 1) is not made[1]


def test_page_with_readers_stays_until_they_are_answered() -> None:
    pages = Pages(Keys())
    busy = []
    for limit in range(1, 4 * KEPT_PAGES):
        page = pages.of("main", limit)
        (page.waiters if limit % 2 else page.in_flight).append("somebody")
        busy.append(page)
    assert list(pages) == busy
    for page in busy:
        page.waiters, page.in_flight = [], []
    pages.forget()
    assert list(pages) == busy[-KEPT_PAGES:]
