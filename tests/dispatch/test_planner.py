"""The vectorised planner equals its plain twin, and both keep what the plan promises."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.dispatch import planner, twin
from megamoe.dispatch.placement import Placement, contiguous
from megamoe.dispatch.plan import FanOut, SendPlan
from megamoe.testing import routing

REPLICATED = Placement(torch.tensor([[0, 1, 2, 7], [0, 3, 4, 7], [0, 5, 6, 7]]))


def assert_same(actual: SendPlan | FanOut, expected: SendPlan | FanOut) -> None:
    for f in dataclasses.fields(expected):
        a, e = getattr(actual, f.name), getattr(expected, f.name)
        assert a.dtype == torch.int64, f.name
        assert a.shape == e.shape and torch.equal(a, e), f"{f.name}: {a.tolist()}, expected {e.tolist()}"


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    """Permuted experts, sometimes with one more expert that every rank holds a copy of."""
    ranks, slots = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    table = torch.tensor(draw(st.permutations(range(ranks * slots)))).view(ranks, slots)
    if draw(st.booleans()):
        table = torch.cat([table, torch.full((ranks, 1), ranks * slots)], dim=1)
    return Placement(table)


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, Placement, int]:
    placement = draw(placements())
    tokens, top_k = draw(st.integers(0, 7)), draw(st.integers(1, 5))
    wild = draw(st.booleans())
    low, high = (-3, placement.num_experts + 2) if wild else (-1, placement.num_experts - 1)
    values = draw(st.lists(st.integers(low, high), min_size=tokens * top_k, max_size=tokens * top_k))
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    topk_idx = torch.tensor(values, dtype=dtype).view(tokens, top_k)
    return topk_idx, placement, draw(st.integers(0, placement.world_size - 1))


@given(cases())
@settings(max_examples=200, deadline=None)
def test_plan_equals_twin(case: tuple[torch.Tensor, Placement, int]) -> None:
    assert_same(planner.plan_on_device(*case), twin.plan_on_device(*case))


@given(cases())
@settings(max_examples=100, deadline=None)
def test_fan_out_equals_twin(case: tuple[torch.Tensor, Placement, int]) -> None:
    topk_slot, placement, _ = case
    assert_same(planner.fan_out(topk_slot, placement.num_experts), twin.fan_out(topk_slot, placement.num_experts))


@pytest.mark.parametrize("kind", routing.KINDS)
@pytest.mark.parametrize("placement", [contiguous(8, 1), contiguous(8, 4), contiguous(8, 8), REPLICATED])
@pytest.mark.parametrize("tokens", [0, 1, 33])
def test_routings_equal_twin(kind: str, placement: Placement, tokens: int) -> None:
    idx, _ = routing.KINDS[kind](tokens, 8, 3, torch.Generator().manual_seed(tokens))
    for rank in range(placement.world_size):
        plan = planner.plan_on_device(idx, placement, rank)
        assert_same(plan, twin.plan_on_device(idx, placement, rank))
        assert_same(planner.fan_out(plan.topk_slot, 8), twin.fan_out(plan.topk_slot, 8))


@given(cases())
@settings(max_examples=100, deadline=None)
def test_plan_keeps_its_promises(case: tuple[torch.Tensor, Placement, int]) -> None:
    """Independent of either implementation: every route arrives, once, at a rank that holds its expert."""
    topk_idx, placement, rank = case
    plan = planner.plan_on_device(topk_idx, placement, rank).trim()
    arrived: dict[tuple[int, int], int] = {}
    for dst in range(placement.world_size):
        rows = range(int(plan.dst_offsets[dst]), int(plan.dst_offsets[dst + 1]))
        tokens = plan.token_idx[rows.start : rows.stop].tolist()
        assert tokens == sorted(set(tokens)), "each token once per destination, ascending"
        for row in rows:
            carried = [(k, s) for k, s in enumerate(plan.topk_slot[row].tolist()) if s >= 0]
            assert carried, "no row travels without a route"
            for k, slot in carried:
                token = int(plan.token_idx[row])
                assert (token, k) not in arrived
                arrived[token, k] = int(placement.slot_to_expert[dst, slot])
    wanted = {
        (t, k): e
        for t, row in enumerate(topk_idx.tolist())
        for k, e in enumerate(row)
        if 0 <= e < placement.num_experts
    }
    assert arrived == wanted
    assert int(plan.bad_count) == sum(not -1 <= e < placement.num_experts for e in topk_idx.flatten().tolist())


def test_example_of_the_docstring() -> None:
    plan = planner.plan_send(torch.tensor([[0, 1], [2, -1], [1, 3]]), contiguous(4, 2), 0)
    assert plan.token_idx.tolist() == [0, 2, 1, 2]
    assert plan.topk_slot.tolist() == [[0, 1], [1, -1], [0, -1], [-1, 1]]
    assert plan.dst_offsets.tolist() == [0, 2, 4]
    assert plan.route_to_row.tolist() == [[0, 0], [2, -1], [1, 3]]
    assert plan.token_to_rows.tolist() == [[0, -1], [2, -1], [1, 3]]
    fan = planner.fan_out(torch.tensor([[0, 1], [1, -1], [1, 1]]), 2)
    assert fan.expert_counts.tolist() == [1, 4] and fan.expert_offsets.tolist() == [0, 1, 5]
    assert fan.slot_to_row.tolist() == [0, 0, 1, 2, 2, -1] and fan.slot_to_k.tolist() == [0, 1, 0, 0, 1, -1]
    assert fan.row_to_slot.tolist() == [[0, 1], [2, -1], [3, 4]]
    assert fan.block_counts(3).tolist() == [1, 2] and fan.block_offsets(3).tolist() == [0, 1, 3]


def test_repeated_expert_counts_twice_and_crosses_once() -> None:
    plan = planner.plan_send(torch.tensor([[7, 7, 2]]), REPLICATED, 1)
    assert plan.expert_counts.tolist() == [0, 0, 1, 0, 0, 0, 0, 2]
    assert plan.dst_counts.tolist() == [1, 1, 0]
    assert plan.topk_slot.tolist() == [[-1, -1, 2], [3, 3, -1]]
    assert planner.fan_out(plan.topk_slot[1:], 4).slot_to_k.tolist()[:2] == [0, 1]


@pytest.mark.parametrize(("value", "at"), [(8, (2, 1)), (-2, (0, 0)), (2**40, (3, 2))])
def test_out_of_range_is_refused_with_position_and_value(value: int, at: tuple[int, int]) -> None:
    idx = torch.zeros(4, 3, dtype=torch.int64)
    idx[at] = value
    idx[3, 2] = value
    with pytest.raises(ValueError, match=rf"\[-1, 8\), got {value} at token {at[0]}, k {at[1]} "):
        planner.plan_send(idx, contiguous(8, 2), 0)
    assert planner.plan_send(idx.clamp(0, 7), contiguous(8, 2), 0).bad_count == 0


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"int64 or int32, got \(3,\) torch.int64"):
        planner.plan_send(torch.zeros(3, dtype=torch.int64), contiguous(4, 2), 0)
    with pytest.raises(ValueError, match=r"got \(3, 1\) torch.float32"):
        planner.fan_out(torch.zeros(3, 1), 2)
    with pytest.raises(ValueError, match=r"source_rank must lie in \[0, 2\), got 2"):
        planner.plan_send(torch.zeros(3, 1, dtype=torch.int64), contiguous(4, 2), 2)


def test_nothing_is_read_on_the_host() -> None:
    """On the meta device any read of a value raises, so what works there never waits for a GPU."""
    idx = torch.zeros(5, 3, dtype=torch.int64, device="meta")
    plan = planner.plan_on_device(idx, REPLICATED, 0)
    assert plan.token_idx.shape == (15,) and planner.fan_out(plan.topk_slot, 4).row_to_slot.shape == (15, 3)
    with pytest.raises((RuntimeError, NotImplementedError)):
        plan.trim()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", routing.KINDS)
def test_gpu_equals_twin_in_a_captured_graph(kind: str) -> None:
    placement = contiguous(64, 8)
    placement.tables(torch.device("cuda", torch.cuda.current_device()))
    generator = torch.Generator().manual_seed(1)
    first, second = (routing.KINDS[kind](100, 64, 6, generator)[0] for _ in range(2))
    second[3, 2] = 64
    idx = first.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        planner.fan_out(planner.plan_on_device(idx, placement, 3).topk_slot, 8)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan = planner.plan_on_device(idx, placement, 3)
        fan = planner.fan_out(plan.topk_slot, 8)
    for case in (first, second):
        idx.copy_(case)
        graph.replay()
        expected = twin.plan_on_device(case, placement, 3)
        assert_same(on_cpu(plan), expected)
        assert_same(on_cpu(fan), twin.fan_out(expected.topk_slot, 8))


def on_cpu(plan: SendPlan | FanOut) -> SendPlan | FanOut:
    return dataclasses.replace(plan, **{f.name: getattr(plan, f.name).cpu() for f in dataclasses.fields(plan)})
