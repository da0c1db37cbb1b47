"""The engine ``mega``: who may use it and when, what it keeps, its backward; on GPUs, against the reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megamoe import EngineUnavailableError, ExpertWeights, PeerTimeout, RankMismatchError, explain_engines, mega_moe
from megamoe.dispatch.placement import Placement
from megamoe.dispatch.placement import contiguous as contiguous_placement
from megamoe.engines import choose, mega, mega_workspaces
from megamoe.engines.base import Call
from megamoe.engines.mega import Mega
from megamoe.engines.saved import Saved
from megamoe.engines.staged import Staged
from megamoe.testing import routing
from megamoe.testing.ranks import RankPool
from tests.engines.cases import Case, check, router_scale, run

CASE = Case(experts=8, top_k=3, hidden=64, intermediate=40, recipe="bf16", tokens=(13, 5, 0, 20))
LARGE = Case(experts=16, top_k=4, hidden=512, intermediate=384, recipe="bf16", tokens=(300, 150), device="cuda")
COPIES = ((0, 1, 2, 3, 4), (5, 6, 7, 0, 2))  # experts 0 and 2 stand twice


class OnCpu(Mega):
    """The engine with its kernel replaced by staged's forward: all that surrounds it runs on CPUs."""

    fails = False

    def why_not(self, *_: Any) -> str | None:
        return None

    def forward(self, call: Call, plan: Any, traffic: Any, save: bool) -> tuple[torch.Tensor, Saved | None]:
        if self.fails:
            raise EngineUnavailableError("no memory in common")
        y, _ = Staged().forward(call, plan, traffic, False)
        made = Saved.make(
            self.name, call.problem, call.x.device,
            num_routes=traffic.recv_routes, send_rows=traffic.send_rows, recv_rows=traffic.recv_rows,
        )  # fmt: skip
        return y, made if save else None


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> OnCpu:
    engine = OnCpu()
    monkeypatch.setitem(choose.ENGINES, "mega", engine)
    monkeypatch.setattr(mega_workspaces, "ready", lambda call: False)
    return engine


def _against_staged(rank: int, world_size: int, group: dist.ProcessGroup, cases: list[Case]) -> list[str]:
    choose.ENGINES["mega"] = OnCpu()
    mega_workspaces.ready = lambda call: False
    wrong = []
    for case in cases:
        got, want = (run(case, rank, world_size, group, engine) for engine in ("mega", "staged"))
        wrong += [f"rank {rank}: {name}, {case}" for name, t in want.items() if not torch.equal(got[name], t)]
    return wrong


@pytest.mark.parametrize("world_size", [1, 2])
def test_backward_is_that_of_staged(world_size: int) -> None:
    cases = [
        CASE,
        replace(CASE, bias=True, weights_applied="before_down", kind="masked"),
        replace(CASE, tokens=(0, 7), activation="geglu", bias=True),
        replace(CASE, slots=COPIES if world_size == 2 else None),
    ]
    with RankPool(world_size) as pool:  # its own: the ranks' table of engines is changed
        assert pool.run(_against_staged, cases) == [[]] * world_size


def test_it_says_why_not_on_a_cpu() -> None:
    reasons = dict(explain_engines(CASE.problem(1), torch.device("cpu"), None))
    assert reasons["mega"] == "the mega-kernel runs on GPUs of compute capability 9.0, not on cpu"


def arguments(case: Case) -> dict[str, Any]:
    x, idx, weights, _ = case.inputs(0, 1)
    return {"x": x, "topk_idx": idx, "topk_weights": weights, "weights": case.weights(0, 1), "problem": case.problem(1)}


def test_auto_takes_it_unless_backward_follows(on_cpu: OnCpu) -> None:
    problem, cpu = CASE.problem(1), torch.device("cpu")
    assert dict(explain_engines(problem, cpu, None))["mega"] is None
    assert choose.best(choose.offered("auto", problem, cpu, None)).name == "mega"
    assert choose.best(choose.offered("auto", problem, cpu, None, save=True)).name == "staged"
    assert choose.best(choose.offered("mega", problem, cpu, None, save=True)).name == "mega"
    assert choose.taken("auto", "bf16", cpu, None) == "mega"
    assert choose.taken("auto", "bf16", cpu, None, save=True) == "staged"
    quantised = replace(problem, recipe="fp8_block")
    assert choose.best(choose.offered("mega", quantised, cpu, None)).name == "mega"
    with pytest.raises(EngineUnavailableError, match="no backward for the recipe fp8_block"):
        choose.offered("mega", quantised, cpu, None, save=True)
    assert choose.best(choose.offered("auto", replace(problem, recipe="mxfp4"), cpu, None, save=True)).name != "mega"


def test_auto_goes_on_without_memory_in_common(on_cpu: OnCpu) -> None:
    a = arguments(CASE)
    want = mega_moe(**a, engine="staged")
    assert torch.equal(mega_moe(**a, engine="mega"), want)
    on_cpu.fails = True
    assert torch.equal(mega_moe(**a), want)
    with pytest.raises(EngineUnavailableError, match="no memory in common"):
        mega_moe(**a, engine="mega")


def call_of(case: Case, placement: Placement | None = None) -> Call:
    a = arguments(case)
    placement = placement or contiguous_placement(case.experts, 1)
    return Call(placement=placement, group=None, **a)


class Broken:
    """A workspace whose last wait has expired."""

    closed = False

    def check(self) -> None:
        raise PeerTimeout("rank 0 waited for rank 1")

    def close(self) -> None:
        self.closed = True


def test_an_expired_wait_is_told_once_and_its_workspace_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    call, runner = call_of(CASE), Broken()
    held = SimpleNamespace(runner=runner, last=SimpleNamespace(synchronize=lambda: None))
    kept = mega_workspaces._OfGroup({mega_workspaces.key_of(call): held})  # type: ignore[dict-item]
    monkeypatch.setattr(mega_workspaces, "_alone", kept)

    class Ready(OnCpu):
        pass

    monkeypatch.setitem(choose.ENGINES, "mega", Ready())
    with pytest.raises(PeerTimeout, match="waited for rank 1"):
        mega_moe(**arguments(CASE), engine="mega")
    assert runner.closed and not kept.workspaces
    assert not mega_workspaces.ready(call)
    mega_moe(**arguments(CASE), engine="mega")  # and the next call is right


def test_bf16_weights_are_read_where_they_are() -> None:
    call = call_of(replace(CASE, weight_dtype="bfloat16", bias=True))
    made = mega_workspaces.prepared(call.weights, call)
    assert made.w13.data_ptr() == call.weights.w13.data_ptr() and made.b13 is not None
    assert made.b13.dtype == torch.float32
    call = call_of(CASE)  # fp32 masters: a cast that follows every change
    call.weights.w2.mul_(2)
    assert torch.equal(mega_workspaces.prepared(call.weights, call).w2, call.weights.w2.bfloat16())


def test_quantised_weights_follow_the_version_counters() -> None:
    call = call_of(replace(CASE, recipe="fp8_block", bias=True))
    first = mega_workspaces.prepared(call.weights, call)
    assert mega_workspaces.prepared(call.weights, call) is first
    for name in ("w13", "w2", "b13", "b2"):
        before = getattr(first.dequantise(), name).clone()
        getattr(call.weights, name).mul_(2)
        again = mega_workspaces.prepared(call.weights, call)
        assert again is not first
        assert torch.equal(getattr(again.dequantise(), name), 2 * before)
        first = again
    other = ExpertWeights(call.weights.w13, call.weights.w2.clone(), call.weights.b13, call.weights.b2)
    assert mega_workspaces.prepared(other, call) is not first
    first = mega_workspaces.prepared(call.weights, call)
    mega_workspaces.forget_weights()
    assert mega_workspaces.prepared(call.weights, call) is not first
    with torch.inference_mode():
        weights = replace(call.weights, w2=call.weights.w2.clone())
        assert mega_workspaces.prepared(weights, call) is not mega_workspaces.prepared(weights, call)


def test_contiguous_placements_are_recognised() -> None:
    assert mega._is_contiguous(contiguous_placement(8, 2))
    assert not mega._is_contiguous(Placement(torch.tensor(COPIES)))
    assert not mega._is_contiguous(Placement(torch.tensor([[1, 0], [2, 3]])))


# --- on GPUs ---


def compare(rank: int, world_size: int, group: dist.ProcessGroup | None, cases: list[Case]) -> list[str]:
    """mega against the reference, y and every gradient. No rank raises, so none leaves the others."""
    wrong = []
    for case in cases:
        got, want = (run(case, rank, world_size, group, engine) for engine in ("mega", "reference"))
        try:
            check(case, got, want, router_scale(case, rank, world_size))
        except AssertionError as error:
            wrong.append(f"rank {rank} of {world_size}, {case}: {error}")
    return wrong


def gpu_cases(world_size: int) -> list[Case]:
    return [
        *(replace(LARGE, kind=kind, seed=i) for i, kind in enumerate(routing.KINDS)),
        replace(LARGE, weight_dtype="bfloat16", tokens=(0, 90)),
        replace(LARGE, weights_applied="before_down", bias=True),
        *([replace(LARGE, experts=8, slots=COPIES)] if world_size == 2 else []),
    ]


@pytest.mark.gpu
def test_it_equals_the_reference() -> None:
    wrong = compare(0, 1, None, gpu_cases(1))
    assert not wrong, "\n".join(wrong)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["fp8_block", "fp8_row"])
def test_fp8_forward_follows_the_weights(recipe: str) -> None:
    case = replace(LARGE, recipe=recipe, weight_dtype="bfloat16")
    x, idx, topk_weights, _ = (t.cuda() for t in case.inputs(0, 1))
    weights = case.local_weights(0, 1)
    for _ in range(2):
        ys = [
            mega_moe(x, idx, topk_weights, weights, problem=case.problem(1), engine=engine)
            for engine in ("mega", "reference")
        ]
        # Codes of activations may fall either way (megamoe/testing/mega_twin.py); tests/mega holds y to 1e-5 without.
        error = float((ys[0].double() - ys[1].double()).norm() / ys[1].double().norm())
        assert error < 1e-2
        weights.w2.mul_(-2)
    assert mega_moe(x, idx, topk_weights, weights, problem=case.problem(1)).isfinite().all()
    weights.w13.requires_grad_()
    with pytest.raises(EngineUnavailableError, match=f"no backward for the recipe {recipe}"):
        mega_moe(x, idx, topk_weights, weights, problem=case.problem(1), engine="mega")


@pytest.mark.gpu
def test_streams_take_turns() -> None:
    case = replace(LARGE, weight_dtype="bfloat16")
    x, idx, topk_weights, _ = (t.cuda() for t in case.inputs(0, 1))
    weights, streams = case.local_weights(0, 1), [torch.cuda.Stream() for _ in range(3)]
    want = mega_moe(x, idx, topk_weights, weights, problem=case.problem(1), engine="mega")
    torch.cuda.synchronize()
    ys = []
    for turn in range(9):
        with torch.cuda.stream(streams[turn % 3]):
            ys.append(mega_moe(x, idx, topk_weights, weights, problem=case.problem(1), engine="mega"))
    torch.cuda.synchronize()
    assert all(torch.equal(y, want) for y in ys)


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(2, backend="cpu:gloo,cuda:nccl") as pool:
        yield pool


@pytest.mark.multi_gpu
def test_it_equals_the_reference_on_two(pool: RankPool) -> None:
    wrong = [text for texts in pool.run(compare, gpu_cases(2)) for text in texts]
    assert not wrong, "\n".join(wrong)


def _one_refuses(rank: int, world_size: int, group: dist.ProcessGroup) -> list[str]:
    case = LARGE
    x, idx, topk_weights, _ = (t.cuda() for t in case.inputs(rank, world_size))
    a = {"weights": case.local_weights(rank, world_size), "problem": case.problem(world_size), "group": group}
    told = []
    for bad in (False, True, False):
        route = torch.full_like(idx, 99) if bad and rank else idx
        try:
            mega_moe(x, route, topk_weights, **a, engine="mega")
            told.append("")
        except (ValueError, RankMismatchError) as error:
            told.append(str(error))
    return told


@pytest.mark.multi_gpu
def test_a_bad_index_raises_on_both(pool: RankPool) -> None:
    for first, refused, last in pool.run(_one_refuses):
        assert not first and not last and "99" in refused
