"""Writing whole values into parameters that FSDP may have sharded."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor, distribute_tensor


@torch.no_grad()
def store(target: torch.Tensor, value: torch.Tensor) -> None:
    """``target.copy_(value)`` where ``value`` is whole, the same on every rank; no communication.

    A DTensor keeps its part. Another DTensor is copied as torch does.
    """
    if isinstance(target, DTensor) and not isinstance(value, DTensor):
        value = value.to(device=target.device, dtype=target.dtype)
        value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(value)


def draw(target: torch.Tensor, std: float, generator: torch.Generator) -> None:
    """Fill with N(0, std^2), drawn in fp32 on the target's device whatever its dtype and sharding."""
    value = torch.empty(target.shape, device=target.device, dtype=torch.float32)
    store(target, value.normal_(std=std, generator=generator))
