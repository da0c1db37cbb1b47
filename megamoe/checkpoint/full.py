"""Full state: what ``state_dict`` is on a single rank, gathered from and given to any number of ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from megamoe.checkpoint.entries import Entry, check, entries
from megamoe.engines.liveness import naming


@torch.no_grad()
def full_state_dict(module: nn.Module, *, rank0_only: bool = False) -> dict[str, torch.Tensor]:
    """All of a model on the CPU, experts as [E, ...]: ``module.state_dict()`` as a single rank would have it.

    A collective of every layer's ``group`` and of FSDP's meshes, one tensor at a time.

    Args:
        module: a model with any number of MegaMoE layers, wrapped in DDP or sharded by FSDP or not.
        rank0_only: keep the tensors on the first rank of all only; the others return {}.
    """
    keep = not (rank0_only and dist.is_initialized() and dist.get_rank() != 0)
    state = {}
    for entry in entries(module):
        tensor = gather(entry, keep)
        if keep:
            state[entry.name] = tensor
    return state


def gather(entry: Entry, keep: bool) -> torch.Tensor:
    """One tensor in full on the CPU, a copy; without ``keep`` only take part and return an empty one."""
    whole = entry.whole().contiguous()
    if entry.experts is None:
        return whole.to("cpu", copy=True) if keep else torch.empty(0)
    placement, group = entry.experts.placement, entry.experts.group
    parts = [whole]
    if group is not None:
        parts = [torch.empty_like(whole) for _ in range(placement.world_size)]
        with naming(group, "gathering experts for a checkpoint"):
            dist.all_gather(parts, whole, group=group)
    if not keep:
        return torch.empty(0)
    full = torch.empty(placement.num_experts, *whole.shape[1:], dtype=whole.dtype)
    for part, experts in zip(parts, placement.slot_to_expert, strict=True):
        full[experts] = part.cpu()
    return full


def load_full_state_dict(module: nn.Module, state: dict[str, torch.Tensor], *, strict: bool = True) -> None:
    """Give every rank its part of a full state; no communication.

    Raises:
        ValueError: missing, unexpected or wrongly shaped tensors, named; nothing is overwritten then.
    """
    found = entries(module)
    portable: dict[str, torch.Tensor] = dict(state)
    for entry in found:
        if entry.experts is None or entry.name not in state:
            continue
        num_experts = entry.experts.problem.num_experts
        stacked = portable.pop(entry.name)
        if stacked.dim() == 0 or len(stacked) != num_experts:
            expected = (num_experts, *entry.tensor.shape[1:])
            raise ValueError(
                f"the checkpoint does not fit the model; {entry.name} must have shape {expected}, "
                f"got {tuple(stacked.shape)}"
            )
        portable |= {entry.portable_name(e): stacked[e] for e in range(num_experts)}
    check(found, {name: tuple(tensor.shape) for name, tensor in portable.items()}, portable, strict)
    for entry in found:
        entry.fill(portable.__getitem__)
