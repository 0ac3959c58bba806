"""Which machines the server runs on, and what the others are told."""

from __future__ import annotations

import tomllib

import pytest
from packaging.requirements import Requirement

from server.machine import ARM64_PYTHONS, this_machine, why_unusable
from tests.services import ROOT


@pytest.mark.parametrize(
    ("machine", "python"), [("x86_64", (3, 11)), ("x86_64", (3, 14)), ("aarch64", (3, 11)), ("aarch64", (3, 13))]
)
def test_machine_with_a_library_is_usable(machine: str, python: tuple[int, int]) -> None:
    assert why_unusable("Linux", machine, python) is None


@pytest.mark.parametrize(
    ("system", "machine", "said"),
    [
        ("Darwin", "arm64", "is for Linux on x86-64 and arm64, not for Darwin on arm64: use the container"),
        ("Linux", "armv7l", "not for Linux on armv7l: use the container"),
        ("Linux", "aarch64", "on arm64, uWebSockets' library is for Python 3.11 and 3.13, not for 3.12"),
    ],
)
def test_machine_without_a_library_is_told_in_a_sentence(system: str, machine: str, said: str) -> None:
    assert said in (why_unusable(system, machine, (3, 12)) or "")


def test_machine_of_the_tests_is_usable() -> None:
    assert why_unusable(*this_machine()) is None


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_machine_gets_one_library_where_there_is_one(machine: str, python: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    environment = {"platform_machine": machine, "python_version": python}
    wanted = [
        it.name
        for it in map(Requirement, project["dependencies"])
        if "socketify" in it.name and (it.marker is None or it.marker.evaluate(environment))
    ]
    if machine == "x86_64":
        assert wanted == ["socketify"]
    else:
        known = tuple(map(int, python.split("."))) in ARM64_PYTHONS
        assert wanted == (["delian-socketify"] if known else [])
