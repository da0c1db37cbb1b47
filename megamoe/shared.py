"""``SharedExperts``: the dense gated MLP that every token visits beside its routed experts."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from megamoe.activation import Activation
from megamoe.dtensor import draw
from megamoe.weights import ExpertWeights


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

    def as_experts(self, intermediate: int) -> ExpertWeights:
        """The same as n = width / I experts of width I, whose sum this MLP is; b2 is the first one's. Copies, no graph.

        Raises:
            ValueError: ``intermediate`` does not divide the width.
        """
        hidden, width = self.w2.shape
        if intermediate < 1 or width % intermediate:
            raise ValueError(f"intermediate must divide the width of the shared experts, {width}, got {intermediate}")
        n, parts = width // intermediate, len(self.w13) // width

        def by_expert(rows: torch.Tensor) -> torch.Tensor:
            split = rows.detach().view(parts, n, intermediate, *rows.shape[1:]).transpose(0, 1)
            return split.reshape(n, parts * intermediate, *rows.shape[1:])

        w2 = self.w2.detach().view(hidden, n, intermediate).transpose(0, 1).contiguous()
        if self.b13 is None or self.b2 is None:
            return ExpertWeights(by_expert(self.w13), w2)
        b2 = self.b2.new_zeros(n, hidden)
        b2[0] = self.b2.detach()
        return ExpertWeights(by_expert(self.w13), w2, by_expert(self.b13), b2.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., H] -> [..., H]."""
        return F.linear(self.activation(F.linear(x, self.w13, self.b13)), self.w2, self.b2)
