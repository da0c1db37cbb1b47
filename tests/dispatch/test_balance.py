"""Placements: what they refuse, how copies take turns, and how even the load gets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.dispatch import planner
from megamoe.dispatch.balance import balanced, imbalance, rank_load
from megamoe.dispatch.placement import Placement, contiguous
from megamoe.testing import routing

BOUNDS = {8: 1.15, 64: 1.25}  # largest over mean rank load, Zipf 1.2, 256 experts, one redundant expert a rank


@pytest.mark.parametrize("ranks", BOUNDS)
def test_expected_zipf_load_is_even(ranks: int) -> None:
    load = torch.arange(1, 257).double() ** -1.2
    load = load[torch.randperm(256, generator=torch.Generator().manual_seed(ranks))]
    placement = balanced(load, ranks, redundant_per_rank=1)
    assert placement.slots_per_rank == 256 // ranks + 1
    assert imbalance(rank_load(load, placement)) <= BOUNDS[ranks]
    assert imbalance(rank_load(load, contiguous(256, ranks))) > 2, "without copies the load is far from even"


@pytest.mark.parametrize("ranks", BOUNDS)
@pytest.mark.parametrize("top_k", [1, 8])
def test_sampled_zipf_load_is_even(ranks: int, top_k: int) -> None:
    """Counts of one sample make the placement, the routes of another are counted rank by rank."""
    generator = torch.Generator().manual_seed(ranks + top_k)
    tokens = 1024
    seen = routing.zipf(ranks * tokens, 256, top_k, generator)[0]
    placement = balanced(torch.bincount(seen.flatten(), minlength=256), ranks)
    fresh = routing.zipf(ranks * tokens, 256, top_k, generator)[0].view(ranks, tokens, top_k)
    loads = torch.zeros(ranks, dtype=torch.int64)
    for rank in range(ranks):
        loads += planner.plan_on_device(fresh[rank], placement, rank).slot_counts.sum(1)
    assert int(loads.sum()) == ranks * tokens * top_k
    assert imbalance(loads) <= BOUNDS[ranks]


@given(st.integers(1, 9), st.integers(0, 3), st.lists(st.sampled_from([0, 0, 1, 5, 100]), min_size=1, max_size=14))
@settings(max_examples=300, deadline=None)
def test_any_load_gives_a_placement(ranks: int, redundant: int, load: list[int]) -> None:
    slots = -(-len(load) // ranks) + redundant
    if slots > len(load):
        with pytest.raises(ValueError, match=f"{slots} slots a rank need as many experts, got {len(load)}"):
            balanced(torch.tensor(load), ranks, redundant)
        return
    placement = balanced(torch.tensor(load), ranks, redundant)  # Placement itself refuses missing and doubled experts
    assert tuple(placement.slot_to_expert.shape) == (ranks, slots) and placement.num_experts == len(load)
    assert float(rank_load(torch.tensor(load), placement).sum()) == pytest.approx(sum(load))


def test_balanced_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match=r"load must be \[experts\], finite and at least 0, got \(2, 2\)"):
        balanced(torch.ones(2, 2), 2)
    with pytest.raises(ValueError, match="load must be"):
        balanced(torch.tensor([1.0, float("nan")]), 2)
    with pytest.raises(ValueError, match="at least 0, got 2, -1"):
        balanced(torch.ones(4), 2, -1)


def test_copies_take_turns() -> None:
    placement = Placement(torch.tensor([[0, 1], [2, 0], [0, 3]]))
    assert placement.expert_slots().tolist() == [[0, 3, 4], [1, -1, -1], [2, -1, -1], [5, -1, -1]]
    route = placement.route(torch.tensor([[0, 0], [0, 1], [-1, 3], [3, 0]]), source_rank=1)
    assert route.tolist() == [[3, 3], [4, 1], [-1, 5], [5, 3]]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (torch.tensor([[0, 2]]), r"missing: \[1\] of 3"),
        (torch.tensor([[0, 1], [1, 1]]), "expert 1 stands twice on rank 1"),
        (torch.tensor([[0, -1]]), "at least 0, got -1"),
        (torch.tensor([0, 1]), r"got \(2,\) torch.int64"),
        (torch.zeros(1, 1), "torch.float32"),
        (torch.zeros(1, 0, dtype=torch.int64), "non-empty"),
    ],
)
def test_placement_refuses(table: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Placement(table)


def test_contiguous_needs_divisible_experts() -> None:
    with pytest.raises(ValueError, match=r"num_experts \(30\) must be divisible by the number of ranks \(4\)"):
        contiguous(30, 4)


def test_placement_equality_hash_and_json() -> None:
    a, b = contiguous(6, 2), Placement(torch.arange(6).view(2, 3))
    assert a == b and hash(a) == hash(b) and Placement.from_json(a.to_json()) == a
    assert a != Placement(torch.arange(6).view(3, 2)) and a != Placement(torch.tensor([[1, 0, 2], [3, 4, 5]]))
