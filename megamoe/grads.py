"""Gradients of sharded experts: one scale with everything else, and one norm over all ranks.

The convention. W ranks train on one batch, each with its own tokens and loss L_r; the loss of the batch is the mean,
L = (1/W) sum_r L_r. A dense parameter stands on every rank, and DDP or FSDP averages: (1/W) sum_r dL_r/dp. An expert
stands on one rank of its group and has already met the tokens of the whole group: its gradient is a SUM over those
ranks, sum_r dL_r/dp. ``reduce_expert_grads`` adds the groups that train side by side and divides by the same W.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from megamoe.dispatch.placement import Placement
from megamoe.engines.liveness import naming
from megamoe.experts import Experts
from megamoe.layer import MegaMoE
from megamoe.parallel import dense_parameters, moe_layers


@torch.no_grad()
def reduce_expert_grads(module: nn.Module) -> None:
    """Turn each sharded expert's ``grad`` into the gradient of the mean loss over the layer's ``data_group``.

    Once per optimiser step, after the last backward of it and before clipping; a collective of every ``replica_group``,
    and of ``group`` where a placement holds an expert in several copies. Dense parameters are DDP's or FSDP's.

    - Groups side by side: the sum over ``replica_group``. Experts that FSDP shards over ``replica_group`` have been
      averaged over it by FSDP (leave its gradient divide factor alone); they are only divided by ``group``'s size.
    - Copies of one expert inside the group have met different tokens: each gets the sum over all copies.
    """
    for _, moe in moe_layers(module):
        experts = moe.experts
        if not experts.sharded:
            continue
        copied = bool((experts.placement.copies() > 1).any())
        for parameter in experts.parameters():
            if not parameter.requires_grad:
                continue
            if isinstance(parameter, DTensor):
                if copied:
                    raise ValueError("experts in several copies cannot also be sharded by FSDP; ignore them there")
                if parameter.grad is not None:
                    parameter.grad.div_(dist.get_world_size(experts.group))
                continue
            if parameter.grad is None and (copied or moe.replica_group is not None):
                parameter.grad = torch.zeros_like(parameter)  # the others wait for this rank
            if parameter.grad is not None:
                _reduce(parameter.grad, moe, copied)


def _reduce(grad: torch.Tensor, moe: MegaMoE, copied: bool) -> None:
    if copied:
        _sum_copies(grad, moe.experts)
    if moe.replica_group is not None:
        with naming(moe.replica_group, "sum over replicas of experts"):
            dist.all_reduce(grad, group=moe.replica_group)
    assert moe.data_group is not None
    grad.div_(dist.get_world_size(moe.data_group))


def _sum_copies(grad: torch.Tensor, experts: Experts) -> None:
    copied = (experts.placement.copies() > 1).nonzero().flatten().tolist()
    place = {expert: i for i, expert in enumerate(copied)}
    total = grad.new_zeros(len(copied), *grad.shape[1:])
    mine = [(slot, place[e]) for slot, e in enumerate(experts.local_experts) if e in place]
    for slot, i in mine:
        total[i] = grad[slot]
    with naming(experts.group, "sum over copies of experts"):
        dist.all_reduce(total, group=experts.group)
    for slot, i in mine:
        grad[slot] = total[i]


@torch.no_grad()
def clip_grad_norm(
    module: nn.Module, max_norm: float, norm_type: float = 2.0, *, error_if_nonfinite: bool = False
) -> torch.Tensor:
    """Clip all gradients of ``module`` by their norm over ALL ranks: dense parameters count once, every expert once.

    As ``torch.nn.utils.clip_grad_norm_``, which would see a different norm on each rank and let the dense parameters
    drift apart. After ``reduce_expert_grads``; a collective of each layer's ``group``, and of FSDP's meshes.

    Args:
        module: a model, wrapped in DDP or sharded by FSDP or not.
        max_norm: bound on the norm.
        norm_type: p of the norm; ``math.inf`` for the largest element.

    Returns:
        the norm before clipping, fp32 scalar, the same on every rank.

    Raises:
        RuntimeError: ``error_if_nonfinite`` and the norm is NaN or infinite; on every rank.
        PeerTimeout: a rank is gone; the message names it.
    """
    dense = [p.grad for p in dense_parameters(module) if p.grad is not None]
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    parts = [_power(dense, norm_type, device)]
    by_group: dict[dist.ProcessGroup, list[torch.Tensor]] = {}
    sharded = []
    for _, moe in moe_layers(module):
        if moe.experts.sharded:
            assert moe.group is not None
            grads = [p.grad for p in moe.experts.parameters() if p.grad is not None]
            sharded += grads
            by_group.setdefault(moe.group, []).extend(_counted_once(grads, moe.experts.placement, moe.group))
    for group, grads in by_group.items():
        part = _power(grads, norm_type, device)
        with naming(group, "norm of gradients"):
            dist.all_reduce(part, op=dist.ReduceOp.MAX if math.isinf(norm_type) else dist.ReduceOp.SUM, group=group)
        parts.append(part)
    stacked = torch.stack(parts)
    norm = stacked.max() if math.isinf(norm_type) else stacked.sum() ** (1 / norm_type)
    if error_if_nonfinite and not bool(norm.isfinite()):
        raise RuntimeError(f"the norm of the gradients over all ranks is {float(norm)}; nothing was clipped")
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for grad in [*dense, *sharded]:
        local = grad.to_local() if isinstance(grad, DTensor) else grad
        local.mul_(factor.to(local.device))
    return norm


def _counted_once(grads: list[torch.Tensor], placement: Placement, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """The rows of experts whose first copy stands on this rank."""
    if placement.world_size * placement.slots_per_rank == placement.num_experts:
        return grads
    rank, slots = dist.get_rank(group), placement.slots_per_rank
    first = placement.expert_slots()[:, 0]
    rows = first[(first >= rank * slots) & (first < (rank + 1) * slots)] - rank * slots
    return [grad[rows.to(grad.device)] for grad in grads]


def _power(grads: Sequence[torch.Tensor], p: float, device: torch.device) -> torch.Tensor:
    """Sum of |g|^p over all elements, or their largest |g|; fp32 scalar, FSDP's shards of all ranks included."""
    total = torch.zeros((), device=device)
    by_mesh: dict[DeviceMesh | None, list[torch.Tensor]] = {}
    for grad in grads:
        norm = torch.linalg.vector_norm(grad, p, dtype=torch.promote_types(grad.dtype, torch.float32))
        by_mesh.setdefault(grad.device_mesh if isinstance(grad, DTensor) else None, []).append(norm.float())
    for norms in by_mesh.values():
        norm = torch.linalg.vector_norm(torch.stack(norms), p)
        whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
        total = torch.maximum(total, whole) if math.isinf(p) else total + whole**p
    return total
