"""The engines on GPUs: staged against reference on one, and over NCCL on two. Marked; skipped where there is none."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megamoe import PeerTimeout, mega_moe
from megamoe.engines import grouped
from megamoe.testing import routing
from megamoe.testing.ranks import RankDied, RankPool, spawn_ranks
from megamoe.weights import ExpertWeights
from tests.engines.bad_arguments import BAD, CASE, arguments, attempts
from tests.engines.cases import Case, assert_same, compare, run

LARGE = Case(experts=16, top_k=4, hidden=512, intermediate=384, tokens=(300, 150, 0, 77), device="cuda")


def _cases(recipe: str) -> list[Case]:
    """The routings, then the forms of the layer."""
    base = replace(LARGE, recipe=recipe)
    return [
        *(replace(base, kind=kind, seed=i) for i, kind in enumerate(routing.KINDS)),
        replace(base, top_k=1),
        replace(base, top_k=16, kind="masked", tokens=(0, 90)),
        replace(base, tokens=(0,)),
        replace(base, experts=2, top_k=2),
        replace(base, hidden=72, intermediate=40, tokens=(1, 3), kind="zipf"),
        *(replace(base, activation=a, bias=True) for a in ("swiglu", "geglu", "relu2")),
        *(replace(base, weights_applied="before_down", bias=b) for b in (False, True)),
        replace(base, weight_dtype="bfloat16" if recipe == "bf16" else "float32"),
    ]


def _clamped(recipe: str) -> Case:
    """Where h13 is rounded to bf16 an entry may land on the other side of the clamp; fp32 results keep it in place."""
    return replace(LARGE, recipe=recipe, activation="swiglu_clamped", bias=True)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["bf16", "fp32"])
def test_staged_equals_reference(recipe: str) -> None:
    cases = _cases(recipe)
    if recipe == "fp32" or grouped.backend(torch.device("cuda", 0), torch.bfloat16) == "megamoe":
        cases.append(_clamped(recipe))
    wrong = [text for case in cases for text in compare(0, 1, None, [case])]
    assert not wrong, "\n".join(wrong)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["bf16", "fp32", "fp8_block", "fp8_row", "mxfp4"])
def test_reference_is_the_same_on_cpu_and_gpu(recipe: str) -> None:
    case = replace(LARGE, recipe=recipe, tokens=(60,), bias=True)
    gpu, cpu = run(case, 0, 1, None, "reference"), run(replace(case, device="cpu"), 0, 1, None, "reference")
    for name, want in cpu.items():
        # A number that lies between two of e4m3's may round either way; then a row moves by a part of a step.
        error = float((gpu[name].double() - want.double()).norm() / want.double().norm())
        assert error < (1e-5 if recipe == "fp32" else 5e-3), f"{name}: {error:.1e}"


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["bf16", "fp32"])
def test_repeats_bit_for_bit(recipe: str) -> None:
    case = replace(LARGE, recipe=recipe, kind="zipf", bias=True)
    first, again = run(case, 0, 1, None, "staged"), run(case, 0, 1, None, "staged")
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.gpu
def test_backward_never_waits_for_the_device() -> None:
    case = replace(LARGE, recipe="bf16", weight_dtype="bfloat16", bias=True)
    x, idx, topk_weights, grad_y = (t.cuda() for t in case.inputs(0, 1))
    w = case.local_weights(0, 1)
    parts = [t.requires_grad_() for t in (w.w13, w.w2, w.b13, w.b2) if t is not None]
    for strict in (False, True):  # the first round compiles and fills caches
        y = mega_moe(x, idx, topk_weights, ExpertWeights(*parts), problem=case.problem(1), engine="staged")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if strict else "default")
        try:
            torch.autograd.grad(y, parts, grad_y)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles(backend: str) -> None:
    case = replace(LARGE, recipe="bf16", tokens=(64,), bias=True)
    x, idx, topk_weights, _ = (t.cuda() for t in case.inputs(0, 1))
    weights, problem = case.local_weights(0, 1), case.problem(1)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return x + mega_moe(x * 0.5, idx, topk_weights, weights, problem=problem)

    torch._dynamo.reset()
    outcomes = []
    for call in (layer, torch.compile(layer, fullgraph=True, backend=backend)):
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        (grad,) = torch.autograd.grad(y.float().square().sum(), leaf)
        outcomes.append((y.detach(), grad))
    for eager, compiled in zip(*outcomes, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=2e-2, atol=2e-2)


# --- two GPUs ---


@pytest.fixture(scope="module", params=["nccl", "cpu:gloo,cuda:nccl", "gloo"])
def pool(request: pytest.FixtureRequest) -> Iterator[RankPool]:
    """Two ranks on two GPUs; with "gloo" alone rows travel through the CPU."""
    if request.param == "gloo":
        with RankPool(2, backend="gloo") as pool:
            pool.run(_take_a_gpu)
            yield pool
    else:
        with RankPool(2, backend=request.param) as pool:
            yield pool


def _take_a_gpu(rank: int, world_size: int, group: dist.ProcessGroup) -> None:
    torch.cuda.set_device(rank)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("recipe", ["bf16", "fp32"])
def test_staged_equals_reference_on_two(pool: RankPool, recipe: str) -> None:
    assert_same(pool, _cases(recipe))


@pytest.mark.multi_gpu
@pytest.mark.parametrize("name", ["x dtype", "idx too large", "topk_weights dtype", "too many tokens"])
def test_bad_arguments_raise_on_both(pool: RankPool, name: str) -> None:
    for alone, together, good in pool.run(attempts, name, replace(CASE, device="cuda")):
        for error in (alone, together):
            assert re.search(BAD[name][1], str(error))
        assert good is None


def _two_devices(rank: int, world_size: int, group: dist.ProcessGroup) -> list[str]:
    """On rank 1 the weights, then everything, lie on the CPU."""
    good, cpu = arguments(replace(CASE, device="cuda"), rank, world_size), arguments(CASE, rank, world_size)
    texts = []
    for bad in (good | {"weights": cpu["weights"]}, cpu):
        try:
            mega_moe(**(bad if rank else good), group=group)
        except ValueError as error:
            texts.append(str(error))
    mega_moe(**good, group=group)
    return texts


@pytest.mark.multi_gpu
def test_tensors_on_the_wrong_device_are_refused_on_both(pool: RankPool) -> None:
    for texts in pool.run(_two_devices):
        assert "w13 must be on cuda:1 like x, got cpu" in texts[0]
        assert re.search("device = 'cuda' on rank 0, 'cpu' on rank 1|x must be on a CUDA device.*, got cpu", texts[1])


def _killed(rank: int, world_size: int, group: dist.ProcessGroup) -> dict[str, Any]:
    case = replace(LARGE, recipe="bf16")
    for step in range(1000):
        begin = time.monotonic()
        if step == 3 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            run(case, rank, world_size, group, "staged")
        except PeerTimeout as error:
            a = torch.randn(256, 256, device="cuda")
            return {"error": str(error), "seconds": time.monotonic() - begin, "gemm": float((a @ a).abs().sum())}
    return {}


@pytest.mark.multi_gpu
@pytest.mark.parametrize("backend", ["nccl", "cpu:gloo,cuda:nccl"])
def test_a_killed_rank_is_named(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAMOE_TIMEOUT_S", "15")
    result, died = spawn_ranks(2, _killed, backend=backend)
    assert isinstance(died, RankDied)
    assert result["error"].startswith("rank 1 did not arrive in phase 'handshake' (its process has ended)"), result
    assert result["seconds"] < 16
    assert result["gemm"] > 0  # the GPU still computes
