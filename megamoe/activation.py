"""Activations between the two expert GEMMs, as plain torch functions of the pre-activation.

``Activation`` is the variant; reference, staged and the kernels' epilogues all take it by value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

ActivationName = Literal["swiglu", "swiglu_limited", "swiglu_clamped", "geglu", "relu2"]


@dataclass(frozen=True)
class Activation:
    """What happens to h13 = x @ w13^T.

    - ``swiglu``: silu(gate) * up (Shazeer 2020, arXiv:2002.05202).
    - ``swiglu_limited``: the same of min(gate, limit) and clamp(up, -limit, limit), as DeepSeek-V4 has it (limit 10).
    - ``swiglu_clamped``: gpt-oss: gate' = min(gate, limit), up' = clamp(up, -limit, limit),
      gate' * sigmoid(alpha * gate') * (up' + 1); limit 7, alpha 1.702.
    - ``geglu``: gelu(gate, tanh approximation) * up.
    - ``relu2``: relu(h)^2, not gated (Primer, arXiv:2109.08668); w13 has I rows instead of 2I.
    """

    name: ActivationName = "swiglu"
    limit: float = 7.0
    alpha: float = 1.702

    def __post_init__(self) -> None:
        known = ("swiglu", "swiglu_limited", "swiglu_clamped", "geglu", "relu2")
        if self.name not in known:
            raise ValueError(f"activation must be one of {', '.join(known)}, got {self.name!r}")

    @property
    def gated(self) -> bool:
        """Whether w13 stacks gate and up ([2I, H]) or is one matrix ([I, H])."""
        return self.name != "relu2"

    def __call__(self, h13: torch.Tensor) -> torch.Tensor:
        """h13 [..., 2I] (gate first, then up) or [..., I] if not gated -> [..., I], same dtype; differentiable."""
        if self.name == "relu2":
            return F.relu(h13).square()
        gate, up = h13.chunk(2, dim=-1)
        if self.name == "swiglu":
            return F.silu(gate) * up
        if self.name == "geglu":
            return F.gelu(gate, approximate="tanh") * up
        gate = gate.clamp(max=self.limit)
        up = up.clamp(-self.limit, self.limit)
        if self.name == "swiglu_limited":
            return F.silu(gate) * up
        return gate * torch.sigmoid(self.alpha * gate) * (up + 1)

    def backward(self, h13: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        """grad [..., I] of ``self(h13)`` -> its gradient at h13, [..., 2I] or [..., I] if not gated, same dtype."""
        if self.name == "relu2":
            return grad * 2 * F.relu(h13)
        gate, up = h13.chunk(2, dim=-1)
        if self.name == "swiglu":
            return torch.cat([torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)], dim=-1)
        if self.name == "geglu":
            d_gate = torch.ops.aten.gelu_backward(grad * up, gate, approximate="tanh")
            return torch.cat([d_gate, grad * F.gelu(gate, approximate="tanh")], dim=-1)
        # clamp lets the gradient through at the bound itself, as torch does
        low = gate.clamp(max=self.limit)
        if self.name == "swiglu_limited":
            d_gate = torch.ops.aten.silu_backward(grad * up.clamp(-self.limit, self.limit), low)
            return torch.cat(
                [
                    d_gate.masked_fill(gate > self.limit, 0.0),
                    (grad * F.silu(low)).masked_fill(up.abs() > self.limit, 0.0),
                ],
                dim=-1,
            )
        up_in = up.clamp(-self.limit, self.limit) + 1
        sigmoid = torch.sigmoid(self.alpha * low)
        d_gate = grad * up_in * sigmoid * (1 + self.alpha * low * (1 - sigmoid))
        d_up = grad * low * sigmoid
        return torch.cat(
            [d_gate.masked_fill(gate > self.limit, 0.0), d_up.masked_fill(up.abs() > self.limit, 0.0)], dim=-1
        )
