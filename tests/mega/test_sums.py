"""Rows summed, on a CPU: mega/add_rows.cuh, combine.cuh and partial_sums.cuh, the kernel's own headers, by warps of 32
threads, against loops.

Copies there do nothing until their barrier is awaited. Then with faults planted, each of which has to be found.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mega.warp_program import NEEDS_COMPILER, finds, passes

pytestmark = NEEDS_COMPILER


ADD, ARRIVED, KEPT = (f"mega/{name}.cuh" for name in ("add_rows", "combine", "partial_sums"))


def test_y_is_the_sum_in_the_order_that_is_promised(tmp_path: Path) -> None:
    """Of every route's row; of one row of each owner; and such rows themselves, which an owner adds up."""
    assert passes("sums", tmp_path) == "52 tokens summed, 213 kept\n"


@pytest.mark.parametrize(
    "header, old, new, found",
    [
        (ADD, "other == s.owner && k <", "other == s.owner && k >", "got"),
        (ADD, "min_of(kStep, s.end - s.at) * sizeof", "kStep * sizeof", "a copy of what is not there"),
        (ADD, "load(next, n % 2)", "load(next, (n + 1) % 2)", "a buffer is loaded before it is read"),
        (ADD, "(n - 1) / 2 % 2, WaitCode", "n % 2, WaitCode", "the wrong phase of a barrier"),
        (ADD, "sorted != before", "sorted == before", "got"),
        (ARRIVED, "!= owner || k >= x.lane", "!= owner || k <= x.lane", "got"),
        (KEPT, "table.block_begin(a) * kBlockRows", "a * kBlockRows", "kept"),
        (KEPT, "for (u32 s = 0; s < source; ++s) position", "for (u32 s = 0; s + 1 < source; ++s) position", "kept"),
        (KEPT, "batch += warps() * each", "batch += warps() * each * 2", "kept"),
        (KEPT, "(route.w & kFirstHere) != 0 ||", "true ||", "kept"),
    ],
)
def test_faults_are_found(tmp_path: Path, header: str, old: str, new: str, found: str) -> None:
    finds(found, "sums", tmp_path, {header: (old, new)})
