"""Which parameters are split over ranks, and how gradients become those of the whole batch.

Two kinds stand side by side. Dense parameters are the same on every rank, and a rank's gradient covers its own tokens:
the gradients are summed. Expert parameters stand on one rank alone, rows [lo, hi) of [E, ...], and the layer's backward
has already summed their gradient over the tokens of ALL ranks: nothing may be summed or divided again.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from megamoe.experts import Experts
from megamoe.lm.world import World


class Parameters:
    """The parameters of a model by kind, in the order of their names.

    Attributes:
        dense: name -> parameter, equal on all ranks.
        experts: name -> parameter whose first dimension is this rank's part of the experts.
    """

    def __init__(self, model: nn.Module, world: World) -> None:
        names = {
            f"{prefix}.{name}"
            for prefix, module in model.named_modules()
            if isinstance(module, Experts)
            for name, _ in module.named_parameters()
        }
        everything = sorted(model.named_parameters())
        self.dense = {n: p for n, p in everything if n not in names}
        self.experts = {n: p for n, p in everything if n in names}
        self.world = world

    @property
    def all(self) -> dict[str, nn.Parameter]:
        """Both kinds."""
        return self.dense | self.experts

    def count(self) -> int:
        """Parameters of the whole model, the experts of all ranks included."""
        return _elements(self.dense.values()) + self.world.size * _elements(self.experts.values())

    def reduce_gradients(self, extra: torch.Tensor, *, clip: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Make the gradients those of the whole batch, and shorten them to a norm of at most ``clip``; one collective.

        Args:
            extra: fp32 vector to be summed over the ranks on the same way.

        Returns:
            ``extra`` summed, and the norm of the whole gradient, all ranks' experts included, before it was shortened.
        """
        dense = [_gradient(p) for p in self.dense.values()]
        experts = [_gradient(p) for p in self.experts.values()]
        squares = sum((g.float().square().sum() for g in experts), torch.zeros((), device=extra.device))
        sizes = [g.numel() for g in dense]
        bucket = torch.cat([g.float().flatten() for g in dense] + [extra, squares.view(1)])
        *summed, tail = torch.split(self.world.sum(bucket, "gradients"), [*sizes, len(extra) + 1])
        for g, total in zip(dense, summed, strict=True):
            g.copy_(total.view_as(g))
        norm = (bucket[: sum(sizes)].square().sum() + tail[-1]).sqrt()
        factor = (clip / (norm + 1e-6)).clamp(max=1.0)
        for g in dense + experts:
            g.mul_(factor)
        return tail[:-1], norm

    def optimizer(self, *, lr: float, weight_decay: float) -> torch.optim.AdamW:
        """AdamW (arXiv:1711.05101), decaying matrices but not vectors."""
        matrices = [p for p in self.all.values() if p.dim() >= 2]
        vectors = [p for p in self.all.values() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def learning_rate(step: int, *, steps: int, warmup: int, highest: float) -> float:
    """Linear up over ``warmup`` steps, and linear down to a twentieth of ``highest`` at ``steps``."""
    up = min(1.0, (step + 1) / (warmup + 1))
    return highest * up * (1 - 0.95 * step / steps)


def _gradient(p: nn.Parameter) -> torch.Tensor:
    if p.grad is None:  # no token came by
        p.grad = torch.zeros_like(p)
    return p.grad


def _elements(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)
