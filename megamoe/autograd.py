"""The torch.library ops ``megamoe::forward`` and ``megamoe::backward``: opaque to torch.compile, differentiable once.

Everything beside tensors is text (the Problem as JSON, the group's name), so that the ops can stand in a graph. The op
returns what backward needs (``engines.saved.Saved``) as further outputs; their sizes depend on the routing of all
ranks, so their fake versions have unbacked sizes. Importing this module registers the ops.
"""

from __future__ import annotations

from typing import Any

import torch

from megamoe.engines import run
from megamoe.engines.grouped import preact_dtype
from megamoe.engines.saved import Saved, compute_dtype, packet_bytes
from megamoe.problem import Problem
from megamoe.weights import ExpertWeights


@torch.library.custom_op("megamoe::forward", mutates_args=())
def forward(  # noqa: PLR0917
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    b13: torch.Tensor | None,
    b2: torch.Tensor | None,
    problem: str,
    group: str,
    engine: str,
    placement: str,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, rows, h13, meta); the last three empty unless ``save``."""
    weights = ExpertWeights(w13, w2, b13, b2)
    terms = run.Terms(problem, group, engine, placement)
    with torch.autocast(x.device.type, enabled=False):  # the recipe alone says where numbers are rounded
        y, saved = run.forward(x, topk_idx, topk_weights, weights, terms=terms, save=save)
    return y, *saved


@forward.register_fake
def _(  # noqa: PLR0917
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    b13: torch.Tensor | None,
    b2: torch.Tensor | None,
    problem: str,
    group: str,
    engine: str,
    placement: str,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    p = Problem.from_json(problem)
    num_rows: Any = 0
    num_routes: Any = 0
    if save:
        num_rows = torch.library.get_ctx().new_dynamic_size()
        num_routes = torch.library.get_ctx().new_dynamic_size()
    return (
        x.new_empty(x.shape),
        x.new_empty(num_rows, packet_bytes(p), dtype=torch.uint8),
        x.new_empty(num_routes, p.w13_rows, dtype=preact_dtype(x.device, compute_dtype(p))),
        torch.empty(2 + 2 * p.world_size, dtype=torch.int64, device="cpu"),
    )


@torch.library.custom_op("megamoe::backward", mutates_args=())
def backward(  # noqa: PLR0917
    grad_y: torch.Tensor,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    b13: torch.Tensor | None,
    b2: torch.Tensor | None,
    rows: torch.Tensor,
    h13: torch.Tensor,
    meta: torch.Tensor,
    problem: str,
    group: str,
    placement: str,
    need_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, topk_weights, w13, w2, b13, b2; an empty tensor for one that is absent or not needed."""
    weights = ExpertWeights(w13, w2, b13, b2)
    terms = run.Terms(problem, group, "auto", placement)
    saved = Saved(rows, h13, meta)
    with torch.autocast(x.device.type, enabled=False):
        g = run.backward(
            grad_y, x, topk_idx, topk_weights, weights, saved=saved, terms=terms, need_weights=need_weights
        )
    absent = [w13.new_empty(0) if t is None else t for t in (g.w13, g.w2, g.b13, g.b2)]
    return g.x, g.topk_weights, absent[0], absent[1], absent[2], absent[3]


@backward.register_fake
def _(  # noqa: PLR0917
    grad_y: torch.Tensor,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    b13: torch.Tensor | None,
    b2: torch.Tensor | None,
    rows: torch.Tensor,
    h13: torch.Tensor,
    meta: torch.Tensor,
    problem: str,
    group: str,
    placement: str,
    need_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    def like(t: torch.Tensor | None) -> torch.Tensor:
        return w13.new_empty(0) if t is None or not need_weights else w13.new_empty(t.shape)

    dx, dtopk = x.new_empty(x.shape), x.new_empty(topk_weights.shape, dtype=torch.float32)
    return dx, dtopk, like(w13), like(w2), like(b13), like(b2)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    tensors, (ctx.problem, ctx.group, _, ctx.placement, ctx.saved) = inputs[:7], inputs[7:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx: Any, grad_y: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
    *tensors, rows, h13, meta = ctx.saved_tensors
    if not ctx.saved:
        raise RuntimeError("megamoe::forward ran with save=False, so there is nothing to differentiate")
    if grad_y is None:  # y was not used, but other ranks may wait for this rank's part
        grad_y = torch.zeros_like(tensors[0])
    need = ctx.needs_input_grad
    grads = torch.ops.megamoe.backward(
        grad_y, *tensors, rows, h13, meta, ctx.problem, ctx.group, ctx.placement, any(need[3:7])
    )
    x, topk_weights, *weights = (g if n else None for g, n in zip(grads, (need[0], *need[2:7]), strict=True))
    return x, None, topk_weights, *weights, None, None, None, None, None


forward.register_autograd(_backward, setup_context=_setup_context)
