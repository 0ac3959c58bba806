"""What pip compiles: without a warning, with a compiler that is there or with none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from server import uws_native
from tests.services import ROOT


def test_library_is_there() -> None:
    assert uws_native.LIBRARY.exists(), "make test installs the package, and that compiles it"


def test_it_compiles_without_a_warning(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler: pip uses Zig's, which comes and goes with the build")
    sources = sorted(ROOT.glob("server/uws_*.c"))
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    done = subprocess.run([compiler, *flags, "-o", tmp_path / "x.so", *sources], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_wheel_holds_it_where_there_is_no_compiler(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    for name in ("pyproject.toml", "README.md", "hatch_build.py"):
        shutil.copy(ROOT / name, project)
    for name in ("server", "sync"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__", "web", ".build-*")
        shutil.copytree(ROOT / name, project / name, ignore=ignored)
    argv = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(tmp_path / "wheels"), str(project)]
    env = {**os.environ, "CC": "/nonexistent/cc", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=300)
    if "No matching distribution" in done.stderr or "Could not find a version" in done.stderr:
        pytest.skip("the package index has no Zig, or cannot be reached")
    assert done.returncode == 0, done.stderr
    wheel = next((tmp_path / "wheels").glob("scoreboard-*.whl"))
    assert "py3-none-linux" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        library = archive.read("server/libuws_native.so")
    assert library.startswith(b"\x7fELF")
    assert b"posts_take" in library
    assert b"wire_begin" in library
