"""Results summed into y, on a CPU: mega/combine.cuh, the kernel's own header, by warps of 32 threads, against loops.

Copies there do nothing until their barrier is awaited. Then with faults planted, each of which has to be found.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mega.warp_program import NEEDS_COMPILER, finds, passes

pytestmark = NEEDS_COMPILER


def test_y_is_the_sum_in_the_order_that_is_promised(tmp_path: Path) -> None:
    assert passes("sums", tmp_path) == "33 tokens summed\n"


@pytest.mark.parametrize(
    "old, new, found",
    [
        ("other == s.owner && k <", "other == s.owner && k >", "got"),
        ("min_of(kStep, s.end - s.at) * sizeof", "kStep * sizeof", "a copy of what is not there"),
        ("load(next, (n + 1) % 2)", "load(next, n % 2)", "a buffer is loaded before it is read"),
        ("n / 2 % 2, WaitCode", "n % 2, WaitCode", "the wrong phase of a barrier"),
        ("sorted != before", "sorted == before", "got"),
    ],
)
def test_faults_are_found(tmp_path: Path, old: str, new: str, found: str) -> None:
    finds(found, "sums", tmp_path, {"mega/combine.cuh": (old, new)})
