"""``SendPlan`` and ``FanOut``: what one rank sends where, and how an owner hands received rows to its experts.

Vocabulary: a *route* is one (token, k) with an expert; a *row* is one token travelling to one destination rank, once,
however many of its experts live there; a *local slot* is an expert's place on a rank (see ``placement``); a *pool slot*
is a place in the owner's expert-ordered list of routes.

Both are made by ``planner`` without a host sync, so their arrays have a capacity that follows from shapes alone and
what lies beyond the true count is -1. ``trim()`` cuts them to size; it reads counts on the host.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class SendPlan:
    """The rows one source rank sends, destination-major. All tensors int64 on the device of the top-k indices.

    T tokens, K routes each, R ranks with S local slots, E experts, C = T * min(R, K) rows at most.

    Example: E = 4, R = 2 contiguous, topk_idx = [[0, 1], [2, -1], [1, 3]]: token 0 crosses to rank 0 once for both
    experts. token_idx = [0, 2, 1, 2, -1, -1], dst_offsets = [0, 2, 4],
    topk_slot = [[0, 1], [1, -1], [0, -1], [-1, 1], ...], route_to_row = [[0, 0], [2, -1], [1, 3]],
    token_to_rows = [[0, -1], [2, -1], [1, 3]].
    """

    token_idx: torch.Tensor
    """[C] token of each row: destination-major, ascending within a destination."""
    topk_slot: torch.Tensor
    """[C, K] local slot on the row's destination, -1 for routes that go elsewhere or nowhere."""
    dst_counts: torch.Tensor
    """[R] rows to each rank."""
    dst_offsets: torch.Tensor
    """[R + 1] where each rank's rows begin; the last is the number of rows."""
    route_to_row: torch.Tensor
    """[T, K] row that carries the route, -1 where there is none."""
    token_to_rows: torch.Tensor
    """[T, min(R, K)] rows of the token, ascending (so by destination rank), -1 after the last."""
    token_to_slot: torch.Tensor
    """[T, K] place of the route when all routes are ordered by physical slot (rank, then local slot); -1: none."""
    slot_to_token: torch.Tensor
    """[T * K] the inverse: token of the i-th route in that order, ascending within a slot."""
    slot_to_k: torch.Tensor
    """[T * K] its k."""
    slot_counts: torch.Tensor
    """[R, S] routes to each local slot of each rank."""
    slot_offsets: torch.Tensor
    """[R * S + 1] where each physical slot's routes begin in that order."""
    expert_counts: torch.Tensor
    """[E] routes to each expert, over all of its copies."""
    bad_count: torch.Tensor
    """[] indices outside [-1, E); they contribute nothing to the plan."""
    bad_first: torch.Tensor
    """[2] flat position t * K + k of the first of them and its value; [-1, 0] if there is none."""

    def check(self) -> SendPlan:
        """Self, or ValueError that names the first index outside [-1, E). Reads the device."""
        at, value = self.bad_first.tolist()
        if at >= 0:
            top_k, num_experts = self.topk_slot.shape[1], len(self.expert_counts)
            raise ValueError(
                f"topk_idx must lie in [-1, {num_experts}), got {value} at token {at // top_k}, k {at % top_k} "
                f"({int(self.bad_count)} such indices)"
            )
        return self

    def trim(self) -> SendPlan:
        """The plan with token_idx, topk_slot, slot_to_token and slot_to_k cut to what is used. Reads the device."""
        rows, routes = int(self.dst_offsets[-1]), int(self.slot_offsets[-1])
        return dataclasses.replace(
            self,
            token_idx=self.token_idx[:rows],
            topk_slot=self.topk_slot[:rows],
            slot_to_token=self.slot_to_token[:routes],
            slot_to_k=self.slot_to_k[:routes],
        )


@dataclass(frozen=True, kw_only=True)
class FanOut:
    """The pool of one owner: routes of N received rows ordered by local slot, then by row, then by k. All int64.

    Example: topk_slot = [[0, 1], [1, -1], [1, 1]], two slots: expert_counts = [1, 4], expert_offsets = [0, 1, 5],
    slot_to_row = [0, 0, 1, 2, 2, -1], slot_to_k = [0, 1, 0, 0, 1, -1], row_to_slot = [[0, 1], [2, -1], [3, 4]].
    """

    expert_counts: torch.Tensor
    """[S] routes to each local slot."""
    expert_offsets: torch.Tensor
    """[S + 1] where each local slot's routes begin; the last is M, the number of routes."""
    slot_to_row: torch.Tensor
    """[N * K] received row of each pool slot, -1 from M on."""
    slot_to_k: torch.Tensor
    """[N * K] its k, -1 from M on."""
    row_to_slot: torch.Tensor
    """[N, K] pool slot of each route, -1 where there is none."""
    bad_count: torch.Tensor
    """[] entries outside [-1, S); they contribute nothing."""

    def trim(self) -> FanOut:
        """slot_to_row and slot_to_k cut to M. Reads the device."""
        routes = int(self.expert_offsets[-1])
        return dataclasses.replace(self, slot_to_row=self.slot_to_row[:routes], slot_to_k=self.slot_to_k[:routes])

    def block_counts(self, block_m: int) -> torch.Tensor:
        """[S] blocks of ``block_m`` pool slots that each local slot fills, the last one padded."""
        return (self.expert_counts + (block_m - 1)) // block_m

    def block_offsets(self, block_m: int) -> torch.Tensor:
        """[S + 1] where each local slot's blocks begin; times ``block_m``, where its rows begin in a padded pool."""
        blocks = self.block_counts(block_m)
        return torch.cat([blocks.new_zeros(1), blocks.cumsum(0)])
