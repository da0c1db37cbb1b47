"""One call of the experts under autograd, with Megatron-Core's two ways of keeping weight gradients to itself.

``megamoe.autograd``'s ops return the weights' gradients when backward returns them; here they may go into ``main_grad``
(gradient accumulation fusion) or wait for ``backward_dw`` (delayed weight gradients).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megamoe.engines import run
from megamoe.engines.saved import Saved
from megamoe.weights import ExpertWeights


class ExpertsFunction(torch.autograd.Function):
    """``apply(x [T, H], topk_weights [T, K] fp32, w13, w2, topk_idx [T, K], experts, save) -> y [T, H]``; a collective.

    ``experts`` is a ``MegaMoEExperts``, ``save`` whether a backward will follow.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes by position
        ctx: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        w13: torch.Tensor,
        w2: torch.Tensor,
        topk_idx: torch.Tensor,
        experts: Any,
        save: bool,
    ) -> torch.Tensor:
        """See ``megamoe.engines.run.forward``."""
        with torch.autocast(x.device.type, enabled=False):
            y, saved = run.forward(x, topk_idx, topk_weights, ExpertWeights(w13, w2), terms=experts.terms, save=save)
        ctx.experts = experts
        ctx.save_for_backward(x, topk_weights, w13, w2, topk_idx, *saved)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x and topk_weights, and those of the weights unless they are kept."""
        x, topk_weights, w13, w2, topk_idx, *saved = ctx.saved_tensors
        experts = ctx.experts
        need = ctx.needs_input_grad
        need_weights = need[2] or need[3]
        arguments = (grad_y, x, topk_idx, topk_weights, ExpertWeights(w13, w2))
        terms: dict[str, Any] = {"saved": Saved(*saved), "terms": experts.terms}
        with torch.autocast(x.device.type, enabled=False):
            if need_weights and experts.delays_weight_grads:
                grads, later = run.backward_later(*arguments, **terms)
                experts.waiting.append(later)
            else:
                grads = run.backward(*arguments, **terms, need_weights=need_weights)
        of_weights: list[torch.Tensor | None] = []
        for weight, grad, needed in ((experts.w13, grads.w13, need[2]), (experts.w2, grads.w2, need[3])):
            if grad is not None and needed:
                experts.into_main_grad(weight, grad)
            of_weights.append(grad if needed else None)
        return grads.x, grads.topk_weights, of_weights[0], of_weights[1], None, None, None
