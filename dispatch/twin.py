"""The planner's plain twins: loops that say what ``planner`` means. Same signatures, same results, CPU only."""

from __future__ import annotations

import torch

from megamoe.dispatch.placement import Placement
from megamoe.dispatch.plan import FanOut, SendPlan


def plan_on_device(topk_idx: torch.Tensor, placement: Placement, source_rank: int) -> SendPlan:
    """See ``planner.plan_on_device``."""
    tokens, top_k = topk_idx.shape
    ranks, slots, experts = placement.world_size, placement.slots_per_rank, placement.num_experts
    homes = [[s for s in row if s >= 0] for row in placement.expert_slots().tolist()]
    bad: list[tuple[int, int]] = []
    routes: dict[tuple[int, int], int] = {}  # (token, k) -> physical slot
    expert_counts = [0] * experts
    for t, row in enumerate(topk_idx.tolist()):
        for k, expert in enumerate(row):
            if not -1 <= expert < experts:
                bad.append((t * top_k + k, expert))
            elif expert >= 0:
                routes[t, k] = homes[expert][(t + source_rank) % len(homes[expert])]
                expert_counts[expert] += 1

    token_idx: list[int] = []
    topk_slot: list[list[int]] = []
    dst_offsets = [0]
    route_to_row = [[-1] * top_k for _ in range(tokens)]
    token_to_rows: list[list[int]] = [[] for _ in range(tokens)]
    for rank in range(ranks):
        for t in range(tokens):
            here = [k for k in range(top_k) if (t, k) in routes and routes[t, k] // slots == rank]
            if here:
                for k in here:
                    route_to_row[t][k] = len(token_idx)
                token_to_rows[t].append(len(token_idx))
                token_idx.append(t)
                topk_slot.append([routes[t, k] % slots if k in here else -1 for k in range(top_k)])
        dst_offsets.append(len(token_idx))

    slot_counts = [[0] * slots for _ in range(ranks)]
    token_to_slot = [[-1] * top_k for _ in range(tokens)]
    in_order = sorted(routes, key=lambda route: (routes[route], route))
    for place, (t, k) in enumerate(in_order):
        token_to_slot[t][k] = place
        slot_counts[routes[t, k] // slots][routes[t, k] % slots] += 1

    fan = min(ranks, top_k)
    capacity = tokens * fan
    return SendPlan(
        token_idx=_padded(token_idx, capacity),
        topk_slot=_table(topk_slot + [[-1] * top_k] * (capacity - len(topk_slot)), top_k),
        dst_counts=torch.tensor(dst_offsets).diff(),
        dst_offsets=torch.tensor(dst_offsets),
        route_to_row=_table(route_to_row, top_k),
        token_to_rows=_table([rows + [-1] * (fan - len(rows)) for rows in token_to_rows], fan),
        token_to_slot=_table(token_to_slot, top_k),
        slot_to_token=_padded([t for t, _ in in_order], tokens * top_k),
        slot_to_k=_padded([k for _, k in in_order], tokens * top_k),
        slot_counts=torch.tensor(slot_counts),
        slot_offsets=_offsets([n for row in slot_counts for n in row]),
        expert_counts=torch.tensor(expert_counts),
        bad_count=torch.tensor(len(bad)),
        bad_first=torch.tensor(bad[0] if bad else (-1, 0)),
    )


def fan_out(topk_slot: torch.Tensor, num_slots: int) -> FanOut:
    """See ``planner.fan_out``."""
    rows, top_k = topk_slot.shape
    pool: list[list[tuple[int, int]]] = [[] for _ in range(num_slots)]
    bad = 0
    for row, slots in enumerate(topk_slot.tolist()):
        for k, slot in enumerate(slots):
            if 0 <= slot < num_slots:
                pool[slot].append((row, k))
            elif slot != -1:
                bad += 1
    in_order = [route for routes in pool for route in routes]
    row_to_slot = [[-1] * top_k for _ in range(rows)]
    for place, (row, k) in enumerate(in_order):
        row_to_slot[row][k] = place
    return FanOut(
        expert_counts=torch.tensor([len(routes) for routes in pool]),
        expert_offsets=_offsets([len(routes) for routes in pool]),
        slot_to_row=_padded([row for row, _ in in_order], rows * top_k),
        slot_to_k=_padded([k for _, k in in_order], rows * top_k),
        row_to_slot=_table(row_to_slot, top_k),
        bad_count=torch.tensor(bad),
    )


def _offsets(counts: list[int]) -> torch.Tensor:
    offsets = [0]
    for count in counts:
        offsets.append(offsets[-1] + count)
    return torch.tensor(offsets)


def _padded(values: list[int], length: int) -> torch.Tensor:
    return torch.tensor(values + [-1] * (length - len(values)), dtype=torch.int64)


def _table(rows: list[list[int]], columns: int) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int64).view(len(rows), columns)
