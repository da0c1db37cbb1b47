"""``staged`` against ``reference``: forward and every gradient, over ranks, routings, recipes and layer forms."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megamoe.testing import routing
from megamoe.testing.ranks import RankPool
from tests.engines.cases import Case, assert_same

Ranks = Callable[[int], RankPool]


def _cases(world_size: int) -> list[Case]:
    E = {1: 8, 2: 8, 3: 6, 4: 8, 8: 8}[world_size]
    cases = [Case(experts=E, kind=kind, top_k=3, recipe=r) for kind in routing.KINDS for r in ("fp32", "bf16")]
    cases += [
        Case(experts=E, top_k=1, recipe="bf16"),
        Case(experts=E, tokens=(0, 9)),
        Case(experts=E, tokens=(0,)),
        Case(experts=E, top_k=E, kind="masked", bias=True),
    ]
    return cases


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_staged_equals_reference_over_routings(ranks: Ranks, world_size: int) -> None:
    assert_same(ranks(world_size), _cases(world_size))


@pytest.mark.parametrize("world_size", [2, 4])
def test_one_expert_a_rank(ranks: Ranks, world_size: int) -> None:
    cases = [Case(experts=world_size, top_k=k, kind="masked") for k in (1, world_size)]
    assert_same(ranks(world_size), cases)


def test_every_form_of_the_layer(ranks: Ranks) -> None:
    cases = [
        Case(activation=activation, bias=bias, weights_applied=applied, weight_dtype=dtype, recipe=recipe)
        for activation in ("swiglu", "swiglu_clamped", "geglu", "relu2")
        for bias in (False, True)
        for applied in ("after_down", "before_down")
        for recipe, dtype in (("fp32", "float32"), ("bf16", "bfloat16"))
    ]
    assert_same(ranks(2), cases)


def test_other_placements(ranks: Ranks) -> None:
    cases = [
        Case(experts=6, slots=((5, 0, 3), (1, 4, 2)), kind="zipf", bias=True),
        Case(experts=5, slots=((0, 1, 2), (3, 4, 0)), kind="zipf", recipe="bf16"),  # expert 0 stands twice
    ]
    assert_same(ranks(2), cases)
