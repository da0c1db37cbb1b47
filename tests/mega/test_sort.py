"""Tokens sorted, on a CPU: mega/dispatch.cuh, the kernel's own header, by all threads of some CTAs and of two ranks,
with few tokens and with many, against plain loops. Then with faults planted in it, each of which has to be found.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mega.warp_program import NEEDS_COMPILER, finds, passes

pytestmark = NEEDS_COMPILER
DISPATCH = "mega/dispatch.cuh"


def test_owners_are_told_what_there_is(tmp_path: Path) -> None:
    """Routes, weights, rows, targets since the first call, flags, pushes, and the next call's counters at zero."""
    count, what = passes("sort", tmp_path).split()
    assert what == "routes" and int(count) > 5000


@pytest.mark.parametrize(
    "old, new, found",
    [
        ("list(x) + atomicAdd(pushes, 1u)", "list(x) + 0 * atomicAdd(pushes, 1u)", "a push"),
        ("of_routes[slot] + rank[i], t, t", "of_routes[slot] + rank[i], t + 1, t", "a route's row"),
        ("m.head == m.route) atomicAdd(&of_rows", "m.head >= 0) atomicAdd(&of_rows", "a target"),
        ("other < m.head_slot ||", "other > m.head_slot ||", "a push with the wrong expert"),
        ("slice(0)[m.slot] + (ranks()[i] & 0xffffu)", "(ranks()[i] & 0xffffu)", "a weight"),
        ("(bank ^ 1) * blocks", "bank * blocks", "a counter"),
        ("histogram(bank ^ 1, 0)[i] = 0;", ";", "the next histogram"),
    ],
)
def test_faults_are_found(tmp_path: Path, old: str, new: str, found: str) -> None:
    finds(found, "sort", tmp_path, {DISPATCH: (old, new)})
