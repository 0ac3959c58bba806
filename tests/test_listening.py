"""That one cannot listen somewhere is said with the variable that has to change, and never as another reason."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from server import listening
from server.embedded import ADDRESS, free_port
from server.errors import UwsError
from tests.services import ROOT, environment

NOBODY = 65534
OF_NOBODY = "192.0.2.1"
"""An address for documentation (RFC 5737): no machine has it."""


def refusal(host: str, port: int) -> str:
    with pytest.raises(UwsError) as caught:
        listening.check(host, port)
    return str(caught.value)


@pytest.mark.parametrize("host", [ADDRESS, "0.0.0.0", "::", "localhost"])
def test_free_port_is_passed_and_left_free(host: str) -> None:
    port = free_port()
    listening.check(host, port)
    listening.check(host, port)
    listening.check(host, 0)


def test_port_of_another_process_is_called_taken() -> None:
    with socket.create_server((ADDRESS, 0)) as other:
        port = other.getsockname()[1]
        for host in (ADDRESS, "0.0.0.0"):
            assert (
                refusal(host, port) == f"PORT: expected a free port at HOST={host}, got {port}: another process has it"
            )


@pytest.mark.parametrize("host", [OF_NOBODY, "no.such.host.invalid"])
def test_address_of_another_machine_is_the_fault_of_the_host(host: str) -> None:
    assert refusal(host, free_port()).startswith(f"HOST: expected an address of this machine, got {host!r}: ")


@pytest.fixture
def without_rights() -> Iterator[None]:
    """As a user who is not root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def test_port_that_takes_rights_is_not_called_taken(without_rights: None) -> None:
    try:
        listening.check(ADDRESS, 1)
    except UwsError as error:
        said = str(error)
    else:
        pytest.skip("on this machine everybody may listen on any port")
    assert said.startswith("PORT: expected a port that this user may listen on, got 1: those below 1024 are for root")


def test_variables_of_other_ports_are_named() -> None:
    with socket.create_server((ADDRESS, 0)) as other, pytest.raises(OSError, match="in use") as caught:
        listening.bound(ADDRESS, other.getsockname()[1])
    said = listening.why_not(caught.value, ADDRESS, 9100, hosts="METRICS_HOST", ports="RELAY_METRICS_PORT")
    assert (
        said == f"RELAY_METRICS_PORT: expected a free port at METRICS_HOST={ADDRESS}, got 9100: another process has it"
    )


@pytest.mark.parametrize("command", ["serve", "all"])
def test_command_that_cannot_listen_says_so_once_and_ends(command: str) -> None:
    argv, env = [sys.executable, "-m", "server", command], environment({"HOST": OF_NOBODY, "PORT": "0"})
    done = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert (done.returncode, len(lines)) == (2, 1)
    assert lines[0].startswith(f"scoreboard: HOST: expected an address of this machine, got {OF_NOBODY!r}: ")
