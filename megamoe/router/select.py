"""Scores, choice and weights of a top-k gate as pure functions of fp32 logits [T, E]."""

from __future__ import annotations

import torch

from megamoe.router.config import RouterConfig


def scores_of(logits: torch.Tensor, config: RouterConfig) -> torch.Tensor:
    """Affinities [T, E] fp32 in [0, 1]: softmax over the experts, or the sigmoid of each logit."""
    return logits.softmax(dim=-1) if config.score == "softmax" else logits.sigmoid()


def choose(scores: torch.Tensor, expert_bias: torch.Tensor | None, config: RouterConfig) -> torch.Tensor:
    """Expert ids [T, K] int64, best first; the choice carries no gradient.

    ``expert_bias`` [E] is added for choosing only (arXiv:2408.15664, eq. 3). With groups, only experts of the
    ``top_groups`` groups with the largest sum of ``group_top`` biased scores can be chosen (arXiv:2412.19437, 2.1.2).
    """
    ranking = scores.detach()
    if expert_bias is not None:
        ranking = ranking + expert_bias
    if config.top_groups < config.num_groups:
        # -inf, not 0: a biased score may be negative and must still win against an expert of a dropped group.
        ranking = ranking.masked_fill(~_kept_by_group(ranking, config), float("-inf"))
    return ranking.topk(config.top_k, dim=-1).indices


def _kept_by_group(ranking: torch.Tensor, config: RouterConfig) -> torch.Tensor:
    """Mask [T, E] bool of the experts whose group is among the ``top_groups`` best of each token."""
    grouped = ranking.view(-1, config.num_groups, config.group_size)
    group_scores = grouped.topk(config.group_top, dim=-1).values.sum(-1)
    best = group_scores.topk(config.top_groups, dim=-1).indices
    keep = torch.zeros_like(group_scores, dtype=torch.bool).scatter(-1, best, True)
    return keep.repeat_interleave(config.group_size, dim=-1)


def weights_of(
    logits: torch.Tensor, scores: torch.Tensor, topk_idx: torch.Tensor, config: RouterConfig
) -> torch.Tensor:
    """Weights [T, K] fp32 of the chosen experts, differentiable with respect to the logits."""
    if config.normalize and config.score == "softmax":
        # Chosen softmax scores divided by their sum are the softmax of the chosen logits, without the underflow.
        return config.scale * logits.gather(-1, topk_idx).softmax(dim=-1)
    weights = scores.gather(-1, topk_idx)
    if config.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return config.scale * weights
