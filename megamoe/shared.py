"""``SharedExperts``: the dense gated MLP that every token visits beside its routed experts."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from megamoe.activation import Activation
from megamoe.dtensor import draw


class SharedExperts(nn.Module):
    """``num_shared`` experts of width I that see every token, run as one MLP of width num_shared * I.

    The sum of n such experts IS that wide MLP (DeepSeekMoE, arXiv:2401.06066, section 3.2). Replicated on every rank:
    a dense module for DDP, FSDP and checkpoints. w13 is [2nI, H], all gate rows first, or [nI, H] if not gated; w2 is
    [H, nI].
    """

    w13: nn.Parameter
    w2: nn.Parameter
    b13: nn.Parameter | None
    b2: nn.Parameter | None

    def __init__(
        self,
        hidden: int,
        width: int,
        activation: Activation,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        rows = width * (2 if activation.gated else 1)
        self.w13 = nn.Parameter(torch.empty(rows, hidden, device=device, dtype=dtype))
        self.w2 = nn.Parameter(torch.empty(hidden, width, device=device, dtype=dtype))
        self.b13 = nn.Parameter(torch.empty(rows, device=device, dtype=dtype)) if bias else None
        self.b2 = nn.Parameter(torch.empty(hidden, device=device, dtype=dtype)) if bias else None

    @torch.no_grad()
    def reset_parameters(self, seed: int, std: float | None = None) -> None:
        """As ``Experts.reset_parameters``, from one generator."""
        generator = torch.Generator(self.w13.device).manual_seed(seed % 2**63)
        for weight in (self.w13, self.w2):
            draw(weight, std or 1 / math.sqrt(weight.shape[-1]), generator)
        for bias in (self.b13, self.b2):
            if bias is not None:
                bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., H] -> [..., H]."""
        return F.linear(self.activation(F.linear(x, self.w13, self.b13)), self.w2, self.b2)
