"""R ranks train as one rank on the same global batch: the scale of expert gradients, and their norm."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megamoe.checkpoint import full_state_dict
from megamoe.dispatch.placement import Placement
from megamoe.errors import PeerTimeout
from megamoe.grads import clip_grad_norm, reduce_expert_grads
from megamoe.parallel import dense_parameters, expert_parameters, sync_replicas
from megamoe.router import RouterConfig
from megamoe.testing.numerics import assert_close, difference
from megamoe.testing.ranks import RankDied, RankPool, spawn_ranks
from tests import layer_case as case

Ranks = Callable[[int], RankPool]
STEPS = range(3)
AUX_FREE = RouterConfig(hidden=case.H, num_experts=case.E, top_k=case.K, score="sigmoid", aux_free=True)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)


@pytest.fixture(scope="module")
def one_rank() -> tuple[dict[str, torch.Tensor], list[tuple[float, float]]]:
    model = case.net()
    curve = case.train(model, sgd(model), STEPS)
    return model.state_dict(), curve


def compare(outcome: Any, one_rank: Any) -> None:
    (state, curve), (expected, expected_curve) = outcome, one_rank
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_close(state[name].float(), tensor.float(), whole=1e-9, row=1e-8, what=name)
    for got, want in zip(curve, expected_curve, strict=True):
        assert got == pytest.approx(want, rel=1e-5)


def _train(rank: int, world_size: int, group: Any, layout: str, options: dict[str, Any]) -> Any:
    placement = None
    if layout == "by_two":
        groups = case.by_two(rank)
        model = case.net(groups)
    elif layout == "replicated":  # every rank holds all experts, which then are DDP's like everything else
        model = case.net({"group": case.subgroup(rank, (0,), (1,)), "data_group": group})
        assert expert_parameters(model) == []
    elif layout == "two_groups":  # the first layer over all four ranks, the second over pairs that are not neighbours
        pair = {"group": case.subgroup(rank, (0, 3), (1, 2)), "replica_group": case.subgroup(rank, (0, 1), (3, 2))}
        model = case.net({"group": group}, {"num_shared": 1, "data_group": group} | pair)
    elif layout == "copies":  # experts 0 and 5 stand on two ranks, 1 on all four
        table = [[0, 1, 2], [1, 3, 5], [4, 0, 1], [5, 6, 7]]
        table = [[*row, e] for row, e in zip(table, [3, 2, 7, 1], strict=True)]
        placement = Placement(torch.tensor(table))
        model = case.net({"group": group, "placement": placement})
    else:
        model = case.net({"group": group})
    accumulate = options.pop("accumulate", 1)
    wrapped = case.ddp(model, **options)
    curve = case.train(wrapped, sgd(model), STEPS, rank, world_size, accumulate=accumulate)
    return full_state_dict(wrapped, rank0_only=True), curve


@pytest.mark.parametrize(
    ("world_size", "layout", "options"),
    [
        (2, "plain", {}),
        (2, "plain", {"find_unused_parameters": True, "gradient_as_bucket_view": True}),
        (2, "plain", {"static_graph": True}),
        (2, "replicated", {}),
        (4, "plain", {}),
        (4, "by_two", {}),
        (4, "two_groups", {}),
        (4, "copies", {}),
    ],
)
def test_ranks_train_as_one(ranks: Ranks, one_rank: Any, world_size: int, layout: str, options: dict[str, Any]) -> None:
    outcomes = ranks(world_size).run(_train, layout, options)
    compare(outcomes[0], one_rank)
    assert all(curve == outcomes[0][1] for _, curve in outcomes)  # one norm for all, or the dense parts drift apart
    assert all(state == {} for state, _ in outcomes[1:])


def test_accumulated_gradients(ranks: Ranks) -> None:
    model = case.net()
    curve = case.train(model, sgd(model), STEPS, accumulate=4)
    # Rank r's piece i holds other sequences than the single rank's piece i, so batch-wide losses are left out of both.
    outcomes = ranks(2).run(_train_accumulating)
    plain = case.net({"router": None})
    expected = case.train(plain, sgd(plain), STEPS, accumulate=4), plain.state_dict()
    compare(outcomes[0], (expected[1], expected[0]))
    assert curve != expected[0]


def _train_accumulating(rank: int, world_size: int, group: Any) -> Any:
    model = case.ddp(case.net({"group": group, "router": None}))
    curve = case.train(model, sgd(model), STEPS, rank, world_size, accumulate=2)
    return full_state_dict(model), curve


def _expert_grads(rank: int, world_size: int, group: Any, layout: str) -> list[Any]:
    model = case.net(case.by_two(rank) if layout == "by_two" else {"group": group})
    case.backward(model, 0, rank, world_size)
    first, local = model[1].ffn, model[1].ffn.experts.local_experts
    raw = first.experts.w13.grad.clone()
    reduce_expert_grads(model)
    return [local, raw, first.experts.w13.grad]


@pytest.mark.parametrize(("world_size", "layout", "in_group"), [(2, "plain", 2), (4, "plain", 4), (4, "by_two", 2)])
def test_expert_gradients_are_not_scaled_by_the_wrong_world_size(
    ranks: Ranks, world_size: int, layout: str, in_group: int
) -> None:
    """The classic error: averaged over the ranks that hold them, like dense ones, experts learn at another rate."""
    model = case.net()
    case.backward(model, 0, 0, 1)
    expected = model[1].ffn.experts.w13.grad
    raw_by_expert: dict[int, list[torch.Tensor]] = {}
    for local, raw, reduced in ranks(world_size).run(_expert_grads, layout):
        assert_close(reduced, expected[local], whole=1e-9, row=1e-8, what="reduced gradient")
        for expert, gradient in zip(local, raw, strict=True):
            raw_by_expert.setdefault(expert, []).append(gradient)
    for expert, gradients in raw_by_expert.items():
        # What backward leaves is the SUM over the ranks of one group ...
        assert len(gradients) == world_size // in_group
        assert difference(sum(gradients) / world_size, expected[expert]) < 1e-9
        # ... and averaging over those that hold the same expert, as for dense ones, is wrong by the group's size.
        assert difference(sum(gradients) / len(gradients), expected[expert]) > 0.1


def _norms(rank: int, world_size: int, group: Any, layout: str, kinds: list[float]) -> list[Any]:
    out = []
    for kind in kinds:
        model = case.net(case.by_two(rank) if layout == "by_two" else {"group": group})
        model = case.ddp(model)
        case.backward(model, 0, rank, world_size)
        reduce_expert_grads(model)
        norm = clip_grad_norm(model, 0.25, kind)
        again = clip_grad_norm(model, 1e9, kind)
        out.append((float(norm), float(again)))
    assert len(expert_parameters(model)) == 6 and len(dense_parameters(model)) == len(list(model.parameters())) - 6
    model.module[0].weight.grad[0, 0] = math.nan
    with pytest.raises(RuntimeError, match="norm of the gradients over all ranks is nan"):
        clip_grad_norm(model, 1.0, error_if_nonfinite=True)
    return out


@pytest.mark.parametrize(("world_size", "layout"), [(2, "plain"), (4, "by_two")])
def test_norm_counts_every_parameter_once(ranks: Ranks, world_size: int, layout: str) -> None:
    kinds = [2.0, 1.0, math.inf]
    outcomes = ranks(world_size).run(_norms, layout, kinds)
    assert all(outcome == outcomes[0] for outcome in outcomes)
    for (norm, again), kind in zip(outcomes[0], kinds, strict=True):
        model = case.net()
        case.backward(model, 0, 0, 1)
        expected = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25, kind))
        assert norm == pytest.approx(expected, rel=1e-5) and norm > 0.25
        assert again == pytest.approx(0.25, rel=1e-4)


def _sync(rank: int, world_size: int, group: Any) -> Any:
    torch.manual_seed(rank)  # a mistake that DDP forgives in dense parameters
    layer = case.moe(rank, **case.by_two(rank))
    sync_replicas(layer)
    return layer.experts.w13.detach()


def test_sync_replicas(ranks: Ranks) -> None:
    outcomes = ranks(4).run(_sync)
    assert torch.equal(outcomes[0], outcomes[2]) and torch.equal(outcomes[1], outcomes[3])
    assert not torch.equal(outcomes[0], outcomes[1])


def _wrong_groups(rank: int, world_size: int, group: Any) -> str:
    with pytest.raises(ValueError, match=r"group \(2 ranks\) times replica_group \(1\) must be data_group \(4"):
        case.moe(group=case.by_two(rank)["group"], data_group=group)
    return "refused"


def test_groups_that_do_not_fit(ranks: Ranks) -> None:
    assert ranks(4).run(_wrong_groups) == ["refused"] * 4
    assert dist.is_initialized() is False


def _one_leaves(rank: int, world_size: int, group: Any) -> Any:
    model = case.net({"group": group})
    case.backward(model, 0, rank, world_size)
    if rank == 1:
        os._exit(3)
    clip_grad_norm(model, 1.0)


def test_a_rank_that_is_gone_is_named() -> None:
    first, second = spawn_ranks(2, _one_leaves)
    assert isinstance(second, RankDied)
    assert isinstance(first, PeerTimeout) and "rank 1" in str(first) and "'norm of gradients'" in str(first)


def _balanced(rank: int, world_size: int, group: Any) -> torch.Tensor:
    changes = {"router": AUX_FREE} | (case.by_two(rank) if group is not None else {})
    layer = case.moe(**changes)
    for step in range(3):
        layer(case.part(case.batch(step)[0], rank, world_size))
        layer.router.update_bias()
    return layer.router.expert_bias


def test_router_bias_follows_the_load_of_all_ranks(ranks: Ranks) -> None:
    expected = _balanced(0, 1, None)
    assert expected.abs().max() > 0
    assert all(torch.equal(bias, expected) for bias in ranks(4).run(_balanced))
