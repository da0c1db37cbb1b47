"""A token dispatcher that moves nothing: our experts take tokens and give finished sums, on the rank they belong to."""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher


def to_topk(probs: torch.Tensor, routing_map: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A router's dense answer as lists of experts.

    Args:
        probs: [T, E], any floating dtype; keeps its graph.
        routing_map: [T, E] bool, at most ``top_k`` True in a row.
        top_k: K.

    Returns:
        (topk_idx [T, K] int64, each row's experts in ascending order, then -1 for none; topk_weights [T, K] fp32,
        0 where there is none).

    Example: the row ``[False, True, False, True]`` with K = 3 gives ``[1, 3, -1]``.
    """
    T, E = routing_map.shape
    place = routing_map.cumsum(1) - 1
    place = torch.where(routing_map, place, top_k)  # column top_k collects what was not chosen
    idx = torch.full((T, top_k + 1), -1, dtype=torch.int64, device=probs.device)
    idx.scatter_(1, place, torch.arange(E, device=probs.device).expand(T, E))
    idx = idx[:, :top_k]
    weights = probs.float().gather(1, idx.clamp(min=0))
    return idx, weights.masked_fill(idx < 0, 0.0)


class PassThroughDispatcher(MoETokenDispatcher):  # type: ignore[misc]  # megatron-core carries no types
    """See the module's text. One forward at a time: stages talk through its attributes, as in the stock ones."""

    shape: torch.Size
    topk_idx: torch.Tensor | None = None

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden_states [S, B, H], routing_map and probs [T, E] -> (rows [T, H], topk_weights [T, K])."""
        self.shape = hidden_states.shape
        self.topk_idx, weights = to_topk(probs, routing_map, self.config.moe_router_topk)
        return hidden_states.reshape(-1, self.shape[-1]), weights

    def token_dispatch(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Its arguments."""
        return hidden_states, probs

    def dispatch_postprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """What ``MegaMoEExperts`` takes: (rows, topk_idx, topk_weights)."""
        return hidden_states, self.topk_idx, probs

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Its argument."""
        return hidden_states

    def token_combine(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Its argument."""
        return hidden_states

    def combine_postprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[T, H] -> [S, B, H]."""
        self.topk_idx = None
        return hidden_states.view(self.shape)
