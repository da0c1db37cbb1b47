"""Which parameters of a model are experts, and what data-parallel wrappers must be told about them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from megamoe.layer import MegaMoE


def moe_layers(module: nn.Module) -> Iterator[tuple[str, MegaMoE]]:
    """(name, layer) of every MegaMoE in ``module``, wrapped or not, each once."""
    for name, child in module.named_modules():
        if isinstance(child, MegaMoE):
            yield name, child


def expert_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Parameters that differ between ranks: those of experts spread over more than one rank.

    Found through the layers that own them; ``parameter.megamoe_expert`` says the same of one that was never copied.
    """
    return [p for _, moe in moe_layers(module) if moe.experts.sharded for p in moe.experts.parameters()]


def dense_parameters(module: nn.Module) -> list[nn.Parameter]:
    """All other parameters, replicated on every rank."""
    experts = {id(p) for p in expert_parameters(module)}
    return [p for p in module.parameters() if id(p) not in experts]


def ignore_in_ddp(module: nn.Module) -> list[str]:
    """Make ``DistributedDataParallel(module)`` leave sharded experts and load statistics alone; call it first.

    DDP would otherwise overwrite every rank's experts with rank 0's at the start, average gradients of different
    experts, and overwrite every rank's statistics with rank 0's before each forward.

    Returns:
        the names now ignored, for a look.
    """
    names = []
    for prefix, moe in moe_layers(module):
        dot = prefix + "." if prefix else ""
        names += [f"{dot}last_counts", f"{dot}total_counts", f"{dot}router.load"]
        if moe.experts.sharded:
            names += [f"{dot}experts.{name}" for name, _ in moe.experts.named_parameters()]
    # torch's only way in; FSDP1 and TorchRec use it too.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)  # type: ignore[no-untyped-call]
    return names


@torch.no_grad()
def sync_replicas(module: nn.Module) -> None:
    """Give all ranks of each ``replica_group`` its first rank's experts: what DDP does for everything else.

    Needed only where ranks were seeded differently. A collective of every ``replica_group``.
    """
    for _, moe in moe_layers(module):
        if moe.replica_group is not None:
            for parameter in moe.experts.parameters():
                dist.broadcast(parameter, group_src=0, group=moe.replica_group)
