"""Rows on their way, on a CPU: mega/push.cuh, pieces.cuh and cast_rows.cuh, the kernel's own headers, by a warp of 32
threads, against plain loops. Then with faults planted in them, each of which has to be found.

What it cannot show: PTX, the memory model, and that lanes of a device run in step.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mega.warp_program import NEEDS_COMPILER, finds, passes

pytestmark = NEEDS_COMPILER


def test_rows_are_what_the_recipes_say(tmp_path: Path) -> None:
    assert passes("rows", tmp_path) == "470 rows cast, 100 pushed\n"


@pytest.mark.parametrize(
    "header, old, new, found",
    [
        ("mega/cast_rows.cuh", "b < blocks; b +=", "b < blocks - 1; b +=", "scale of a cast row"),
        ("mega/cast_rows.cuh", "inverse, r);", "inverse, 0);", "code of a cast row"),
        ("mega/cast_rows.cuh", "row + c0 + lane_col", "row + lane_col", "code of a cast row"),
        ("mega/pieces.cuh", "if (valid >= 16)", "if (valid > 0)", "quantised by"),
        ("mega/pieces.cuh", "h.repair();\n        if (p.valid)", "if (p.valid)", "cast by row"),
        ("mega/push.cuh", "amax = fmaxf(amax, piece[j].finite_amax())", "amax = piece[j].finite_amax()", "cast by row"),
        ("mega/push.cuh", "min_of(first + each, pushes)", "first + 1", "bf16"),
    ],
)
def test_faults_are_found(tmp_path: Path, header: str, old: str, new: str, found: str) -> None:
    finds(found, "rows", tmp_path, {header: (old, new)})
