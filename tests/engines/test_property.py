"""500 random cases: ``staged`` equals ``reference``, on ranks kept alive between cases."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megamoe.testing import routing
from megamoe.testing.ranks import RankPool
from tests.engines.cases import Case, assert_same


@st.composite
def cases(draw: st.DrawFn, world_size: int) -> Case:
    slots = draw(st.integers(1, 4))
    experts = slots * world_size
    table = None
    if draw(st.booleans()):
        order = draw(st.permutations(range(experts)))
        table = tuple(tuple(order[r * slots : (r + 1) * slots]) for r in range(world_size))
    recipe = draw(st.sampled_from(["fp32", "bf16"]))
    return Case(
        experts=experts,
        top_k=draw(st.integers(1, min(experts, 5))),
        hidden=8 * draw(st.integers(1, 6)),
        intermediate=8 * draw(st.integers(1, 6)),
        tokens=tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 7, 16]), min_size=1, max_size=world_size))),
        kind=draw(st.sampled_from(sorted(routing.KINDS))),
        recipe=recipe,
        activation=draw(st.sampled_from(["swiglu", "swiglu_clamped", "geglu", "relu2"])),
        bias=draw(st.booleans()),
        weights_applied=draw(st.sampled_from(["after_down", "before_down"])),
        weight_dtype="bfloat16" if recipe == "bf16" and draw(st.booleans()) else "float32",
        slots=table,
        seed=draw(st.integers(0, 2**16)),
    )


@pytest.mark.parametrize(("world_size", "examples"), [(1, 120), (2, 120), (3, 100), (4, 100), (8, 60)])
def test_staged_equals_reference(ranks: Callable[[int], RankPool], world_size: int, examples: int) -> None:
    pool = ranks(world_size)

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(cases(world_size))
    def holds(case: Case) -> None:
        assert_same(pool, [case])

    holds()
