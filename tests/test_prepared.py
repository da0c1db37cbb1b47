"""Prepared weights hold the reference engine's numbers in the documented shapes, and refuse what does not fit."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from megamoe.activation import Activation
from megamoe.engines.recipes import round_weight
from megamoe.prepared import PreparedWeights
from megamoe.problem import Problem
from megamoe.weights import ExpertWeights

RECIPES = ("bf16", "fp8_block", "fp8_row", "mxfp4")
H, I, S = 136, 200, 3  # noqa: E741 - neither a multiple of 128 nor of 32


def problem(recipe: Any, **changes: Any) -> Problem:
    return Problem(hidden=H, intermediate=I, num_experts=S, top_k=2, recipe=recipe, **changes)


def weights(p: Problem, dtype: torch.dtype = torch.float32) -> ExpertWeights:
    generator = torch.Generator().manual_seed(5)
    shapes = [(S, p.w13_rows, H), (S, H, I), *([(S, p.w13_rows), (S, H)] if p.bias else [])]
    return ExpertWeights(*(torch.randn(shape, generator=generator).to(dtype) for shape in shapes))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_those_of_the_reference_engine(recipe: Any, activation: Any, dtype: torch.dtype) -> None:
    p = problem(recipe, activation=Activation(activation), bias=True)
    w = weights(p, dtype)
    prepared = PreparedWeights.from_float(w, p)
    prepared.check(p, S)
    back = prepared.dequantise()
    assert back.b13 is not None and w.b13 is not None and back.b2 is not None and w.b2 is not None
    assert torch.equal(back.w13, round_weight(w.w13.float(), p, stacked=True))
    assert torch.equal(back.w2, round_weight(w.w2.float(), p, stacked=False))
    assert torch.equal(back.b13, w.b13.float()) and torch.equal(back.b2, w.b2.float())
    again = PreparedWeights.from_float(back, p)
    assert torch.equal(again.dequantise().w13, back.w13)


def test_shapes_are_the_documented_ones() -> None:
    def shapes(recipe: Any, **changes: Any) -> dict[str, tuple[int, ...]]:
        p = problem(recipe, **changes)
        return {name: tuple(t.shape) for name, t in PreparedWeights.from_float(weights(p), p).tensors().items()}

    plain = {"w13": (S, 2 * I, H), "w2": (S, H, I)}
    assert shapes("bf16") == plain
    assert shapes("fp8_block") == plain | {"w13_scale": (S, 4, 2), "w2_scale": (S, 2, 2)}
    assert shapes("fp8_row") == plain | {"w13_scale": (S, 2 * I), "w2_scale": (S, H)}
    packed = {"w13": (S, 2 * I, H // 2), "w2": (S, H, I // 2), "w13_scale": (S, 2 * I, 5), "w2_scale": (S, H, 7)}
    assert shapes("mxfp4", bias=True) == packed | {"b13": (S, 2 * I), "b2": (S, H)}
    p = problem("mxfp4")
    assert PreparedWeights.from_float(weights(p), p).num_bytes == sum(torch.Size(s).numel() for s in packed.values())


def test_blocks_restart_at_the_boundary_of_gate_and_up() -> None:
    p = problem("fp8_block")
    w = weights(p)
    w.w13[:, I] *= 1000  # the first up row: no gate row may see its scale
    prepared = PreparedWeights.from_float(w, p)
    assert prepared.w13_scale is not None
    assert (prepared.w13_scale[:, 2] > 100 * prepared.w13_scale[:, :2].amax(1)).all()


def test_least_error_scales_are_no_worse() -> None:
    p = problem("mxfp4")
    w = weights(p)
    ceil, least = (PreparedWeights.from_float(w, p, mxfp4_scales=choice) for choice in ("ceil", "least_error"))  # type: ignore[arg-type]
    errors = [float((prepared.dequantise().w13 - w.w13).square().sum()) for prepared in (ceil, least)]
    assert errors[1] < 0.98 * errors[0]


@pytest.mark.parametrize(
    ("recipe", "changes", "sentence"),
    [
        (
            "fp8_block",
            {"w13": torch.float32},
            "w13 of recipe fp8_block must be torch.float8_e4m3fn with 3 dim.*float32",
        ),
        (
            "fp8_block",
            {"w13_scale": (S, 4, 1)},
            r"w13_scale must be torch.float32 \(3, 4, 2\) on cpu, got .*\(3, 4, 1\)",
        ),
        ("fp8_block", {"w13_scale": None}, r"recipe fp8_block needs w13_scale \(3, 4, 2\), got None"),
        ("fp8_row", {"w2_scale": torch.bfloat16}, r"w2_scale must be torch.float32 \(3, 136\).*bfloat16"),
        ("mxfp4", {"w2_scale": torch.int8}, "w2_scale must be torch.uint8.*int8"),
        ("bf16", {"w2_scale": (S, 1, 1)}, r"recipe bf16 has no scales, got w2_scale \(3, 1, 1\)"),
        ("bf16", {"w2": (S, H + 8, I)}, r"w2 must have shape \(3, 136, ...\) to fit w13, got \(3, 144, 200\)"),
        ("bf16", {"w13": (S, I + 8, H)}, "I or 2I rows for the I = 200 columns of w2, got 208"),
        ("bf16", {"b13": (S, 2 * I)}, "b13 and b2 must be given together"),
        ("bf16", {"b13": (S, 2 * I), "b2": (S, I)}, r"b2 must be torch.float32 \(3, 136\) on cpu, got"),
        ("fp4", {}, "prepared for bf16, fp8_block, fp8_row, mxfp4, got recipe 'fp4'"),
    ],
)
def test_what_does_not_fit_is_refused(recipe: Any, changes: dict[str, Any], sentence: str) -> None:
    known = recipe if recipe in RECIPES else "bf16"
    prepared = PreparedWeights.from_float(weights(problem(known)), problem(known))
    changed: dict[str, Any] = {"recipe": recipe}
    for name, change in changes.items():
        tensor = getattr(prepared, name)
        if isinstance(change, torch.dtype):
            changed[name] = tensor.to(change)
        elif isinstance(change, tuple):
            changed[name] = torch.zeros(change, dtype=torch.float32 if tensor is None else tensor.dtype)
        else:
            changed[name] = None
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(prepared, **changed)


def test_another_problem_is_refused() -> None:
    p = problem("fp8_row")
    prepared = PreparedWeights.from_float(weights(p), p)
    for other, sentence in (
        (problem("bf16"), "recipe bf16 .*got fp8_row"),
        (problem("fp8_row", bias=True), "bias True .*got False"),
        (problem("fp8_row", activation=Activation("relu2")), "stacked in w13 1 .*got 2"),
        (dataclasses.replace(p, hidden=H + 8), "hidden 144 .*got 136"),
    ):
        with pytest.raises(ValueError, match=sentence):
            prepared.check(other, S)
    with pytest.raises(ValueError, match=r"number of experts 4 .*got 3"):
        prepared.check(p, 4)
    with pytest.raises(ValueError, match="got recipe 'fp32'"):
        PreparedWeights.from_float(weights(problem("fp32")), problem("fp32"))


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_cuda_gives_the_same_bits(recipe: Any) -> None:
    p = problem(recipe, bias=True)
    w = weights(p, torch.bfloat16)
    here = PreparedWeights.from_float(w, p)
    on_gpu = ExpertWeights(*(None if t is None else t.cuda() for t in (w.w13, w.w2, w.b13, w.b2)))  # type: ignore[arg-type]
    there = PreparedWeights.from_float(on_gpu, p)
    for name, tensor in here.tensors().items():
        other = there.tensors()[name]
        assert torch.equal(other.cpu().view(torch.uint8), tensor.view(torch.uint8)), name
        moved = here.to("cuda").tensors()[name]
        assert torch.equal(moved.cpu().view(torch.uint8), tensor.view(torch.uint8)), name
        if tensor.dtype == torch.float8_e4m3fn:
            assert other.stride(1) % 16 == 0 and moved.stride(1) % 16 == 0
