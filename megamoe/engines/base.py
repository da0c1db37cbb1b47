"""The protocol every engine keeps, and the values that pass through it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist

from megamoe.dispatch.placement import Placement
from megamoe.dispatch.plan import SendPlan
from megamoe.engines.saved import Saved
from megamoe.problem import Problem
from megamoe.weights import ExpertWeights


@dataclass(frozen=True, kw_only=True)
class Call:
    """One checked call of one rank. ``group`` None means a single rank without torch.distributed."""

    problem: Problem
    placement: Placement
    group: dist.ProcessGroup | None
    x: torch.Tensor  # [T, H]
    topk_idx: torch.Tensor  # [T, K] int64, -1 = no expert, else a global expert id
    topk_weights: torch.Tensor  # [T, K] fp32
    weights: ExpertWeights

    @property
    def rank(self) -> int:
        return 0 if self.group is None else self.group.rank()


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What the ranks told one another before a call: rows and routes between this rank and every other, on the host."""

    send_rows: list[int]  # [R] rows this rank sends to each rank
    recv_rows: list[int]  # [R] rows it gets from each
    recv_routes: int  # routes among them: the size of this rank's pool
    workspaces: bool = False  # whether every rank has a sound workspace of the engine mega for this call


@dataclass(frozen=True)
class Grads:
    """Gradients in the shapes and dtypes of their inputs; those of the weights None where they were not asked for."""

    x: torch.Tensor
    topk_weights: torch.Tensor
    w13: torch.Tensor | None
    w2: torch.Tensor | None
    b13: torch.Tensor | None
    b2: torch.Tensor | None


class Engine(Protocol):
    """One way of running the layer. Engines hold no state of a call; what backward needs travels in ``Saved``."""

    name: str

    def why_not(self, problem: Problem, device: torch.device, group: dist.ProcessGroup | None) -> str | None:
        """None if this engine can run ``problem`` here, else a sentence that says why not. Asks no other rank."""
        ...

    def forward(self, call: Call, plan: SendPlan, traffic: Traffic, save: bool) -> tuple[torch.Tensor, Saved | None]:
        """(y [T, H] in x's dtype, what ``backward`` needs if ``save``)."""
        ...

    def backward(self, call: Call, saved: Saved, grad_y: torch.Tensor, need_weights: bool) -> Grads:
        """Gradients of sum(y * grad_y) over ALL ranks with respect to this rank's inputs."""
        ...


@runtime_checkable
class DefersWeightGrads(Protocol):
    """An engine that can leave the products that give weight gradients for later."""

    def backward_later(
        self, call: Call, saved: Saved, grad_y: torch.Tensor
    ) -> tuple[Grads, Callable[[], ExpertWeights]]:
        """(``Engine.backward`` without weight gradients, a function that computes those once, no collective)."""
        ...
