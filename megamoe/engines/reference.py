"""``reference``: the layer in plain torch, on any device; slow, and the twin that the other engines are held against.

Each rank gathers all experts and runs its own tokens, so nothing here shares code with ``staged``'s dispatch or
combine. Order of sums: per owning rank ascending, within a rank ascending k, in fp32; each rank's partial sum is
rounded like the row that crosses (this rank's own too, so that a result does not depend on who asks). Gradients are
torch autograd's, straight through every rounding of values; those of weights are fp32 sums over the ranks, ascending.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megamoe.dispatch.plan import SendPlan
from megamoe.engines.base import Call, Grads, Traffic
from megamoe.engines.recipes import round_activation, round_gradient, round_result, round_weight
from megamoe.engines.saved import Saved
from megamoe.engines.wire import Wire
from megamoe.problem import Problem

# Inside a torch.library op autograd is switched off by dispatch keys; backward needs it, so it goes back to these.
_PLAIN_INCLUDE = torch._C._dispatch_tls_local_include_set()
_PLAIN_EXCLUDE = torch._C._dispatch_tls_local_exclude_set()


def moe(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    *,
    b13: torch.Tensor | None,
    b2: torch.Tensor | None,
    slots: torch.Tensor,
    problem: Problem,
    num_ranks: int,
) -> torch.Tensor:
    """The layer for T tokens over all P = R * S physical slots; differentiable.

    Args:
        x: [T, H] fp32; topk_weights [T, K] fp32.
        w13, w2, b13, b2: fp32, [P, ...].
        slots: [T, K] int64 physical slot of each route, -1 = none.

    Returns:
        y [T, H] fp32.
    """
    T, H = x.shape
    K = slots.shape[1]
    recipe = problem.recipe
    x = round_activation(x, recipe)
    w13 = round_weight(w13, problem, stacked=True)
    w2 = round_weight(w2, problem, stacked=False)
    before = problem.weights_applied == "before_down"
    slots_per_rank = w13.shape[0] // num_ranks
    flat = slots.flatten()
    routes = x.new_zeros(T * K, H)
    for p in range(w13.shape[0]):
        if p % slots_per_rank == 0:
            x_rank = round_gradient(x, recipe)  # what this rank's experts send back is one partial sum
        at = (flat == p).nonzero().squeeze(1)
        weight = topk_weights.flatten()[at, None]
        h13 = round_gradient(x_rank[at // K] @ w13[p].T, recipe)
        if b13 is not None:
            h13 = h13 + b13[p]
        a = problem.activation(h13)
        if before:
            y = round_activation(a * weight, recipe) @ w2[p].T
            bias = None if b2 is None else weight * b2[p]
            y = y if bias is None else y + bias
        else:
            y = round_activation(a, recipe) @ w2[p].detach().T
            y = (y if b2 is None else y + b2[p]) * weight
            # dw2 is a product of grad_y and weight * a as a GEMM takes it; v - v leaves y as it is.
            v = round_result((a * weight).detach(), recipe) @ w2[p].T
            y = y + (v - v.detach())
        routes = routes.index_copy(0, at, y)
    routes = round_result(routes, recipe).view(T, K, H)

    owner = torch.where(slots >= 0, slots // slots_per_rank, -1)
    total = x.new_zeros(T, H)
    for r in range(num_ranks):
        partial = x.new_zeros(T, H)
        for k in range(K):
            partial = partial + torch.where((owner[:, k] == r)[:, None], routes[:, k], 0.0)
        total = total + round_result(partial, recipe)
    return total


class Reference:
    """See the module's text."""

    name = "reference"

    def why_not(self, problem: Problem, device: torch.device, group: dist.ProcessGroup | None) -> str | None:
        """Always None."""
        return None

    def forward(self, call: Call, plan: SendPlan, traffic: Traffic, save: bool) -> tuple[torch.Tensor, Saved | None]:
        """Saves nothing: ``backward`` runs the forward again."""
        inputs = [t.detach().float() for t in _inputs(call)]
        y = _run(call, inputs).to(call.x.dtype)
        return y, Saved.make(self.name, call.problem, call.x.device) if save else None

    def backward(self, call: Call, saved: Saved, grad_y: torch.Tensor, need_weights: bool) -> Grads:
        """Autograd of ``moe``, then every owner sums what the ranks found for its experts."""
        wire = Wire(call.group, call.x.device)
        with torch._C._ForceDispatchKeyGuard(_PLAIN_INCLUDE, _PLAIN_EXCLUDE), torch.enable_grad():
            inputs = [t.detach().float().requires_grad_() for t in _inputs(call)]
            y = _run(call, inputs)
            grads = torch.autograd.grad(y, inputs, grad_y.float(), allow_unused=True, materialize_grads=True)
        own = [g.to(t.dtype) for g, t in zip(grads[:2], (call.x, call.topk_weights), strict=True)]
        theirs: list[torch.Tensor | None] = []
        slots = call.placement.slots_per_rank
        for g in grads[2:]:
            parts = wire.exchange(g, [slots] * wire.size, [slots] * wire.size, "reference: weight gradients")
            total = torch.zeros_like(parts[:slots])
            for part in parts.view(wire.size, *total.shape):
                total += part
            theirs.append(total.to(call.weights.w13.dtype))
        theirs = (
            [*theirs, None, None][:4] if need_weights else [None] * 4
        )  # other ranks may need what is not needed here
        return Grads(own[0], own[1], *theirs)


def _inputs(call: Call) -> list[torch.Tensor]:
    """x, topk_weights, then all ranks' w13, w2 and, with bias, b13, b2."""
    wire = Wire(call.group, call.x.device)
    w = call.weights
    local = [t for t in (w.w13, w.w2, w.b13, w.b2) if t is not None]
    return [call.x, call.topk_weights, *(wire.gather(t.detach(), "reference: gathering the experts") for t in local)]


def _run(call: Call, inputs: list[torch.Tensor]) -> torch.Tensor:
    x, topk_weights, w13, w2, *biases = inputs
    b13, b2 = biases if biases else (None, None)
    slots = call.placement.route(call.topk_idx, call.rank)
    return moe(
        x, topk_weights, w13, w2, b13=b13, b2=b2,
        slots=slots, problem=call.problem, num_ranks=call.placement.world_size,
    )  # fmt: skip
