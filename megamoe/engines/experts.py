"""What the owner of experts does with the rows it received, forward and backward: no communication in here.

The *pool* is the list of routes of this rank's experts ordered by local slot (``dispatch.plan.FanOut``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megamoe.dispatch.plan import FanOut
from megamoe.dispatch.planner import fan_out
from megamoe.engines import grouped
from megamoe.engines.packet import unpack
from megamoe.engines.saved import compute_dtype
from megamoe.problem import Problem
from megamoe.weights import ExpertWeights


@dataclass(frozen=True, kw_only=True)
class Pool:
    """The received rows laid out for the grouped products. M routes, N rows."""

    fan: FanOut
    offsets: torch.Tensor  # [S + 1] int32: each local slot's routes
    row: torch.Tensor  # [M] received row of each route
    x: torch.Tensor  # [M, H] in the GEMMs' dtype
    weight: torch.Tensor  # [M, 1] fp32 top-k weight of each route

    @staticmethod
    def of(rows: torch.Tensor, num_routes: int, num_slots: int, problem: Problem) -> Pool:
        """From packets [N, bytes]; ``num_routes`` is M, known from the handshake."""
        x, weights, slots = unpack(rows, problem)
        fan = fan_out(slots.int(), num_slots)
        row, k = fan.slot_to_row[:num_routes], fan.slot_to_k[:num_routes]
        return Pool(
            fan=fan,
            offsets=fan.expert_offsets.int(),
            row=row,
            x=x.index_select(0, row),
            weight=weights[row, k].unsqueeze(1),
        )

    def slot_of_route(self) -> torch.Tensor:
        """[M] local slot of each route."""
        M = len(self.row)
        place = torch.arange(M, device=self.row.device)
        return torch.searchsorted(self.offsets[1:].contiguous(), place, right=True)

    def sum_by_row(self, routes: torch.Tensor) -> torch.Tensor:
        """routes [M, C] -> fp32 [N, C]: each received row's routes added in ascending k."""
        M, C = routes.shape
        padded = routes.new_zeros(M + 1, C)
        padded[:M] = routes
        index = torch.where(self.fan.row_to_slot >= 0, self.fan.row_to_slot, M)
        total = torch.zeros(len(index), C, dtype=torch.float32, device=routes.device)
        for k in range(index.shape[1]):
            total += padded.index_select(0, index[:, k])
        return total


def preactivations(pool: Pool, weights: ExpertWeights, problem: Problem) -> torch.Tensor:
    """h13 [M, w13_rows] with its bias."""
    h13 = grouped.mm_nt(pool.x, weights.w13.to(compute_dtype(problem)), pool.offsets)
    if weights.b13 is not None:
        h13 += weights.b13[pool.slot_of_route()]
    return h13


def forward(pool: Pool, weights: ExpertWeights, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """(each received row's partial sum, fp32 [N, H]; pre-activations h13 [M, w13_rows])."""
    dtype = compute_dtype(problem)
    h13 = preactivations(pool, weights, problem)
    slot = pool.slot_of_route() if problem.bias else None
    before = problem.weights_applied == "before_down"
    a = problem.activation(h13.float())
    a = (a * pool.weight if before else a).to(dtype)
    y = grouped.mm_nt(a, weights.w2.to(dtype), pool.offsets).float()
    if weights.b2 is not None and slot is not None:
        b2 = weights.b2[slot]
        y = y + (pool.weight * b2 if before else b2)
    if not before:
        y = y * pool.weight
    return pool.sum_by_row(y.to(dtype)), h13


@dataclass(frozen=True, kw_only=True)
class ExpertGrads:
    """Gradients on the owner's side."""

    x: torch.Tensor  # fp32 [N, H], each received row's partial sum
    topk_weights: torch.Tensor  # fp32 [N, K]
    weights: Callable[[], ExpertWeights]  # computes them when called


def backward(
    pool: Pool,
    weights: ExpertWeights,
    h13: torch.Tensor,
    grad_y: torch.Tensor,
    *,
    problem: Problem,
) -> ExpertGrads:
    """The mirror image, from grad_y [N, H] of the received rows.

    With g = grad_y W2 per route: the activation's gradient is weight * g, and the top-k weight's is <g, a> (plus
    <grad_y, b2>), in both places where the weight may be applied.
    """
    dtype = compute_dtype(problem)
    dy = grad_y.index_select(0, pool.row)
    g = grouped.mm_nn(dy, weights.w2.to(dtype), pool.offsets).float()
    h = h13.float()
    a = problem.activation(h)
    before = problem.weights_applied == "before_down"
    dweight = (g * (a if before else a.to(dtype).float())).sum(1)
    slot = pool.slot_of_route() if problem.bias else None
    if weights.b2 is not None and slot is not None:
        dweight += (dy.float() * weights.b2.float()[slot]).sum(1)
    dh13 = problem.activation.backward(h, g * pool.weight)
    rounded = dh13.to(dtype)
    dx = pool.sum_by_row(grouped.mm_nn(rounded, weights.w13.to(dtype), pool.offsets))
    padded = torch.cat([dweight, dweight.new_zeros(1)])
    dtopk = padded[torch.where(pool.fan.row_to_slot >= 0, pool.fan.row_to_slot, len(dweight))]
    master = weights.w13.dtype

    def of_weights() -> ExpertWeights:
        w2 = grouped.mm_tn(dy, (a * pool.weight).to(dtype), pool.offsets).to(master)
        w13 = grouped.mm_tn(rounded, pool.x, pool.offsets).to(master)
        b13 = b2 = None
        if problem.bias:
            counts = pool.fan.expert_counts
            b13 = grouped.segment_sum(dh13, counts).to(master)
            b2 = grouped.segment_sum(dy.float() * pool.weight, counts).to(master)
        return ExpertWeights(w13, w2, b13, b2)

    return ExpertGrads(x=dx, topk_weights=dtopk, weights=of_weights)
