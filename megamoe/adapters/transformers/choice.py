"""One model whose experts are already this rank's alone, run by one implementation after another: what to compare."""

from __future__ import annotations

import contextlib
import datetime
import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from megamoe import env
from megamoe.adapters.transformers.experts import Settings
from megamoe.adapters.transformers.forms import is_experts
from megamoe.adapters.transformers.models import version
from megamoe.adapters.transformers.parallel import Experts, has_implementations, spread
from megamoe.lm.world import World

IMPLEMENTATIONS = ("megamoe", "eager", "grouped_mm")


def choose(model: Any, name: str, world: World, settings: Settings) -> None:
    """Have ``name`` run the experts of ``model``: each rank its own batch.

    "megamoe" goes over the ranks itself; with the others, transformers' ``AllToAllEP`` moves the tokens.

    Raises:
        ValueError: an implementation that is not known, or that this transformers can't spread over ranks.
    """
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"experts must be one of {', '.join(IMPLEMENTATIONS)}, got {name!r}")
    if world.size > 1 and name != "megamoe" and not has_implementations():
        raise ValueError(
            f"transformers {version()} can't spread {name} experts over ranks with batches of their "
            f"own: use one rank, or 5.23"
        )
    modules = [m for m in model.modules() if is_experts(m)]
    for module in modules:
        with contextlib.suppress(AttributeError):
            del module.forward
    model.set_experts_implementation(name)
    if world.size == 1:
        return
    assert world.group is not None
    if name == "megamoe":
        for module in modules:
            module.forward = spread(module, world.group, settings)
    else:
        mesh = _mesh(world.group, world.device.type)
        for module in modules:
            module.forward = _all_to_all(module, mesh)


@functools.lru_cache(maxsize=1)
def _mesh(group: dist.ProcessGroup, device_type: str) -> DeviceMesh:
    """ep over all of ``group``, tp of one rank each; made once, on ``group`` itself, so that its time limit holds."""
    limit = datetime.timedelta(seconds=env.get("MEGAMOE_TIMEOUT_S"))
    alone, _ = dist.new_subgroups(group_size=1, group=group, timeout=limit)  # type: ignore[no-untyped-call]
    ranks = torch.arange(group.size(), device="cpu")[:, None]
    return DeviceMesh.from_group([group, alone], device_type, mesh=ranks, mesh_dim_names=("ep", "tp"))


def _all_to_all(module: nn.Module, mesh: Any) -> Experts:
    from transformers.distributed.expert_parallel import AllToAllEP

    move = AllToAllEP(module, mesh["ep"], mesh["tp"])

    def call(x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = move(x, top_k_index, top_k_weights)
        return y.to(x.dtype)

    return call
