"""Headers of the mega-kernel compiled for the CPU: programs of ``tests/mega/warp``, by a warp or by whole CTAs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from megamoe.kernels.jit.source import INCLUDE_ROOT

HERE = Path(__file__).parent / "warp"
NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the headers for the CPU")
STANDS_FOR = {"ptx/quant.cuh": "warp.hpp", "mega/context.cuh": "context.hpp", "mega/schedule.cuh": "context.hpp"}


def build(program: str, folder: Path, faults: dict[str, tuple[str, str]] | None = None) -> Path:
    """``program``.cpp over the headers, some replaced by what stands for them here, some with text replaced."""
    for name, header in STANDS_FOR.items():
        path = folder / "megamoe" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#pragma once\n#include "{header}"\n', encoding="utf-8")
    for name, (old, new) in (faults or {}).items():
        text = (INCLUDE_ROOT / "megamoe" / name).read_text(encoding="utf-8")
        assert old in text, f"{name} no longer holds {old!r}"
        path = folder / "megamoe" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace(old, new), encoding="utf-8")
    binary = folder / program
    command = ["g++", "-std=c++20", "-O1", "-pthread", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    includes = [f"-I{folder}", f"-I{INCLUDE_ROOT}", f"-I{HERE}"]
    done = subprocess.run(
        [*command, *includes, str(HERE / f"{program}.cpp"), "-o", str(binary)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return binary


def passes(program: str, folder: Path) -> str:
    """What ``program`` prints, all being well."""
    done = _run(build(program, folder))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def finds(found: str, program: str, folder: Path, faults: dict[str, tuple[str, str]]) -> None:
    """``program`` over headers with ``faults`` planted ends with 1, and prints ``found``."""
    done = _run(build(program, folder, faults))
    assert done.returncode == 1 and found in done.stdout, done.stdout + done.stderr


def _run(binary: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(binary)], capture_output=True, text=True, check=False, timeout=100)
