"""Routings that tests and benchmarks share: each returns (topk_idx [T, K] int64, topk_weights [T, K] fp32).

-1 marks "no expert"; weights of such entries are 0.
"""

from __future__ import annotations

import torch


def balanced(
    tokens: int, num_experts: int, top_k: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-k of Gaussian scores: distinct experts, uniform in expectation."""
    scores = torch.randn(tokens, num_experts, generator=generator)
    return _weighted(scores.topk(top_k, dim=1).indices, generator)


def zipf(
    tokens: int, num_experts: int, top_k: int, generator: torch.Generator, exponent: float = 1.2
) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct experts drawn with probability proportional to rank^-exponent (Gumbel top-k)."""
    logits = -exponent * torch.arange(1, num_experts + 1, dtype=torch.float32).log()
    gumbel = -torch.empty(tokens, num_experts).exponential_(generator=generator).log()
    return _weighted((logits + gumbel).topk(top_k, dim=1).indices, generator)


def all_to_one(
    tokens: int, num_experts: int, top_k: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every token to experts 0 .. K - 1: the worst skew."""
    return _weighted(torch.arange(top_k).expand(tokens, top_k).clone(), generator)


def masked(
    tokens: int, num_experts: int, top_k: int, generator: torch.Generator, share: float = 0.4
) -> tuple[torch.Tensor, torch.Tensor]:
    """Balanced, with about ``share`` of the entries set to -1, some tokens losing all of them."""
    idx, weights = balanced(tokens, num_experts, top_k, generator)
    drop = torch.rand(tokens, top_k, generator=generator) < share
    drop |= torch.rand(tokens, 1, generator=generator) < share / 4
    return idx.masked_fill(drop, -1), weights.masked_fill(drop, 0.0)


def _weighted(idx: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    weights = torch.rand(idx.shape, generator=generator) + 0.1
    return idx, weights / weights.sum(dim=1, keepdim=True)


KINDS = {"balanced": balanced, "zipf": zipf, "all_to_one": all_to_one, "masked": masked}
