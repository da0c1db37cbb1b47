"""Rows carried by the plans through virtual ranks come back as the layer's sum, as docs/dispatch.md describes."""

from __future__ import annotations

import pytest
import torch

from megamoe.dispatch import planner
from megamoe.dispatch.balance import balanced
from megamoe.dispatch.placement import Placement, contiguous
from megamoe.testing import routing

EXPERTS, TOP_K, HIDDEN = 8, 3, 5


@pytest.mark.parametrize("kind", routing.KINDS)
@pytest.mark.parametrize(
    "placement",
    [
        contiguous(EXPERTS, 1),
        contiguous(EXPERTS, 4),
        Placement(torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(0)).view(2, 4)),
        balanced(torch.arange(EXPERTS), 4, redundant_per_rank=1),
        balanced(torch.arange(EXPERTS), 5, redundant_per_rank=0),
    ],
    ids=["one", "contiguous", "permuted", "copies", "uneven"],
)
def test_rows_come_back_as_the_sum(kind: str, placement: Placement) -> None:
    """Expert e multiplies by e + 2; ragged tokens, rank 0 has none; integers, so that sums are exact in any order."""
    generator = torch.Generator().manual_seed(7)
    ranks = placement.world_size
    x = [torch.randint(-9, 9, (rank * 3, HIDDEN), generator=generator) for rank in range(ranks)]
    if ranks == 1:
        x = [torch.randint(-9, 9, (7, HIDDEN), generator=generator)]
    topk = [routing.KINDS[kind](len(rows), EXPERTS, TOP_K, generator)[0] for rows in x]
    plans = [planner.plan_send(idx, placement, rank) for rank, idx in enumerate(topk)]

    returned: list[list[torch.Tensor]] = [[] for _ in range(ranks)]  # of each source, partial sums by owner
    for owner in range(ranks):
        mine = [slice(int(p.dst_offsets[owner]), int(p.dst_offsets[owner + 1])) for p in plans]
        received = torch.cat([rows[p.token_idx[s]] for rows, p, s in zip(x, plans, mine, strict=True)])
        slots = torch.cat([p.topk_slot[s] for p, s in zip(plans, mine, strict=True)])
        fan = planner.fan_out(slots, placement.slots_per_rank).trim()
        experts = placement.slot_to_expert[owner].repeat_interleave(fan.expert_counts)
        pool = received[fan.slot_to_row] * (experts + 2)[:, None]
        partial = torch.zeros_like(received).index_add_(0, fan.slot_to_row, pool)
        for source, rows in enumerate(partial.split([s.stop - s.start for s in mine])):
            returned[source].append(rows)

    for rank, (rows, idx, plan) in enumerate(zip(x, topk, plans, strict=True)):
        back = torch.cat([torch.cat(returned[rank]), torch.zeros(1, HIDDEN, dtype=torch.int64)])  # -1 picks the zeros
        y = back[plan.token_to_rows].sum(dim=1)
        assert torch.equal(y, rows * torch.where(idx >= 0, idx + 2, 0).sum(dim=1, keepdim=True))
