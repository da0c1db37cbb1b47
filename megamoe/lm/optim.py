"""Gradients of the whole batch, optimiser and learning rate.

The loss of a step is the mean of the ranks' losses. Dense parameters are the same on every rank, each rank's gradient
covers its own tokens, and they are averaged here. Experts stand on one rank each and have met all ranks' tokens
already: ``megamoe.grads`` brings their gradients to the same scale.
"""

from __future__ import annotations

import torch
from torch import nn

from megamoe.grads import clip_grad_norm, reduce_expert_grads
from megamoe.lm.world import World
from megamoe.parallel import dense_parameters, expert_parameters


@torch.no_grad()
def reduce_gradients(model: nn.Module, world: World, loss: torch.Tensor, *, clip: float) -> tuple[float, float]:
    """Turn every gradient into that of the mean of the ranks' losses, and shorten them to a norm of at most ``clip``.

    DDP would do the first half; here it is one vector and one collective, which on a CPU is most of the cost.

    Args:
        loss: this rank's loss, a scalar.

    Returns:
        the mean of the ranks' losses, and the norm before it was shortened; the same on every rank.
    """
    grads = [p.grad for p in dense_parameters(model) if p.grad is not None]
    bucket = torch.cat([g.flatten() for g in grads] + [loss.detach().view(1)])
    world.sum(bucket, "mean of gradients").div_(world.size)
    *means, mean_loss = torch.split(bucket, [g.numel() for g in grads] + [1])
    for grad, mean in zip(grads, means, strict=True):
        grad.copy_(mean.view_as(grad))
    reduce_expert_grads(model)
    norm = clip_grad_norm(model, clip)
    return float(mean_loss), float(norm)


def make_optimizer(model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101), decaying matrices but not vectors."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def learning_rate(step: int, *, steps: int, warmup: int, highest: float) -> float:
    """Linear up over ``warmup`` steps, and linear down to a twentieth of ``highest`` at ``steps``."""
    up = min(1.0, (step + 1) / (warmup + 1))
    return highest * up * (1 - 0.95 * step / steps)


def count_parameters(model: nn.Module, world: World) -> int:
    """Parameters of the whole model, the experts of all ranks included."""
    dense = sum(p.numel() for p in dense_parameters(model))
    return dense + world.size * sum(p.numel() for p in expert_parameters(model))
