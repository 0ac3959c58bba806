"""Updates in columns: what is taken away and put back stays one update a place, in its order."""

from __future__ import annotations

from server.batches import Updates


def of(*players: str) -> Updates:
    updates = Updates()
    for player in players:
        updates.waiters.append(player)
        updates.players.append(player)
        updates.score_keys.append(f"key of {player}")
        updates.deltas.append(len(player))
        updates.subjects.append(player)
        updates.which.append(0)
        updates.keys.append(None)
    return updates


def columns(updates: Updates) -> dict[str, list[object]]:
    return {column: list(getattr(updates, column)) for column in Updates.__slots__}


def test_what_was_split_off_comes_first_again() -> None:
    updates, whole = of("ann", "bob", "c"), columns(of("ann", "bob", "c"))
    first = updates.split(2)
    assert (first.players, updates.players) == (["ann", "bob"], ["c"])
    updates.put_first(first)
    assert columns(updates) == whole


def test_nothing_put_first_changes_nothing() -> None:
    updates = of("ann")
    updates.put_first(Updates())
    assert columns(updates) == columns(of("ann"))
