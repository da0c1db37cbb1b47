"""Checkpoints of sharded experts: any number of ranks writes, any other reads, bit for bit."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn

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
from megamoe.errors import PeerTimeout
from megamoe.testing.ranks import RankDied, RankPool, spawn_ranks
from tests import layer_case as case

Ranks = Callable[[int], RankPool]
SHUFFLED = [[5, 2, 7, 0], [1, 6, 3, 4]]
COPIES = [[0, 1, 2], [1, 3, 5], [4, 0, 1], [5, 6, 7]]


def build(rank: int, group: Any, layout: str) -> nn.Module:
    if layout == "by_two":
        return case.net(case.by_two(rank))
    table = {"shuffled": SHUFFLED, "copies": COPIES}.get(layout)
    placement = None if table is None else Placement(torch.tensor(table))
    return case.net({"group": group if dist.is_initialized() else None, "placement": placement})


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def scramble(model: nn.Module) -> nn.Module:
    """Make sure that what is found later was loaded."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    return model


def _save(rank: int, world_size: int, group: Any, layout: str, path: str, how: str, steps: int) -> Any:  # noqa: PLR0917
    model = build(rank, group, layout)
    optimizer = adam(model)
    case.train(case.ddp(model) if dist.is_initialized() else model, optimizer, range(steps), rank, world_size)
    if how == "dcp":
        dcp.save(portable_state_dict(model, optimizer), checkpoint_id=path)
    elif how == "full":
        state = full_state_dict(model, rank0_only=True)
        if rank == 0:
            torch.save(state, path)
    else:
        save_safetensors(model, path, optimizer, metadata={"step": str(steps)})
    return full_state_dict(model)


def _load(rank: int, world_size: int, group: Any, layout: str, path: str, how: str, steps: range) -> Any:  # noqa: PLR0917
    """(state as loaded, moments of the first layer's experts, curve of the steps that follow)."""
    model = scramble(build(rank, group, layout))
    optimizer = adam(model)
    if how == "dcp":
        init_optimizer_state(optimizer)
        state = portable_state_dict(model, optimizer)
        dcp.load(state, checkpoint_id=path)
        load_portable_state_dict(state, model, optimizer)
    elif how == "full":
        load_full_state_dict(model, torch.load(path))
        return full_state_dict(model), [], []
    else:
        assert load_safetensors(model, path, optimizer) == {"step": str(steps.start)}
    loaded = full_state_dict(model)
    experts = model[1].ffn.experts
    moments = list(zip(experts.local_experts, optimizer.state[experts.w13]["exp_avg_sq"].clone(), strict=True))
    curve = case.train(case.ddp(model) if dist.is_initialized() else model, optimizer, steps, rank, world_size)
    return loaded, moments, curve


def on(ranks: Ranks, world_size: int, fn: Any, *args: Any) -> list[Any]:
    return [fn(0, 1, None, *args)] if world_size == 1 else ranks(world_size).run(fn, *args)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    ("how", "writers", "layout", "readers", "to_layout"),
    [
        ("folder", 2, "plain", 4, "by_two"),
        ("folder", 4, "by_two", 1, "plain"),
        ("folder", 4, "copies", 2, "shuffled"),
        ("model.safetensors", 4, "by_two", 2, "shuffled"),
        ("model.safetensors", 1, "plain", 4, "copies"),
        ("dcp", 4, "by_two", 2, "plain"),
        ("dcp", 2, "shuffled", 4, "copies"),
        ("dcp", 4, "copies", 1, "plain"),
        ("full", 4, "copies", 2, "plain"),
        ("full", 2, "shuffled", 4, "by_two"),
    ],
)
def test_any_number_of_ranks_reads_what_any_other_wrote(  # noqa: PLR0917
    ranks: Ranks, tmp_path: Path, how: str, writers: int, layout: str, readers: int, to_layout: str
) -> None:
    path = str(tmp_path / ("state.pt" if how == "full" else how))
    saved = on(ranks, writers, _save, layout, path, how, 2)[0]
    again = on(ranks, writers, _load, layout, path, how, range(2, 4))
    elsewhere = on(ranks, readers, _load, to_layout, path, how, range(2, 4))
    for state, _, _ in again + elsewhere:
        assert list(state) == list(saved)
        assert all(torch.equal(state[name], saved[name]) for name in saved)
    moments: dict[int, torch.Tensor] = {}
    for _, mine, curve in again + elsewhere:
        for expert, moment in mine:
            assert torch.equal(moments.setdefault(expert, moment), moment) and moment.abs().max() > 0
        for got, want in zip(curve, elsewhere[0][2], strict=True):
            assert got == pytest.approx(want, rel=1e-4)


def test_resume_repeats_the_run_bit_for_bit(ranks: Ranks, tmp_path: Path) -> None:
    straight = ranks(2).run(_straight)
    ranks(2).run(_save, "plain", str(tmp_path / "at2"), "folder", 2)
    resumed = ranks(2).run(_load, "plain", str(tmp_path / "at2"), "folder", range(2, 4))
    assert straight[0] == resumed[0][2]


def _straight(rank: int, world_size: int, group: Any) -> Any:
    model = build(rank, group, "plain")
    return case.train(case.ddp(model), adam(model), range(4), rank, world_size)[2:]


def test_each_rank_opens_only_files_with_its_experts(ranks: Ranks, tmp_path: Path) -> None:
    folder = tmp_path / "four"
    ranks(4).run(_save, "plain", str(folder), "folder", 0)
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert {n: f[6:11] for n, f in weight_map.items() if n.startswith("1.ffn.experts") and n.endswith("w13")} == {
        f"1.ffn.experts.{e}.w13": f"{e // 2 + 1:05d}" for e in range(8)
    }
    assert {f[6:11] for n, f in weight_map.items() if "experts" not in n} == {"00001"}
    (folder / "model-00004-of-00004.safetensors").unlink()  # experts 6 and 7, of rank 1 alone when two ranks read
    outcomes = ranks(2).try_run(_load_model, str(folder))
    assert outcomes[0] == "loaded"
    assert isinstance(outcomes[1], FileNotFoundError) and "model-00004-of-00004" in str(outcomes[1])


def _load_model(rank: int, world_size: int, group: Any, path: str) -> str:
    load_safetensors(build(rank, group, "plain"), path)
    return "loaded"


def _save_twice(rank: int, world_size: int, group: Any, path: str) -> str:
    model = build(rank, group, "plain")
    save_safetensors(model, path)
    with pytest.raises(FileExistsError, match="already holds a checkpoint"):
        save_safetensors(model, path)
    with pytest.raises(OSError, match="rank 0 could not save"):
        save_safetensors(model, path + "/no/such/folder/model.safetensors")
    load_safetensors(model, path)
    return "fine"


def test_one_ranks_failure_is_every_ranks(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(2).run(_save_twice, str(tmp_path / "folder")) == ["fine", "fine"]


def _one_leaves(rank: int, world_size: int, group: Any, path: str) -> None:
    model = build(rank, group, "plain")
    model(torch.zeros(1, case.H))
    if rank == 1:
        os._exit(3)
    save_safetensors(model, path)


@pytest.mark.parametrize("name", ["folder", "model.safetensors"])
def test_a_rank_that_is_gone_is_named(tmp_path: Path, name: str) -> None:
    first, second = spawn_ranks(2, _one_leaves, str(tmp_path / name))
    assert isinstance(second, RankDied)
    assert isinstance(first, PeerTimeout) and "rank 1" in str(first) and "checkpoint" in str(first)
    assert not any(path.suffix in {".json", ".safetensors"} for path in tmp_path.rglob("*"))


def test_a_checkpoint_that_does_not_fit_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    model = case.moe()
    path = tmp_path / "model.safetensors"
    save_safetensors(model, path)
    tensors = load_file(path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors["experts.3.w2"] = torch.zeros(16, 8)
    del tensors["experts.5.w13"], tensors["router.weight"]
    tensors["experts.8.w13"] = torch.zeros(48, 16)
    save_file(tensors, path)
    message = (
        r"experts\.3\.w2 must have shape \(16, 24\), got \(16, 8\); "
        r"missing: router\.weight, experts\.5\.w13; unexpected: experts\.8\.w13"
    )
    with pytest.raises(ValueError, match=message):
        load_safetensors(model, path)
    state = {name: tensor.clone() for name, tensor in tensors.items()}
    with pytest.raises(ValueError, match=message):
        load_portable_state_dict(state, model)
    full = full_state_dict(model)
    full["experts.w13"] = full["experts.w13"][:4]
    with pytest.raises(ValueError, match=r"experts\.w13 must have shape \(8, 48, 16\), got \(4, 48, 16\)"):
        load_full_state_dict(model, full)
    del full["experts.w13"]
    with pytest.raises(ValueError, match=r"missing: experts\.0\.w13, .* and 3 more"):
        load_full_state_dict(model, full)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


def test_not_strict_passes_over_what_nobody_reads(tmp_path: Path) -> None:
    model = case.moe()
    state = full_state_dict(model) | {"other": torch.ones(1)}
    with pytest.raises(ValueError, match="unexpected: other"):
        load_full_state_dict(model, state)
    load_full_state_dict(model, state, strict=False)


def test_full_state_is_the_state_dict_of_one_rank() -> None:
    model = case.net()
    state = full_state_dict(model)
    assert state.keys() == model.state_dict().keys()
    case.net().load_state_dict(state)
    state[next(iter(state))].zero_()
    assert model[0].weight.abs().max() > 0  # a copy


def _local_load(rank: int, world_size: int, group: Any) -> str:
    layer = case.moe(group=group)
    layer.load_state_dict(layer.state_dict())
    with pytest.raises(RuntimeError, match="w13 holds all 8 experts, but this rank holds 4: load a full state with"):
        layer.load_state_dict(full_state_dict(layer))
    return "refused"


def test_full_state_in_load_state_dict_is_refused_in_a_sentence(ranks: Ranks) -> None:
    assert ranks(2).run(_local_load) == ["refused"] * 2


def test_optimiser_state_that_has_no_row_for_each_expert_is_refused() -> None:
    model = case.moe()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    init_optimizer_state(optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.1 and all(p.grad is None for p in model.parameters())
    assert "optimizer.experts.7.w2.momentum_buffer" in portable_state_dict(model, optimizer)
    optimizer.state[model.experts.w13]["row"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"row of experts\.w13 must have a row for each of 8 experts, got \(3,\)"):
        portable_state_dict(model, optimizer)
    optimizer.state[model.experts.w13]["row"] = 3
    with pytest.raises(ValueError, match=r"row of experts\.w13 is a int"):
        portable_state_dict(model, optimizer)
    other = torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1)
    with pytest.raises(ValueError, match=r"parameter \(3,\) that the module lacks"):
        portable_state_dict(model, other)
