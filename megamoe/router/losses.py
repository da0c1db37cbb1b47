"""Balance losses and the z-loss of a gate: pure functions of fp32 tensors, with sums that a group can share.

Each takes this rank's tokens and *totals over all ranks* where the formula averages over the batch, and is scaled so
that the MEAN of the ranks' values is the formula on the whole batch, whatever number of tokens each rank has. With one
rank the totals are the local ones and the value is the formula itself.
"""

from __future__ import annotations

import torch

from megamoe.router.config import RouterConfig


def affinities(scores: torch.Tensor, config: RouterConfig) -> torch.Tensor:
    """Scores [T, E] that sum to 1 per token: sigmoid scores are divided by their sum (arXiv:2412.19437, eq. 19)."""
    return scores if config.score == "softmax" else scores / (scores.sum(-1, keepdim=True) + 1e-20)


def chosen_by_score(scores: torch.Tensor, topk_idx: torch.Tensor, config: RouterConfig) -> torch.Tensor:
    """Ids [T, K] that the balance losses count: the K best plain scores, without bias and groups.

    That is how DeepSeek-V3 defines f_i (eq. 18). Without bias and groups these are the chosen experts themselves.
    """
    if not config.aux_free and config.top_groups == config.num_groups:
        return topk_idx
    return scores.detach().topk(config.top_k, dim=-1).indices


def count(idx: torch.Tensor, real: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How often each expert stands in idx [..., T, K], counting tokens with ``real`` [..., T]: int64 [..., E].

    No host synchronisation, and integer sums: the same on every run.
    """
    ones = real.unsqueeze(-1).expand_as(idx).flatten(-2).long()
    return ones.new_zeros(*idx.shape[:-2], num_experts).scatter_add_(-1, idx.flatten(-2), ones)


def batch_balance(
    p: torch.Tensor, real: torch.Tensor, counts: torch.Tensor, *, tokens: torch.Tensor, ranks: int, top_k: int
) -> torch.Tensor:
    """E * sum_i f_i P_i over the batch; 1 when balanced (arXiv:2101.03961, eq. 4 to 6; K experts as in 2412.19437).

    f_i = counts_i / (K tokens) is the share of choices, P_i the mean affinity. The gradient flows through P alone.

    Args:
        p: affinities of this rank [T, E].
        real: [T] bool, False for padding.
        counts: choices of each expert, over all ranks [E].
        tokens: real tokens over all ranks, scalar.
        ranks: how many ranks ``counts`` and ``tokens`` are summed over.
    """
    tokens = tokens.clamp(min=1)
    f = counts / (top_k * tokens)
    mean_p = ranks * p.masked_fill(~real.unsqueeze(-1), 0.0).sum(0) / tokens
    return p.shape[-1] * (f * mean_p).sum()


def sequence_balance(
    p: torch.Tensor, real: torch.Tensor, idx: torch.Tensor, *, sequences: torch.Tensor, ranks: int
) -> torch.Tensor:
    """Mean over sequences of sum_i f_i P_i with f_i = E / (K S) * choices (arXiv:2412.19437, eq. 17 to 20).

    Args:
        p: affinities [B, S, E].
        real: [B, S] bool; a sequence of padding alone does not count.
        idx: choices [B, S, K].
        sequences: sequences with a real token over all ranks, scalar.
        ranks: how many ranks ``sequences`` is summed over.
    """
    num_experts, top_k = p.shape[-1], idx.shape[-1]
    length = real.sum(-1, keepdim=True).clamp(min=1)
    f = count(idx, real, num_experts) * (num_experts / top_k) / length
    mean_p = p.masked_fill(~real.unsqueeze(-1), 0.0).sum(-2) / length
    return ranks * (f * mean_p).sum() / sequences.clamp(min=1)


def z_loss(logits: torch.Tensor, real: torch.Tensor, *, tokens: torch.Tensor, ranks: int) -> torch.Tensor:
    """Mean over tokens of (log sum_j exp x_j)^2 (arXiv:2202.08906, eq. 5); arguments as in ``batch_balance``."""
    squares = logits.logsumexp(-1).square()
    return ranks * squares.masked_fill(~real, 0.0).sum() / tokens.clamp(min=1)
