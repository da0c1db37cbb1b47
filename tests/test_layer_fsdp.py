"""FSDP2 around sharded experts: left alone, or sharded once more over the ranks that hold the same ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from megamoe.checkpoint import (
    full_state_dict,
    init_optimizer_state,
    load_full_state_dict,
    load_portable_state_dict,
    load_safetensors,
    portable_state_dict,
    save_safetensors,
)
from megamoe.dispatch.placement import Placement
from megamoe.grads import reduce_expert_grads
from megamoe.parallel import expert_parameters, moe_layers
from megamoe.testing.numerics import assert_close
from megamoe.testing.ranks import RankPool
from tests import layer_case as case

Ranks = Callable[[int], RankPool]


def shard(model: nn.Module, mesh: DeviceMesh, experts_mesh: DeviceMesh | None) -> nn.Module:
    """The two recipes of docs/parallel-training.md."""
    if experts_mesh is not None:
        for _, moe in moe_layers(model):
            fully_shard(moe.experts, mesh=experts_mesh)
    ignored = set(expert_parameters(model))
    for block in model[1:3]:
        fully_shard(block, mesh=mesh, ignored_params=ignored)
    fully_shard(model, mesh=mesh, ignored_params=ignored)
    return model


def build(rank: int, world_size: int, layout: str) -> nn.Module:
    mesh = init_device_mesh("cpu", (world_size,))
    if layout == "ignored":
        return shard(case.net({"group": dist.group.WORLD}), mesh, None)
    groups = case.by_two(rank)
    # The separate mesh of FSDP is exactly the layer's replica_group.
    experts_mesh = DeviceMesh.from_group(groups["replica_group"], "cpu") if layout == "sharded" else None
    return shard(case.net(groups), mesh, experts_mesh)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)


def _train(rank: int, world_size: int, group: Any, layout: str, folder: str) -> Any:
    model = build(rank, world_size, layout)
    assert isinstance(model[0].weight, DTensor) and isinstance(model[1].ffn.router.weight, DTensor)
    assert isinstance(model[1].ffn.experts.w13, DTensor) == (layout == "sharded")
    optimizer = sgd(model)
    curve = case.train(model, optimizer, range(3), rank, world_size)
    state = full_state_dict(model, rank0_only=True)
    save_safetensors(model, folder + "/safetensors", optimizer)
    dcp.save(portable_state_dict(model, optimizer), checkpoint_id=folder + "/dcp")
    return state, curve, case.train(model, optimizer, range(3, 5), rank, world_size)


def _resume(rank: int, world_size: int, group: Any, layout: str, how: str, folder: str) -> Any:  # noqa: PLR0917
    model = build(rank, world_size, layout)
    with torch.no_grad():
        for parameter in model.parameters():
            (parameter.to_local() if isinstance(parameter, DTensor) else parameter).fill_(float("nan"))
    optimizer = sgd(model)
    if how == "safetensors":
        load_safetensors(model, folder + "/safetensors", optimizer)
    else:
        init_optimizer_state(optimizer)
        state = portable_state_dict(model, optimizer)
        dcp.load(state, checkpoint_id=folder + "/dcp")
        load_portable_state_dict(state, model, optimizer)
    loaded = full_state_dict(model)
    load_full_state_dict(model, loaded)
    return loaded, case.train(model, optimizer, range(3, 5), rank, world_size)


@pytest.mark.parametrize(
    ("world_size", "layout", "readers", "to_layout", "how"),
    [
        (2, "ignored", 4, "sharded", "safetensors"),
        (4, "by_two", 2, "ignored", "dcp"),
        (4, "sharded", 4, "by_two", "dcp"),
        (4, "sharded", 4, "sharded", "dcp"),
        (4, "sharded", 2, "ignored", "safetensors"),
    ],
)
def test_fsdp_trains_as_one_rank_and_resumes_elsewhere(  # noqa: PLR0917
    ranks: Ranks, tmp_path: Any, world_size: int, layout: str, readers: int, to_layout: str, how: str
) -> None:
    model = case.net()
    expected = case.train(model, sgd(model), range(3))
    outcomes = ranks(world_size).run(_train, layout, str(tmp_path))
    state, curve, after = outcomes[0]
    for name, tensor in model.state_dict().items():
        assert_close(state[name], tensor, whole=1e-9, row=1e-8, what=name)
    for got, want in zip(curve, expected, strict=True):
        assert got == pytest.approx(want, rel=1e-5)
    assert all(other == curve for _, other, _ in outcomes)
    for loaded, resumed in ranks(readers).run(_resume, to_layout, how, str(tmp_path)):
        assert all(torch.equal(loaded[name], state[name]) for name in state) and len(loaded) == len(state)
        for got, want in zip(resumed, after, strict=True):
            assert got == pytest.approx(want, rel=1e-5)


def _from_meta(rank: int, world_size: int, group: Any, layout: str) -> bool:
    """Built on the meta device, sharded, and only then given memory and weights: the way to very large models."""
    groups = case.by_two(rank) if layout == "sharded" else {"group": group}
    experts_mesh = DeviceMesh.from_group(groups["replica_group"], "cpu") if layout == "sharded" else None
    with torch.device("meta"):
        model = case.net(groups)
    shard(model, init_device_mesh("cpu", (world_size,)), experts_mesh).to_empty(device="cpu")
    for _, moe in moe_layers(model):
        moe.reset_parameters()
    state, expected = full_state_dict(model), case.net({"group": group}).state_dict()
    shapes = {name: tensor for name, tensor in full_state_dict(case.net({"group": group})).items() if ".ffn." in name}
    assert shapes.keys() < expected.keys() == state.keys()
    return all(torch.equal(state[name], tensor) for name, tensor in shapes.items())


@pytest.mark.parametrize("layout", ["ignored", "sharded"])
def test_weights_from_the_meta_device(ranks: Ranks, layout: str) -> None:
    assert ranks(4).run(_from_meta, layout) == [True] * 4


def _copies_and_shards(rank: int, world_size: int, group: Any) -> str:
    placement = Placement(torch.tensor([[*range(5)], [*range(3, 8)]]))
    groups = case.by_two(rank)
    layer = case.moe(**groups, placement=placement)
    fully_shard(layer.experts, mesh=DeviceMesh.from_group(groups["replica_group"], "cpu"))
    layer(torch.randn(3, case.H)).sum().backward()
    with pytest.raises(ValueError, match="several copies cannot also be sharded by FSDP"):
        reduce_expert_grads(layer)
    return "refused"


def test_copies_that_fsdp_shards_are_refused(ranks: Ranks) -> None:
    assert ranks(4).run(_copies_and_shards) == ["refused"] * 4
