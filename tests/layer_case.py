"""A small model with two MoE layers, one global batch, and the training step that the layer's tests share."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from megamoe.grads import clip_grad_norm, reduce_expert_grads
from megamoe.layer import MegaMoE, total_aux_loss
from megamoe.parallel import ignore_in_ddp
from megamoe.router import RouterConfig

H, I, E, K = 16, 24, 8, 2  # noqa: E741 - the paper's letter
SEQUENCES, LENGTH = 8, 5


def moe(seed: int = 0, **changes: Any) -> MegaMoE:
    """One layer in fp32 with every loss switched on."""
    router = RouterConfig(hidden=H, num_experts=E, top_k=K, aux_coef=0.02, seq_aux_coef=0.01, z_coef=0.01)
    arguments = {"router": router, "recipe": "fp32", "generator": torch.Generator().manual_seed(seed)}
    return MegaMoE(H, I, E, K, **{**arguments, **changes})


class Block(nn.Module):
    def __init__(self, seed: int, **changes: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(H)
        self.ffn = moe(seed, **changes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.ffn(self.norm(x))


def net(first: dict[str, Any] | None = None, second: dict[str, Any] | None = None) -> nn.Sequential:
    """Linear, two blocks, Linear; the arguments change the two MoE layers. The same weights on all ranks."""
    torch.manual_seed(7)
    first = {"num_shared": 1, "bias": True} | (first or {})
    second = {"activation": "relu2"} | (first if second is None else second)
    second.pop("bias", None)
    return nn.Sequential(nn.Linear(H, H), Block(1, **first), Block(2, **second), nn.Linear(H, H))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, target) [SEQUENCES, LENGTH, H] of the global batch of one step."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(SEQUENCES, LENGTH, H, generator=generator)
    return x, torch.randn(SEQUENCES, LENGTH, H, generator=generator)


def part(t: torch.Tensor, rank: int, world_size: int) -> torch.Tensor:
    return t.chunk(world_size)[rank]


def backward(model: nn.Module, step: int, rank: int, world_size: int, accumulate: int = 1) -> torch.Tensor:
    """Gradients of the mean loss of this rank's part of the batch, in ``accumulate`` pieces; the loss."""
    device = next(model.parameters()).device
    total = torch.zeros((), device=device)
    x, target = (part(t, rank, world_size).to(device).chunk(accumulate) for t in batch(step))
    for i in range(accumulate):
        last = i == accumulate - 1
        wait = isinstance(model, DistributedDataParallel) and not last
        with model.no_sync() if wait else nullcontext():
            loss = (model(x[i]) - target[i]).square().mean() + total_aux_loss(model)
            (loss / accumulate).backward()
            total += loss.detach() / accumulate
    return total


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, rank: int = 0, world_size: int = 1, **options: Any
) -> list[tuple[float, float]]:
    """(loss over the global batch, norm before clipping) of each step."""
    curve = []
    for step in steps:
        optimizer.zero_grad()
        loss = backward(model, step, rank, world_size, **options)
        reduce_expert_grads(model)
        norm = clip_grad_norm(model, 0.5)
        optimizer.step()
        if world_size > 1:
            dist.all_reduce(loss)
        curve.append((float(loss) / world_size, float(norm)))
    return curve


def ddp(model: nn.Module, **options: Any) -> DistributedDataParallel:
    ignore_in_ddp(model)
    return DistributedDataParallel(model, **options)


_groups: dict[tuple[tuple[int, ...], ...], dist.ProcessGroup] = {}


def subgroup(rank: int, *members: tuple[int, ...]) -> dist.ProcessGroup:
    """This rank's group out of a partition of all ranks; made once in the life of a pool."""
    if members not in _groups:
        for ranks in members:
            group = dist.new_group(list(ranks))
            if rank in ranks:
                _groups[members] = group
    return _groups[members]


def by_two(rank: int) -> dict[str, Any]:
    """World 4: experts over {0, 1} and again over {2, 3}."""
    return {
        "group": subgroup(rank, (0, 1), (2, 3)),
        "replica_group": subgroup(rank, (0, 2), (1, 3)),
        "data_group": dist.group.WORLD,
    }
