"""``mega_moe`` as a caller meets it: refusals, shapes, groups, repeatability."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megamoe import EngineUnavailableError, ExpertWeights, Problem, RankMismatchError, explain_engines, mega_moe
from megamoe.testing.ranks import RankPool
from tests.engines.bad_arguments import BAD, CASE, arguments, attempts
from tests.engines.cases import Case, compare, run

Ranks = Callable[[int], RankPool]


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_raise_on_every_rank(ranks: Ranks, name: str) -> None:
    for rank, (alone, together, good) in enumerate(ranks(3).run(attempts, name)):
        own = EngineUnavailableError if name in ("recipe", "no such engine yet") else ValueError
        assert isinstance(together, own)
        assert isinstance(alone, RankMismatchError if rank else own)
        assert str(alone).startswith("rank 0 refused the call: ") == (rank > 0)
        for error in (alone, together):
            assert re.search(BAD[name][1], str(error)), f"rank {rank}: {error}"
        assert good is None, f"the next call failed on rank {rank}: {good!r}"


def _disagree(rank: int, world_size: int, group: dist.ProcessGroup, field: str, values: list[Any]) -> str:
    a = arguments(CASE, 0, world_size)
    if field == "engine":
        a["engine"] = values[rank]
    else:
        a["problem"] = replace(a["problem"], **{field: values[rank]})
    try:
        mega_moe(**a)
    except RankMismatchError as error:
        mega_moe(**arguments(CASE, rank, world_size))
        return str(error)
    return "nothing raised"


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("engine", ["staged", "staged", "reference"]),
        ("max_tokens", [64, 65, 64]),
        ("weights_applied", ["after_down", "after_down", "before_down"]),
    ],
)
def test_ranks_that_differ_are_told_in_what(ranks: Ranks, field: str, values: list[Any]) -> None:
    listed = ", ".join(f"{v!r} on rank {r}" for r, v in enumerate(values))
    for text in ranks(3).run(_disagree, field, values):
        assert text == f"the ranks of the group asked for different things: {field} = {listed}"


def test_group_of_a_stranger_is_refused() -> None:
    with pytest.raises(ValueError, match="group must be a ProcessGroup that this rank belongs to, got"):
        mega_moe(**arguments(CASE, 0, 1), group=dist.GroupMember.NON_GROUP_MEMBER)


# --- shapes and forms of the arguments ---


def test_shapes_and_strides() -> None:
    a = arguments(replace(CASE, tokens=(12,), kind="balanced"), 0, 1)
    expected = mega_moe(**a)

    batched = {name: a[name].view(3, 4, -1) for name in ("x", "topk_idx", "topk_weights")}
    assert torch.equal(mega_moe(**a | batched), expected.view(3, 4, -1))

    wide = torch.randn(12, 2 * CASE.hidden)
    wide[:, ::2] = a["x"]
    strided = {
        "x": wide[:, ::2],
        "topk_idx": a["topk_idx"].T.contiguous().T,
        "topk_weights": a["topk_weights"].repeat_interleave(2, 1)[:, ::2],
    }
    assert torch.equal(mega_moe(**a | strided), expected)
    assert torch.equal(mega_moe(**a | {"topk_idx": a["topk_idx"].int()}), expected)


@pytest.mark.parametrize("engine", ["staged", "reference"])
def test_an_expert_named_twice_counts_twice(engine: str) -> None:
    a = arguments(replace(CASE, tokens=(5,), kind="balanced"), 0, 1) | {"engine": engine}
    once, twice = a["topk_idx"].clone(), a["topk_idx"].clone()
    once[:, 1] = -1
    twice[:, 1] = twice[:, 0]
    summed = torch.stack([a["topk_weights"].sum(1), torch.zeros(5)], dim=1)
    y = mega_moe(**a | {"topk_idx": twice})
    assert torch.allclose(y, mega_moe(**a | {"topk_idx": once, "topk_weights": summed}), atol=1e-5)


@pytest.mark.parametrize("engine", ["staged", "reference"])
@pytest.mark.parametrize("recipe", ["fp32", "bf16"])
def test_nan_stays_in_its_token(engine: str, recipe: str) -> None:
    a = arguments(replace(CASE, tokens=(9,), recipe=recipe, kind="balanced"), 0, 1) | {"engine": engine}
    clean = mega_moe(**a)
    x = a["x"].clone()
    x[4, 3] = torch.nan
    y = mega_moe(**a | {"x": x})
    assert y[4].isnan().all()
    others = torch.arange(9) != 4
    assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("engine", ["staged", "reference"])
def test_settings_of_the_caller_change_nothing(ranks: Ranks, engine: str) -> None:
    """A default device, a default dtype, inference mode."""
    assert ranks(2).run(_under_settings, engine) == [True, True]


def _under_settings(rank: int, world_size: int, group: dist.ProcessGroup, engine: str) -> bool:
    case = replace(CASE, recipe="bf16", bias=True)
    a = arguments(case, rank, world_size) | {"engine": engine}
    x, grad_y = a["x"].requires_grad_(), case.inputs(rank, world_size)[3]

    def outcome() -> tuple[torch.Tensor, ...]:
        y = mega_moe(**a)
        return (y, *torch.autograd.grad(y, x, grad_y)) if y.requires_grad else (y,)

    expected = outcome()
    with torch.device("meta"):
        others = [outcome()]
    with torch.inference_mode():
        others.append(outcome())
    torch.set_default_dtype(torch.float64)
    try:
        others.append(outcome())
    finally:
        torch.set_default_dtype(torch.float32)
    return all(torch.equal(o, e) for other in others for o, e in zip(other, expected, strict=False))


def test_y_is_the_callers_own() -> None:
    a = arguments(replace(CASE, tokens=(5,)), 0, 1)
    x = a["x"].clone()
    mega_moe(**a).fill_(7.0)
    assert torch.equal(a["x"], x)


# --- groups ---


def _repeat(rank: int, world_size: int, group: dist.ProcessGroup, case: Case, engine: str) -> bool:
    first = run(case, rank, world_size, group, engine)
    again = run(case, rank, world_size, group, engine)
    return all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("engine", ["staged", "reference"])
@pytest.mark.parametrize("recipe", ["fp32", "bf16"])
def test_repeats_bit_for_bit(ranks: Ranks, engine: str, recipe: str) -> None:
    case = Case(experts=6, top_k=3, kind="zipf", recipe=recipe, bias=True)
    assert all(ranks(3).run(_repeat, case, engine))


def _sub_groups(rank: int, world_size: int, group: dist.ProcessGroup) -> list[str]:
    """WORLD, two halves in another order of ranks, and a group of one rank, in turn, in one process."""
    halves = [dist.new_group([2, 0]), dist.new_group([3, 1])]
    alone = [dist.new_group([r]) for r in range(world_size)][rank]
    half = halves[rank % 2]
    wrong = []
    for part in (half, group, half, alone, None, half):
        size = dist.get_world_size(part)
        wrong += compare(dist.get_rank(part), size, part, [replace(CASE, experts=8)])  # type: ignore[arg-type]
    return wrong


def test_groups_that_are_not_world(ranks: Ranks) -> None:
    assert ranks(4).run(_sub_groups) == [[]] * 4


def _two_layers(rank: int, world_size: int, group: dist.ProcessGroup, engine: str) -> list[torch.Tensor]:
    """Two layers, the second over another group and with other sizes, in one graph."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair = pairs[rank // 2]
    first, second = Case(experts=8, top_k=3), Case(experts=4, top_k=1, intermediate=40)
    x, idx, topk_weights, grad_y = first.inputs(rank, world_size)
    x.requires_grad_()
    ws = [first.weights(rank, world_size), second.weights(rank % 2, 2)]
    leaves = [x, *(t.requires_grad_() for w in ws for t in (w.w13, w.w2))]
    h = x + mega_moe(x, idx, topk_weights, ws[0], problem=first.problem(world_size), group=group, engine=engine)
    route = (idx[:, :1] % 4, topk_weights[:, :1].contiguous())
    y = h + mega_moe(h, *route, ws[1], problem=second.problem(2), group=pair, engine=engine)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_y)]


def test_two_layers_over_two_groups(ranks: Ranks) -> None:
    staged, reference = (ranks(4).run(_two_layers, engine) for engine in ("staged", "reference"))
    for actual, expected in zip(staged, reference, strict=True):
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


def _alone_in_a_group(rank: int, world_size: int, group: dist.ProcessGroup) -> torch.Tensor | None:
    if rank:
        return None  # would be missed by a collective
    y: torch.Tensor = mega_moe(**arguments(CASE, 0, 1) | {"group": "self"})
    return y


def test_self_concerns_no_other_rank(ranks: Ranks) -> None:
    y, other = ranks(2).run(_alone_in_a_group)
    assert other is None and torch.equal(y, mega_moe(**arguments(CASE, 0, 1)))


# --- engines ---


def test_auto_takes_the_best_and_the_others_say_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    reasons = dict(explain_engines(Problem(hidden=32, intermediate=24, num_experts=4, top_k=2), cpu, None))
    assert list(reasons) == ["mega", "staged", "reference"]
    assert reasons["mega"]
    assert reasons["staged"] is None and reasons["reference"] is None
    quantised = Problem(hidden=32, intermediate=24, num_experts=4, top_k=2, recipe="mxfp4")
    assert dict(explain_engines(quantised, cpu, None))["staged"]

    case = Case(experts=4, tokens=(6,), recipe="mxfp4")
    assert torch.equal(mega_moe(**arguments(case, 0, 1)), mega_moe(**arguments(case, 0, 1), engine="reference"))
    monkeypatch.setenv("MEGAMOE_ENGINE", "staged")
    with pytest.raises(EngineUnavailableError, match="the recipe mxfp4 needs mega or reference"):
        mega_moe(**arguments(case, 0, 1))
    with pytest.raises(ValueError, match="w13 must have shape"):
        mega_moe(**arguments(case, 0, 1) | {"weights": ExpertWeights(torch.ones(4, 2, 2), torch.ones(4, 2, 2))})
