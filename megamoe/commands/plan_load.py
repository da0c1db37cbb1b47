"""How even a routing is over the ranks: sampled, counted by the planner, scaled up to the tokens asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megamoe.dispatch import planner
from megamoe.dispatch.balance import balanced
from megamoe.dispatch.placement import Placement, contiguous
from megamoe.problem import Problem
from megamoe.testing import routing

_SAMPLE = 32768  # tokens over all ranks; more changes the figures by less than they are rounded


@dataclass(frozen=True, kw_only=True)
class RankLoad:
    """Per rank, [R] float64, for the tokens asked for. "Away" counts other ranks only."""

    sampled: int
    """Tokens of each rank that were drawn; the counts are scaled from there."""
    routes: torch.Tensor
    """Routes each rank computes."""
    rows_away: torch.Tensor
    """(token, other rank) pairs each rank sends."""
    routes_away: torch.Tensor
    """Routes to other ranks each rank sends."""
    rows_from_away: torch.Tensor
    """The same pairs as their owner receives them, and so sends sums back."""
    routes_from_away: torch.Tensor


def choose_placement(problem: Problem, kind: str, redundant: int, seed: int) -> Placement:
    """Contiguous, or balanced by the counts of a sample of its own where copies were asked for or E leaves some over.

    Raises:
        ValueError: more slots a rank than experts.
    """
    if not redundant and problem.num_experts % problem.world_size == 0:
        return contiguous(problem.num_experts, problem.world_size)
    generator = torch.Generator().manual_seed(seed + 1)
    seen, _ = routing.KINDS[kind](_SAMPLE // 4, problem.num_experts, problem.top_k, generator)
    load = torch.bincount(seen[seen >= 0], minlength=problem.num_experts)
    return balanced(load, problem.world_size, redundant)


def sample_load(problem: Problem, placement: Placement, tokens: int, kind: str, seed: int) -> RankLoad:
    """Draw ``kind`` routing for every rank and count."""
    ranks = problem.world_size
    sampled = max(min(tokens, _SAMPLE // ranks), min(tokens, 1))
    generator = torch.Generator().manual_seed(seed)
    routes = torch.zeros(ranks, ranks, dtype=torch.float64)  # [source, owner]
    rows = torch.zeros(ranks, ranks, dtype=torch.float64)
    for rank in range(ranks):
        idx, _ = routing.KINDS[kind](sampled, problem.num_experts, problem.top_k, generator)
        plan = planner.plan_on_device(idx, placement, rank)
        routes[rank] = plan.slot_counts.sum(dim=1)
        rows[rank] = plan.dst_counts
    scale = tokens / sampled if sampled else 0.0
    routes, rows = routes * scale, rows * scale
    away = 1 - torch.eye(ranks, dtype=torch.float64)
    return RankLoad(
        sampled=sampled,
        routes=routes.sum(dim=0),
        rows_away=(rows * away).sum(dim=1),
        routes_away=(routes * away).sum(dim=1),
        rows_from_away=(rows * away).sum(dim=0),
        routes_from_away=(routes * away).sum(dim=0),
    )
