"""Weight gradients that are asked for later are those that backward would have given, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megamoe.engines import run
from megamoe.engines.base import DefersWeightGrads
from megamoe.engines.choose import ENGINES
from megamoe.testing.ranks import RankPool
from tests.engines.cases import Case

NAMES = ("w13", "w2", "b13", "b2")


def _both(rank, world_size, group, case, engine):
    x, idx, topk_weights, grad_y = case.inputs(rank, world_size)
    weights = case.weights(rank, world_size)
    terms = run.Terms(case.problem(world_size).to_json(), group.group_name, engine, "")
    _, saved = run.forward(x, idx, topk_weights, weights, terms=terms, save=True)
    arguments = (grad_y, x, idx, topk_weights, weights)
    at_once = run.backward(*arguments, saved=saved, terms=terms, need_weights=True)
    rest, later = run.backward_later(*arguments, saved=saved, terms=terms)
    assert rest.w13 is rest.w2 is rest.b13 is rest.b2 is None
    assert torch.equal(rest.x, at_once.x) and torch.equal(rest.topk_weights, at_once.topk_weights)
    run.forward(x, idx, topk_weights, weights, terms=terms, save=False)  # another call may come before
    computed = later()
    for name in NAMES:
        want, got = getattr(at_once, name), getattr(computed, name)
        assert (want is None) is (got is None) is (not case.bias and name.startswith("b"))
        assert want is None or torch.equal(got, want), name
    return True


@pytest.mark.parametrize("engine", ["reference", "staged"])
@pytest.mark.parametrize("bias", [False, True])
def test_weight_gradients_may_come_later(ranks: Callable[[int], RankPool], engine: str, bias: bool) -> None:
    case = Case(kind="zipf", bias=bias, weights_applied="before_down", recipe="bf16")
    assert ranks(2).run(_both, case, engine) == [True, True]


def test_staged_defers() -> None:
    assert isinstance(ENGINES["staged"], DefersWeightGrads)
