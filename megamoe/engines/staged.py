"""``staged``: dispatch by one all-to-all, grouped GEMMs, combine by one all-to-all. Any ranks, nodes and transport.

A token crosses once to each rank that holds one of its experts, however many those are; the owner fans it out, adds its
experts' weighted results in fp32 (ascending k) and sends ONE row back; the source adds those in rank order. Backward is
the mirror image: the gradient crosses once (unscaled), one row of dx and K weight gradients come back. The host waits
for the device once a call, in the handshake, and not at all in backward (over NCCL).

On a CPU it rounds where ``reference`` does; on a GPU also where ``torch._grouped_mm`` gives bf16 (docs/engines.md).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from megamoe.dispatch.plan import SendPlan
from megamoe.dispatch.planner import plan_on_device
from megamoe.engines import experts, packet
from megamoe.engines.base import Call, Grads, Traffic
from megamoe.engines.saved import Saved, compute_dtype
from megamoe.engines.wire import Wire
from megamoe.problem import Problem
from megamoe.weights import ExpertWeights


class Staged:
    """See the module's text."""

    name = "staged"

    def why_not(self, problem: Problem, device: torch.device, group: dist.ProcessGroup | None) -> str | None:
        """Quantised recipes need the fused kernels or the reference."""
        if problem.recipe not in ("fp32", "bf16"):
            return f"staged computes in bf16 or fp32; the recipe {problem.recipe} needs mega or reference"
        if device.type not in ("cpu", "cuda"):
            return f"staged runs on cpu and cuda, not on {device.type}"
        return None

    def forward(self, call: Call, plan: SendPlan, traffic: Traffic, save: bool) -> tuple[torch.Tensor, Saved | None]:
        """See ``Engine.forward``."""
        problem, wire = call.problem, Wire(call.group, call.x.device)
        n = sum(traffic.send_rows)
        rows = packet.pack(call.x, call.topk_weights, plan.token_idx[:n], plan.topk_slot[:n], problem)
        rows = wire.exchange(rows, traffic.send_rows, traffic.recv_rows, "forward: dispatch")
        pool = experts.Pool.of(rows, traffic.recv_routes, call.placement.slots_per_rank, problem)
        partial, h13 = experts.forward(pool, call.weights, problem)
        partial = partial.to(compute_dtype(problem))
        partial = wire.exchange(partial, traffic.recv_rows, traffic.send_rows, "forward: combine")
        y = _sum_by_token(partial, plan).to(call.x.dtype)
        if not save:
            return y, None
        return y, Saved.make(
            self.name, problem, call.x.device,
            rows=rows, h13=h13, send_rows=traffic.send_rows, recv_rows=traffic.recv_rows,
        )  # fmt: skip

    def backward(self, call: Call, saved: Saved, grad_y: torch.Tensor, need_weights: bool) -> Grads:
        """See ``Engine.backward``."""
        grads, later = self.backward_later(call, saved, grad_y)
        if not need_weights:
            return grads
        w = later()
        return Grads(grads.x, grads.topk_weights, w.w13, w.w2, w.b13, w.b2)

    def backward_later(
        self, call: Call, saved: Saved, grad_y: torch.Tensor
    ) -> tuple[Grads, Callable[[], ExpertWeights]]:
        """See ``engines.base.DefersWeightGrads``."""
        problem, wire = call.problem, Wire(call.group, call.x.device)
        send, recv = saved.send_rows, saved.recv_rows
        plan = plan_on_device(call.topk_idx, call.placement, call.rank)
        dy = grad_y.index_select(0, plan.token_idx[: sum(send)])
        dy = wire.exchange(dy, send, recv, "backward: dispatch")
        pool = experts.Pool.of(saved.rows, len(saved.h13), call.placement.slots_per_rank, problem)
        grads = experts.backward(pool, call.weights, saved.h13, dy, problem=problem)
        answer = packet.pack_answer(grads.x, grads.topk_weights, problem)
        answer = wire.exchange(answer, recv, send, "backward: combine")
        dx, dtopk = packet.unpack_answer(answer, problem)
        dx = _sum_by_token(dx, plan).to(call.x.dtype)
        return Grads(dx, _gather_routes(dtopk, plan), None, None, None, None), grads.weights


def _sum_by_token(rows: torch.Tensor, plan: SendPlan) -> torch.Tensor:
    """rows [n, H] that came back, destination-major -> fp32 [T, H], added in rank order; 0 for a token without rows."""
    n, H = rows.shape
    padded = rows.new_zeros(n + 1, H)
    padded[:n] = rows
    index = torch.where(plan.token_to_rows >= 0, plan.token_to_rows, n)
    total = torch.zeros(len(index), H, dtype=torch.float32, device=rows.device)
    for i in range(index.shape[1]):
        total += padded.index_select(0, index[:, i])
    return total


def _gather_routes(values: torch.Tensor, plan: SendPlan) -> torch.Tensor:
    """values [n, K] of the rows that came back -> [T, K]: each route's own; 0 where there is no route."""
    n, K = values.shape
    flat = torch.cat([values.flatten(), values.new_zeros(1)])
    k = torch.arange(K, device=values.device)
    return flat[torch.where(plan.route_to_row >= 0, plan.route_to_row * K + k, n * K)]
