"""``mega_moe``: one call of the layer for callers that bring their own routing and weights."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist

import megamoe.autograd  # noqa: F401  registers the ops
from megamoe.dispatch.placement import Placement
from megamoe.engines import run
from megamoe.engines.choose import explain_engines
from megamoe.problem import Problem
from megamoe.weights import ExpertWeights

__all__ = ["explain_engines", "mega_moe"]


def mega_moe(
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    weights: ExpertWeights,
    *,
    problem: Problem,
    group: dist.ProcessGroup | Literal["self"] | None = None,
    engine: str = "auto",
    placement: Placement | None = None,
) -> torch.Tensor:
    """y_t = sum over k of weight_tk * expert_{idx_tk}(x_t), over the experts of all ranks; a collective call.

    Args:
        x: [T, H] or [B, S, H], any strides, in the recipe's dtype (bf16; fp32 for the recipe fp32). T may differ from
            rank to rank and be 0. Under autocast it is cast.
        topk_idx: [T, K] (or [B, S, K]) int64 or int32, global expert ids, -1 = no expert.
        topk_weights: same shape, fp32.
        weights: this rank's experts, fp32 or bf16.
        problem: sizes and choices; equal on all ranks.
        group: the expert-parallel group; None means the default group if there is one, else this rank alone; "self"
            means this rank alone in any case: all experts are here, and no other rank needs to call.
        engine: "auto" takes the best that all ranks can run; else reference, staged or mega.
        placement: who holds which expert; None means contiguous.

    Returns:
        y in x's shape and dtype, complete: nothing is left to reduce. Gradients reach x, topk_weights and weights;
        those of weights are sums over the tokens of all ranks.

    Raises:
        ValueError: arguments that don't fit, with got and expected; RankMismatchError, a ValueError, where another
            rank's don't, or the ranks differ. Every rank raises, and the next correct call works.
        EngineUnavailableError: the engine asked for can't run here.
        PeerTimeout: a rank did not arrive within MEGAMOE_TIMEOUT_S.
    """
    shape = x.shape
    if x.dim() == 3:
        x = x.reshape(-1, shape[-1])
        topk_idx = topk_idx.reshape(-1, topk_idx.shape[-1])
        topk_weights = topk_weights.reshape(-1, topk_weights.shape[-1])
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.float32 if problem.recipe == "fp32" else torch.bfloat16)
        topk_weights = topk_weights.float()
    tensors = (x, topk_weights, weights.w13, weights.w2, weights.b13, weights.b2)
    for name, tensor in zip(("topk_idx", "topk_weights", "w13"), (topk_idx, topk_weights, weights.w13), strict=True):
        if tensor.is_meta and not x.is_meta:  # a dispatcher that sees "meta" would run the fake op, alone
            run.refuse(_group_name(group), x.device, ValueError(f"{name} must be on {x.device} like x, got meta"))
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    y = torch.ops.megamoe.forward(
        x, topk_idx, topk_weights, weights.w13, weights.w2, weights.b13, weights.b2,
        problem.to_json(), _group_name(group), engine, placement.to_json() if placement else "", save,
    )[0]  # fmt: skip
    return y.view(shape)  # type: ignore[no-any-return]


def _group_name(group: dist.ProcessGroup | Literal["self"] | None) -> str:
    if group == "self":
        return ""
    if group is None:
        if not (dist.is_available() and dist.is_initialized()):
            return ""
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"group must be a ProcessGroup that this rank belongs to, got {group!r}")
    return str(group.group_name)
