"""Tokens sorted, on a CPU: mega/dispatch.cuh, the kernel's own header, by all threads of some CTAs and of two ranks,
with few tokens and with many, against plain loops. Then with faults planted in it, each of which has to be found.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mega.warp_program import NEEDS_COMPILER, finds, passes

pytestmark = NEEDS_COMPILER
DISPATCH, SORTING, FEW, MANY = (f"mega/{name}.cuh" for name in ("dispatch", "sorting", "few_tokens", "many_tokens"))


def test_owners_are_told_what_there_is(tmp_path: Path) -> None:
    """Routes, weights, rows, chains of routes, targets since the first call, flags, pushes, the next counters."""
    count, what = passes("sort", tmp_path).split()
    assert what == "routes" and int(count) > 5000


@pytest.mark.parametrize(
    "header, old, new, found",
    [
        (FEW, "list(x) + atomicAdd(pushes, 1u)", "list(x) + 0 * atomicAdd(pushes, 1u)", "a push"),
        (FEW, "rank[i], i / C::routes, i", "rank[i], i / C::routes + 1, i", "a route's row"),
        (FEW, "m.head == m.route) atomicAdd(&of_rows", "m.head >= 0) atomicAdd(&of_rows", "a target"),
        (FEW, "weight_of[i] = weight[j]", "weight_of[i] = weight[0]", "a weight"),
        (FEW, "C::routes * C::routes + k];", "C::routes * C::routes + 0 * k];", "a route's next"),
        (MANY, "number_at(other, i - m.route + k)", "number_at(other, i + 0 * k)", "a route's next"),
        (SORTING, "found = 0;", "found = kFirstHere;", "a route's next"),
        (SORTING, "other < m.head_slot ||", "other > m.head_slot ||", "a push with the wrong expert"),
        (MANY, "slice(0)[slot] + (ranks()[j] & 0xffffu)", "(ranks()[j] & 0xffffu)", "a weight"),
        (DISPATCH, "clear(bank ^ 1)", "clear(bank)", "a counter"),
        (DISPATCH, "histogram(bank)[i] = 0;", ";", "the next histogram"),
    ],
)
def test_faults_are_found(tmp_path: Path, header: str, old: str, new: str, found: str) -> None:
    finds(found, "sort", tmp_path, {header: (old, new)})
