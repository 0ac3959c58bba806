"""Load from wrk, which is written in C and so leaves the cores to what is measured."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from server.auth import issue

# `done` gets the latencies in µs; the last line of the output is ours.
_DONE = """
done = function(summary, latency, requests)
  local errors = summary.errors
  print(string.format(
    '{"requests": %d, "duration_us": %d, "p50_us": %d, "p99_us": %d, "p999_us": %d, "failed": %d, "refused": %d}',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99), latency:percentile(99.9),
    errors.connect + errors.read + errors.write + errors.timeout, errors.status))
end
"""

# The requests are put together once, so that wrk only ever copies bytes.
_POSTS = """
local requests, n, i = {}, 0, 0

init = function(args)
  for player, token in pairs(tokens) do
    local headers = {["Authorization"] = "Bearer " .. token, ["Content-Type"] = "application/json"}
    local body = '{"playerId":"' .. player .. '","scoreDelta":5}'
    n = n + 1
    requests[n] = wrk.format("POST", "/update-score", headers, body)
  end
end

request = function()
  i = i % n + 1
  return requests[i]
end
"""


class MissingWrkError(Exception):
    """There is no wrk."""


class Load(NamedTuple):
    """What wrk saw. `failed` counts broken connections and timeouts, `refused` answers other than 2xx and 3xx."""

    requests: int
    duration_us: int
    p50_us: int
    p99_us: int
    p999_us: int
    failed: int
    refused: int

    @property
    def per_second(self) -> float:
        """Answers a second."""
        return self.requests * 1e6 / self.duration_us


def require_wrk() -> None:
    """Raises MissingWrkError, saying how to get it."""
    if not shutil.which("wrk"):
        raise MissingWrkError("the benchmarks need wrk: apt-get install wrk")


def posts(secret: str, players: Sequence[str]) -> str:
    """A script that lets the players, each with a token of its own, score in turn."""
    tokens = "".join(f'["{player}"] = "{issue(secret.encode(), player)}",\n' for player in players)
    return f"local tokens = {{\n{tokens}}}\n{_POSTS}{_DONE}"


def gets() -> str:
    """A script that GETs the address it is given."""
    return _DONE


def run(url: str, script: str, *, connections: int, seconds: float) -> Load:
    """Load `url` with keep-alive connections, from one thread, for whole seconds."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "load.lua")
        file.write_text(script)
        argv = ["wrk", "-t1", f"-c{connections}", f"-d{math.ceil(seconds)}s", "--timeout", "10s", "-s", str(file), url]
        done = subprocess.run(argv, check=True, capture_output=True, text=True)
    return Load(**json.loads(done.stdout.splitlines()[-1]))
