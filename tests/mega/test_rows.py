"""Rows on their way, on a CPU: mega/push.cuh, pieces.cuh and cast_rows.cuh, the kernel's own headers, by a warp of 32
threads, against plain loops. Then with faults planted in them, each of which has to be found.

What it cannot show: PTX, the memory model, and that lanes of a device run in step.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from megamoe.kernels.jit.source import INCLUDE_ROOT

HERE = Path(__file__).parent / "warp"
STANDS_FOR = {"ptx/quant.cuh": "warp.hpp", "mega/context.cuh": "context.hpp"}
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the headers for the CPU")


def build(folder: Path, faults: dict[str, tuple[str, str]] | None = None) -> Path:
    """rows.cpp over the headers, some replaced by what stands for them here, some with text replaced."""
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
    binary = folder / "rows"
    command = ["g++", "-std=c++20", "-O1", "-pthread", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    includes = [f"-I{folder}", f"-I{INCLUDE_ROOT}", f"-I{HERE}"]
    done = subprocess.run(
        [*command, *includes, str(HERE / "rows.cpp"), "-o", str(binary)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return binary


def run(binary: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(binary)], capture_output=True, text=True, check=False, timeout=100)


def test_rows_are_what_the_recipes_say(tmp_path: Path) -> None:
    done = run(build(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "376 rows cast, 100 pushed\n"


@pytest.mark.parametrize(
    "header, old, new, found",
    [
        ("mega/cast_rows.cuh", "p < pieces; p +=", "p < pieces - 1; p +=", "scale of a cast row"),
        ("mega/cast_rows.cuh", "piece.row % kStripRows", "0", "code of a cast row"),
        ("comm/protocol.cuh", "mem.add(done, 1) == tiles - 1", "mem.add(done, 1) == tiles - 2", "cast too early"),
        ("mega/pieces.cuh", "if (valid >= 16)", "if (valid > 0)", "quantised by"),
        ("mega/pieces.cuh", "h.repair();\n        if (p.valid)", "if (p.valid)", "cast by row"),
        ("mega/push.cuh", "amax = fmaxf(amax, piece[j].finite_amax())", "amax = piece[j].finite_amax()", "cast by row"),
        ("mega/push.cuh", "min_of(first + each, pushes)", "first + 1", "bf16"),
    ],
)
def test_faults_are_found(tmp_path: Path, header: str, old: str, new: str, found: str) -> None:
    done = run(build(tmp_path, {header: (old, new)}))
    assert done.returncode == 1 and found in done.stdout, done.stdout + done.stderr
