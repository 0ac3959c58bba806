"""What is said of a service that does not do what is asked of it."""

from __future__ import annotations

import logging

import pytest

from sync.waiting import LONGEST_DELAY_S, Outage

_log = logging.getLogger("test")


@pytest.fixture
def outage(caplog: pytest.LogCaptureFixture) -> Outage:
    caplog.set_level(logging.INFO)
    return Outage("Kafka", _log, lambda error: error == "no")


def test_outage_is_said_once_when_it_begins_and_once_when_it_is_over(
    outage: Outage, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(10):
        assert 0 < outage.failed("gone") <= LONGEST_DELAY_S
        assert outage.goes_on
    outage.over()
    outage.over()
    assert not outage.goes_on
    assert [record.getMessage().partition(" after")[0] for record in caplog.records] == [
        "Kafka does not answer, trying on: gone",
        "Kafka answers again",
    ]


def test_refusal_is_said_also_after_an_outage_and_then_no_more(
    outage: Outage, caplog: pytest.LogCaptureFixture
) -> None:
    for error in ("gone", "no", "gone", "no"):
        outage.failed(error)
    outage.over()
    outage.failed("no")
    assert [record.getMessage().partition(" after")[0] for record in caplog.records] == [
        "Kafka does not answer, trying on: gone",
        "Kafka refuses, trying on: no",
        "Kafka answers again",
        "Kafka refuses, trying on: no",
    ]
