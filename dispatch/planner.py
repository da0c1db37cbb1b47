"""Top-k indices to a ``SendPlan``, received slots to a ``FanOut``: torch ops without a host sync, on any device.

The plain twins with the same signatures are in ``twin``.
"""

from __future__ import annotations

import torch

from megamoe.dispatch.placement import Placement
from megamoe.dispatch.plan import FanOut, SendPlan


def plan_send(topk_idx: torch.Tensor, placement: Placement, source_rank: int) -> SendPlan:
    """The plan cut to size, for callers that may read the device (engines over collectives, tests).

    Args and order as in ``plan_on_device``.

    Raises:
        ValueError: as there, and for an index outside [-1, E), with the first position and its value.
    """
    return plan_on_device(topk_idx, placement, source_rank).check().trim()


def plan_on_device(topk_idx: torch.Tensor, placement: Placement, source_rank: int) -> SendPlan:
    """The plan of one source rank with arrays of full capacity; never waits for the device.

    Args:
        topk_idx: [T, K] int64 or int32 expert ids, -1 = no expert; T may be 0. An expert may stand twice in a row and
            then counts twice. An index outside [-1, E) counts as -1 and is reported in ``bad_count``, ``bad_first``.
        placement: who holds which expert.
        source_rank: rank that holds the tokens.

    Raises:
        ValueError: wrong shape or dtype, or a rank that the placement does not have.
    """
    _check(topk_idx, placement, source_rank)
    tokens, top_k = topk_idx.shape
    ranks, slots, experts = placement.world_size, placement.slots_per_rank, placement.num_experts
    idx = topk_idx.long()
    bad = (idx < -1) | (idx >= experts)
    idx = idx.masked_fill(bad, -1)
    physical = placement.route(idx, source_rank)

    # Per token, destinations in ascending order; the first route to each opens a row.
    dst, k_of = torch.where(physical >= 0, physical // slots, ranks).sort(dim=1, stable=True)
    opens = dst < ranks
    opens[:, 1:] &= dst[:, 1:] != dst[:, :-1]
    dst_counts, dst_offsets, order, row = _bucket(torch.where(opens, dst, ranks), ranks)
    capacity = tokens * min(ranks, top_k)
    token_idx = order[:capacity]
    token_idx = torch.where(token_idx >= 0, token_idx // top_k, -1)
    # Rows ascend with the destination, so a running maximum carries a row to the routes that share it.
    shared = row.cummax(dim=1).values if tokens else row
    route_to_row = torch.empty_like(row).scatter_(1, k_of, torch.where(dst < ranks, shared, -1))
    beyond = torch.iinfo(torch.int64).max
    token_to_rows = torch.where(row >= 0, row, beyond).sort(dim=1).values[:, : min(ranks, top_k)]

    topk_slot = idx.new_full((capacity + 1, top_k), -1)  # the last row swallows routes that do not exist
    into = torch.where(route_to_row >= 0, route_to_row, capacity)
    topk_slot.scatter_(0, into, torch.where(physical >= 0, physical % slots, -1))

    slot_counts, slot_offsets, by_slot, token_to_slot = _bucket(
        torch.where(physical >= 0, physical, ranks * slots), ranks * slots
    )
    return SendPlan(
        token_idx=token_idx,
        topk_slot=topk_slot[:capacity],
        dst_counts=dst_counts,
        dst_offsets=dst_offsets,
        route_to_row=route_to_row,
        token_to_rows=torch.where(token_to_rows < beyond, token_to_rows, -1),
        token_to_slot=token_to_slot,
        slot_to_token=torch.where(by_slot >= 0, by_slot // top_k, -1),
        slot_to_k=torch.where(by_slot >= 0, by_slot % top_k, -1),
        slot_counts=slot_counts.view(ranks, slots),
        slot_offsets=slot_offsets,
        expert_counts=_count(torch.where(idx >= 0, idx, experts), experts),
        bad_count=bad.sum(),
        bad_first=_first(bad, topk_idx.long()),
    )


def fan_out(topk_slot: torch.Tensor, num_slots: int) -> FanOut:
    """Order the routes of received rows by local slot, stably; never waits for the device.

    Args:
        topk_slot: [N, K] int64 or int32 local slots, -1 = not here. Rows that are all -1 are padding.
        num_slots: S, local slots of this rank.

    Raises:
        ValueError: wrong shape or dtype.
    """
    _check_indices("topk_slot", topk_slot)
    top_k = topk_slot.shape[1]
    slot = topk_slot.long()
    bad = (slot < -1) | (slot >= num_slots)
    counts, offsets, order, position = _bucket(torch.where(bad | (slot < 0), num_slots, slot), num_slots)
    return FanOut(
        expert_counts=counts,
        expert_offsets=offsets,
        slot_to_row=torch.where(order >= 0, order // top_k, -1),
        slot_to_k=torch.where(order >= 0, order % top_k, -1),
        row_to_slot=position,
        bad_count=bad.sum(),
    )


def _bucket(key: torch.Tensor, buckets: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stable counting sort of ``key`` [...] in [0, buckets], where ``buckets`` itself means "left out".

    Returns counts [buckets], offsets [buckets + 1], order [n] (flat index of the i-th kept entry, -1 after the last)
    and position (shape of key: place in the order, -1 if left out).
    """
    flat = key.flatten()
    counts = _count(flat, buckets)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    order = flat.argsort(stable=True)
    place = torch.arange(len(flat), device=key.device)
    position = torch.empty_like(order).scatter_(0, order, place)
    return (
        counts,
        offsets,
        torch.where(place < offsets[-1], order, -1),
        torch.where(key < buckets, position.view_as(key), -1),
    )


def _count(key: torch.Tensor, buckets: int) -> torch.Tensor:
    """[buckets] occurrences; ``buckets`` itself is not counted. (torch.bincount would wait for the device.)"""
    flat = key.flatten()
    return flat.new_zeros(buckets + 1).scatter_add_(0, flat, torch.ones_like(flat))[:buckets]


def _first(bad: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """[2]: flat position of the first True and the value there, [-1, 0] if there is none."""
    if not bad.numel():
        return torch.arange(-1, 1, device=bad.device)  # [-1, 0] without a copy from the host
    at = bad.flatten().long().argmax(dim=0, keepdim=True)  # argmax gives the first of equal maxima
    found = bad.flatten().gather(0, at)
    return torch.cat([torch.where(found, at, -1), torch.where(found, values.flatten().gather(0, at), 0)])


def _check(topk_idx: torch.Tensor, placement: Placement, source_rank: int) -> None:
    _check_indices("topk_idx", topk_idx)
    if not 0 <= source_rank < placement.world_size:
        raise ValueError(f"source_rank must lie in [0, {placement.world_size}), got {source_rank}")


def _check_indices(name: str, indices: torch.Tensor) -> None:
    if indices.dim() != 2 or indices.shape[1] < 1 or indices.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} must be [rows, top_k] int64 or int32, got {tuple(indices.shape)} {indices.dtype}")
