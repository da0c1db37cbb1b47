"""Placements that even out the load of the ranks, from counts: hot experts get copies, copies get ranks.

The idea, and the name the field gives it, is the expert-parallel load balancer of DeepSeek-V3 (arXiv:2412.19437
section 3.4, github.com/deepseek-ai/EPLB, its global policy): copy what is hottest, then pack, heaviest first. Here the
copies of one expert always stand on different ranks.
"""

from __future__ import annotations

import heapq

import torch

from megamoe.dispatch.placement import Placement


def balanced(load: torch.Tensor, world_size: int, redundant_per_rank: int = 1) -> Placement:
    """A placement with ceil(E / R) + redundant_per_rank slots a rank that evens out ``load``.

    Slots beyond E hold copies, so E need not divide by R. Deterministic: ranks that agree on ``load`` agree on the
    placement.

    Args:
        load: [E] routes of each expert, integers or floats of at least 0; all zero counts as uniform.
        world_size: R.
        redundant_per_rank: slots of each rank for copies; 0 only reorders the experts where E divides by R.

    Raises:
        ValueError: load that is not [E], negative or not finite; more slots a rank than experts.
    """
    if load.dim() != 1 or not len(load) or not bool((load.isfinite() & (load >= 0)).all()):
        raise ValueError(f"load must be [experts], finite and at least 0, got {tuple(load.shape)} {load.dtype}")
    if world_size < 1 or redundant_per_rank < 0:
        raise ValueError(
            f"world_size must be at least 1 and redundant_per_rank at least 0, got {world_size}, {redundant_per_rank}"
        )
    slots = -(-len(load) // world_size) + redundant_per_rank
    if slots > len(load):
        raise ValueError(
            f"{slots} slots a rank need as many experts, got {len(load)}: copies must stand on other ranks"
        )
    weight = load.double().tolist() if float(load.sum()) > 0 else [1.0] * len(load)
    copies = _copies(weight, world_size, world_size * slots)
    ranks = _pack([w / n for w, n in zip(weight, copies, strict=True)], copies, world_size, slots)
    return Placement(torch.tensor([sorted(held) for held in ranks]))


def rank_load(load: torch.Tensor, placement: Placement) -> torch.Tensor:
    """[R] float64: load of each rank if the copies of an expert share its load evenly.

    Args:
        load: [E] routes of each expert.
        placement: of the same E experts.
    """
    share = load.double() / placement.copies()
    return share[placement.slot_to_expert].sum(dim=1)


def imbalance(loads: torch.Tensor) -> float:
    """Largest over mean of [R] rank loads: how much longer the group takes than an even one; 1.0 without any load."""
    mean = float(loads.double().mean())
    return float(loads.max()) / mean if mean else 1.0


def _copies(weight: list[float], world_size: int, slots: int) -> list[int]:
    """Copies of each expert: one each, then one more for whichever has the heaviest copies, at most one a rank."""
    copies = [1] * len(weight)
    heap = [(-w, expert) for expert, w in enumerate(weight)]
    heapq.heapify(heap)
    for _ in range(slots - len(weight)):
        _, expert = heapq.heappop(heap)
        copies[expert] += 1
        if copies[expert] < world_size:
            heapq.heappush(heap, (-weight[expert] / copies[expert], expert))
    return copies


def _pack(share: list[float], copies: list[int], world_size: int, slots: int) -> list[set[int]]:
    """Experts of each rank: heaviest copy first, onto the lightest rank that has room and does not hold it yet."""
    held: list[set[int]] = [set() for _ in range(world_size)]
    load = [0.0] * world_size
    for expert in sorted(range(len(share)), key=lambda e: (-share[e], e)):
        for _ in range(copies[expert]):
            free = [r for r in range(world_size) if len(held[r]) < slots]
            fits = [r for r in free if expert not in held[r]]
            if not fits:
                fits = [_make_room(held, load, share, expert, free[0])]
            rank = min(fits, key=lambda r: (load[r], r))
            held[rank].add(expert)
            load[rank] += share[expert]
    return held


def _make_room(held: list[set[int]], load: list[float], share: list[float], expert: int, free: int) -> int:
    """Every rank with room holds ``expert``: move something to the rank ``free`` from one that lacks it; that one.

    Possible always: fewer than R copies stand, so some rank lacks the expert; it is full and ``free`` is not, so it
    holds something that ``free`` does not.
    """
    rank = min((r for r in range(len(held)) if expert not in held[r]), key=lambda r: (load[r], r))
    moved = min(held[rank] - held[free], key=lambda e: (share[e], e))
    held[rank].remove(moved)
    held[free].add(moved)
    load[rank] -= share[moved]
    load[free] += share[moved]
    return rank
