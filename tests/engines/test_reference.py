"""``reference`` against a naive loop in float64, and what each recipe's rounding costs against the unrounded layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from megamoe.engines import recipes
from megamoe.testing.numerics import difference
from megamoe.testing.ranks import RankPool
from tests.engines import naive
from tests.engines.cases import Case, run

Ranks = Callable[[int], RankPool]

CASES = [
    Case(experts=6, top_k=3, kind="masked", bias=True),
    Case(experts=6, top_k=1, kind="zipf", activation="relu2", weights_applied="before_down"),
    Case(experts=6, top_k=2, activation="swiglu_clamped", bias=True, weights_applied="before_down"),
    Case(experts=6, top_k=2, kind="all_to_one", activation="geglu"),
]


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("engine", ["reference", "staged"])
def test_against_the_naive_loop(ranks: Ranks, world_size: int, engine: str) -> None:
    for case in CASES:
        got = ranks(world_size).run(_run, case, engine)
        for rank, expected in enumerate(naive.run(case, world_size)):
            assert set(got[rank]) == set(expected)
            for name, want in expected.items():
                d = difference(got[rank][name], want)
                assert d <= 1e-12, f"{name} on rank {rank} of {world_size}: d = {d:.1e} for {case}"


def _run(rank: int, world_size: int, group: dist.ProcessGroup, case: Case, engine: str) -> dict[str, torch.Tensor]:
    return run(case, rank, world_size, group, engine)


# d of y and of the worst gradient against float64, measured (see docs/engines.md) with some room.
@pytest.mark.parametrize(
    ("recipe", "most_y", "most_grad"),
    [("bf16", 1e-5, 1e-5), ("fp8_block", 1.6e-3, 2.4e-3), ("fp8_row", 1.6e-3, 2.4e-3), ("mxfp4", 1.6e-2, 3.6e-2)],
)
@pytest.mark.parametrize("applied", ["after_down", "before_down"])
def test_error_of_each_recipe(recipe: str, most_y: float, most_grad: float, applied: str) -> None:
    case = Case(
        experts=4,
        top_k=2,
        hidden=256,
        intermediate=192,
        tokens=(48,),
        recipe=recipe,
        weights_applied=applied,
        bias=True,
    )
    expected = naive.run(case, 1)[0]
    got = run(case, 0, 1, None, "reference")
    d = {name: difference(got[name], want) for name, want in expected.items()}
    print(recipe, applied, {name: f"{value:.1e}" for name, value in d.items()})
    worst = max(value for name, value in d.items() if name != "y")
    assert d["y"] <= most_y
    assert worst <= most_grad
    if recipe != "bf16":  # the rounding really happens
        assert d["y"] >= 1e-4


def test_rounding_passes_gradients_straight_through() -> None:
    x = torch.randn(3, 256, requires_grad=True)
    problem = Case(recipe="fp8_block").problem(1)
    for y in (
        recipes.round_activation(x, "fp8_block"),
        recipes.round_weight(x[:2], problem, stacked=True),
        recipes.round_result(x, "fp8_row"),
    ):
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(grad[: len(y)], torch.ones_like(y))


def test_gate_and_up_have_scale_blocks_of_their_own() -> None:
    """With I = 8 both halves fit into one 128-row block; a shared scale would wipe out the small one."""
    problem = Case(recipe="fp8_block", intermediate=8).problem(1)
    w13 = torch.cat([torch.full((8, 32), 1e3), torch.full((8, 32), 1e-5)])
    rounded = recipes.round_weight(w13, problem, stacked=True)
    assert difference(rounded[8:], w13[8:]) < 1e-6
    assert difference(recipes.round_weight(w13, problem, stacked=False)[8:], w13[8:]) == 1.0
