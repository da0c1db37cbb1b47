"""The protocol every engine keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from megamoe.dispatch.placement import Placement
from megamoe.problem import Problem
from megamoe.weights import ExpertWeights


@dataclass(frozen=True, kw_only=True)
class Call:
    """One checked forward call of one rank. ``group`` None means a single rank without torch.distributed."""

    problem: Problem
    placement: Placement
    group: dist.ProcessGroup | None
    x: torch.Tensor  # [T, H]
    topk_idx: torch.Tensor  # [T, K] int64, -1 = no expert, else a global expert id
    topk_weights: torch.Tensor  # [T, K] fp32
    weights: ExpertWeights


@dataclass(frozen=True)
class Grads:
    """Gradients in the shapes and dtypes of their inputs; b13 and b2 None without bias."""

    x: torch.Tensor
    topk_weights: torch.Tensor
    w13: torch.Tensor
    w2: torch.Tensor
    b13: torch.Tensor | None
    b2: torch.Tensor | None


class Engine(Protocol):
    """One way of running the layer. Engines hold no state of a call; what backward needs travels in ``saved``."""

    name: str

    def why_not(self, problem: Problem, device: torch.device, group: dist.ProcessGroup | None) -> str | None:
        """None if this engine can run ``problem`` here, else a sentence that says why not."""
        ...

    def forward(self, call: Call) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """(y [T, H] in x's dtype, tensors that ``backward`` needs beyond the call's inputs)."""
        ...

    def backward(self, call: Call, saved: tuple[torch.Tensor, ...], grad_y: torch.Tensor) -> Grads:
        """Gradients of sum(y * grad_y) over ALL ranks with respect to this rank's inputs."""
        ...
