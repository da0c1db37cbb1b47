"""Checks of arguments that every way into a layer makes, in the same words."""

from __future__ import annotations

import torch

from megamoe.problem import Problem


def check_routing(num_tokens: int, topk_idx: torch.Tensor, topk_weights: torch.Tensor, problem: Problem) -> None:
    """Raise ValueError with got and expected unless topk_idx, int64 or int32, and topk_weights, fp32, are [T, K].

    T = ``num_tokens``, at most ``problem.max_tokens``. Values are not looked at.
    """
    T, K = num_tokens, problem.top_k
    if problem.max_tokens < T:
        raise ValueError(f"x has {T} tokens, but problem.max_tokens is {problem.max_tokens}")
    if tuple(topk_idx.shape) != (T, K) or topk_idx.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"topk_idx must be {(T, K)} int64 or int32, got {tuple(topk_idx.shape)} {topk_idx.dtype}")
    if tuple(topk_weights.shape) != (T, K) or topk_weights.dtype != torch.float32:
        raise ValueError(f"topk_weights must be {(T, K)} fp32, got {tuple(topk_weights.shape)} {topk_weights.dtype}")
