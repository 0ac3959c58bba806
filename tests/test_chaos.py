"""The schedules and the ledger by themselves, then short runs of the whole."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from chaos.__main__ import Kind, run
from chaos.checks import differences
from chaos.ledger import Ledger
from chaos.schedule import LOSSES, PARTS, losses, steps
from tests.services import UnavailableError

SEED, KILLS = 208, 7  # kills every part, two of them in pairs, and pauses the relay that has the lease
LOSS_SEED = 10


def kills(seed: int, count: int) -> Counter[str]:
    return Counter(hit.part for step in steps(seed, count) for hit in step.hits if hit.how == "kill")


def test_same_seed_gives_same_schedule() -> None:
    assert steps(7, 50) == steps(7, 50)
    assert steps(7, 50) != steps(8, 50)


def test_longer_schedule_begins_as_the_shorter_one() -> None:
    assert steps(7, 50)[:30] == steps(7, 200)[:30]


@pytest.mark.parametrize("seed", range(20))
def test_schedule_has_the_kills_it_was_asked_for(seed: int) -> None:
    assert kills(seed, 200).total() == 200
    assert set(kills(seed, 200)) == set(PARTS)
    assert min(kills(seed, 200).values()) > 200 / len(PARTS) / 2


@pytest.mark.parametrize("seed", range(20))
def test_pair_is_of_two_parts(seed: int) -> None:
    pairs = [step.hits for step in steps(seed, 200) if len(step.hits) == 2]
    assert pairs
    assert all(first.part != second.part for first, second in pairs)
    assert all(step.hits for step in steps(seed, 200))


def test_losses_are_of_every_kind_and_the_same_for_a_seed() -> None:
    assert losses(7, 15) == losses(7, 15)
    assert Counter(loss.how for loss in losses(7, 15)) == dict.fromkeys(LOSSES, 5)


def test_ledger_adds_up_what_was_acknowledged(tmp_path: Path) -> None:
    ledger = Ledger()
    ledger.add(1, 5, 10, 10)
    ledger.add(3, 6, 1, 1)
    ledger.add(2, 5, 7, 17)
    assert ledger.scores() == {"player5": 17, "player6": 1}
    ledger.save(tmp_path / "ledger")
    assert list(Ledger.load(tmp_path / "ledger")) == list(ledger)


def test_differences_name_place_and_player() -> None:
    assert differences("scores", {"a": 1, "b": 2}, {"a": 1, "b": 2}) == []
    assert differences("scores", {"a": 1, "b": 2}, {"b": 3, "c": 4}) == [
        "scores: expected 1 for a, got None",
        "scores: expected 2 for b, got 3",
        "scores: expected None for c, got 4",
    ]


def passes(directory: Path, seed: int, steps: int, kind: Kind) -> bool:
    try:
        return run(directory, seed, steps, rate=1000, kind=kind)
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.redis
@pytest.mark.kafka
@pytest.mark.postgres
def test_nothing_is_lost_or_doubled_while_everything_dies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert set(kills(SEED, KILLS)) == set(PARTS)
    passed = passes(tmp_path, SEED, KILLS, "kills")
    said = capsys.readouterr().out
    assert passed, said
    assert f"chaos: kills={KILLS} " in said.splitlines()[-1]


@pytest.mark.redis
@pytest.mark.kafka
@pytest.mark.postgres
def test_what_redis_loses_is_gone_only_where_kafka_never_had_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    passed = passes(tmp_path, LOSS_SEED, len(LOSSES), "losses")
    said = capsys.readouterr().out
    assert passed, said
    assert " lost=0 duplicated=0 excused=" in said.splitlines()[-1]
