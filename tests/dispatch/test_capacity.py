"""Bounds hold for every routing, and some routing reaches them."""

from __future__ import annotations

import itertools

import pytest
import torch

from megamoe.dispatch import planner
from megamoe.dispatch.capacity import Capacity, chunks_for, padded_blocks
from megamoe.dispatch.placement import contiguous
from megamoe.testing import routing


@pytest.mark.parametrize("block_m", [1, 2, 3, 4])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_padded_blocks_is_the_largest_of_all(slots: int, block_m: int) -> None:
    for routes in range(9):
        splits = (c for c in itertools.product(range(routes + 1), repeat=slots) if sum(c) == routes)
        assert padded_blocks(routes, slots, block_m) == max(sum(-(-n // block_m) for n in c) for c in splits)


@pytest.mark.parametrize("kind", routing.KINDS)
@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_every_routing_fits(kind: str, chunks: int) -> None:
    ranks, experts, top_k, tokens = 4, 16, 3, 25
    bound = Capacity(
        world_size=ranks, slots_per_rank=experts // ranks, top_k=top_k, max_tokens=tokens, chunks=chunks, block_m=4
    )
    generator = torch.Generator().manual_seed(chunks)
    sources = [routing.KINDS[kind](tokens, experts, top_k, generator)[0] for _ in range(ranks)]
    placement = contiguous(experts, ranks)
    assert bound.chunk_tokens * chunks >= tokens
    for rank, idx in enumerate(sources):
        assert int(planner.plan_on_device(idx, placement, rank).dst_offsets[-1]) <= bound.send_rows
    for owner in range(ranks):
        blocks = []
        for start in range(0, tokens, bound.chunk_tokens):
            counts = torch.zeros(experts // ranks, dtype=torch.int64)
            for rank, idx in enumerate(sources):
                plan = planner.plan_on_device(idx[start : start + bound.chunk_tokens], placement, rank)
                assert int(plan.dst_counts[owner]) <= bound.region_rows // bound.depth
                counts += plan.slot_counts[owner]
            assert int(counts.sum()) <= bound.chunk_routes
            blocks.append(int((-(-counts // bound.block_m)).sum()))
        in_flight = max(sum(blocks[i : i + bound.depth]) for i in range(len(blocks)))
        assert in_flight <= bound.pool_blocks


def test_all_to_one_owner_reaches_the_bounds() -> None:
    bound = Capacity(world_size=2, slots_per_rank=4, top_k=2, max_tokens=8, block_m=4)
    plan = planner.plan_on_device(torch.tensor([[0, 1]] * 8), contiguous(8, 2), 0)
    assert int(plan.dst_counts[0]) == bound.region_rows
    assert 2 * int(plan.slot_counts[0].sum()) == bound.chunk_routes


def test_chunks_halve_the_ring_only_beyond_two() -> None:
    rows = [
        Capacity(world_size=2, slots_per_rank=4, top_k=2, max_tokens=1200, chunks=c).received_rows for c in (1, 2, 4)
    ]
    assert rows == [2400, 2400, 1200]
    assert chunks_for(100.0, 200.0) == 1 and chunks_for(1767.0, 173.0) == 5


def test_fields_add_up_and_no_token_needs_no_rows() -> None:
    bound = Capacity(world_size=2, slots_per_rank=4, top_k=2, max_tokens=0)
    fields = {f.name: f for f in bound.fields(in_row_bytes=64, mid_row_bytes=32, out_row_bytes=128)}
    assert fields["regions"].bytes == fields["partials"].bytes == fields["out_pool"].bytes == 0
    assert fields["headers"].bytes == 2 * 2 * 4 * 6
    one = Capacity(world_size=2, slots_per_rank=4, top_k=2, max_tokens=10)
    fields = {f.name: f for f in one.fields(in_row_bytes=64, mid_row_bytes=32, out_row_bytes=128)}
    assert fields["regions"].bytes == 2 * 10 * (64 + 2 * 6) and fields["partials"].bytes == 10 * 2 * 128
    assert fields["out_pool"].bytes == one.pool_rows * 128 and one.pool_rows >= 40


def test_capacity_refuses() -> None:
    with pytest.raises(ValueError, match="chunks must be at least 1, got 0"):
        Capacity(world_size=2, slots_per_rank=4, top_k=2, max_tokens=10, chunks=0)
    with pytest.raises(ValueError, match="max_tokens must be at least 0, got -1"):
        Capacity(world_size=2, slots_per_rank=4, top_k=2, max_tokens=-1)
