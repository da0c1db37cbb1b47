"""Whether a call's arguments fit its workspace, before anything is launched."""

from __future__ import annotations

import torch

from megamoe.checks import check_routing
from megamoe.mega.tokens import QuantisedTokens
from megamoe.prepared import PreparedWeights
from megamoe.problem import Problem


def check_call(
    x: torch.Tensor | QuantisedTokens,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    weights: PreparedWeights,
    *,
    problem: Problem,
    slots: int,
    device: torch.device,
) -> int:
    """T. ``slots``: experts of this rank, shared ones included; ``device``: the workspace's.

    Raises:
        ValueError: an argument that does not fit, with got and expected.
    """
    if isinstance(x, QuantisedTokens):
        x.check(problem.hidden, problem.recipe)
    else:
        _check_bf16(x, problem.hidden)
    values = x.values if isinstance(x, QuantisedTokens) else x
    T = len(values)
    check_routing(T, topk_idx, topk_weights, problem)
    if not (topk_idx.is_contiguous() and topk_weights.is_contiguous()):
        raise ValueError(f"topk_idx and topk_weights must be contiguous, got strides {topk_idx.stride()}")
    for name, tensor in (
        ("x", values),
        ("topk_idx", topk_idx),
        ("topk_weights", topk_weights),
        ("w13", weights.w13),
    ):
        if tensor.device != device:
            raise ValueError(f"{name} must be on {device} like the workspace, got {tensor.device}")
    weights.check(problem, slots)
    return T


def _check_bf16(x: torch.Tensor, hidden: int) -> None:
    if x.dim() != 2 or x.shape[1] != hidden or x.dtype != torch.bfloat16 or (len(x) and x.stride(1) != 1):
        raise ValueError(
            f"x must be bf16 [tokens, {hidden}] with unit inner stride, got {x.dtype} {tuple(x.shape)} "
            f"with strides {x.stride()}"
        )
    if x.data_ptr() % 16 or (len(x) > 1 and x.stride(0) % 8):
        raise ValueError(f"rows of x must start on 16 bytes, got address {x.data_ptr():#x}, strides {x.stride()}")
