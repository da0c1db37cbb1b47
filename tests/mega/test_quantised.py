"""x that comes in e4m3 with scales: its form, what is refused, machine code, and y."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megamoe.kernels.jit.sweep import Case as Kernel
from megamoe.kernels.jit.sweep import sweep
from megamoe.kernels.quant import reference as casts
from megamoe.kernels.quant.layouts import empty_scales
from megamoe.mega.checks import check_call
from megamoe.mega.kernels import SPILLS
from megamoe.mega.runner import config_for
from megamoe.mega.tokens import QuantisedTokens
from megamoe.prepared import PreparedWeights
from megamoe.problem import Problem
from megamoe.testing import routing
from tests.engines.cases import Case
from tests.mega.problems import BASE, Given, Layer, Virtual

RECIPES = ("fp8_block", "fp8_row")
CPU = torch.device("cpu")


def drawn(T: int, hidden: int, recipe: str, *, seed: int, sm90: bool = False) -> QuantisedTokens:
    """Tokens as no cast of ours gives them: any codes, any scales; with ``sm90`` in that layout, rows far apart."""
    g = torch.Generator().manual_seed(seed)
    codes = (torch.randn(T, hidden, generator=g) * 100).clamp(-448, 448)
    scales = torch.rand(T, 1 if recipe == "fp8_row" else -(-hidden // 128), generator=g) / 50 + 1e-3
    wide = torch.zeros(T, -(-hidden // 16) * 16 + (48 if sm90 else 0), dtype=torch.uint8)
    values = wide[:, :hidden].view(torch.float8_e4m3fn)
    values.copy_(codes.to(torch.float8_e4m3fn))
    if sm90:
        laid_out = empty_scales(tuple(scales.shape), "sm90", CPU)
        scales = laid_out.copy_(scales)
    return QuantisedTokens(values, scales)


def on_gpu(tokens: QuantisedTokens) -> QuantisedTokens:
    """The same strides there."""

    def moved(t: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda").copy_(t)

    return QuantisedTokens(moved(tokens.values), moved(tokens.scales))


@pytest.mark.parametrize("hidden", [8, 136, 256])
def test_casts_are_the_recipes(hidden: int) -> None:
    x = torch.randn(5, hidden, generator=torch.Generator().manual_seed(2)).bfloat16()
    block, row = (QuantisedTokens.cast(x, recipe) for recipe in RECIPES)  # type: ignore[arg-type]
    assert torch.equal(block.dequantise(), casts.dequantise_1x128(*casts.cast_1x128(x)))
    assert torch.equal(row.dequantise(), casts.dequantise_row(*casts.cast_row(x)))
    assert row.scales.shape == (5, 1)
    with pytest.raises(ValueError, match="fp8_block or fp8_row, got recipe 'bf16'"):
        QuantisedTokens.cast(x, "bf16")


def arguments(recipe: str) -> tuple[Problem, PreparedWeights, torch.Tensor, torch.Tensor]:
    case = Case(recipe=recipe, hidden=136, intermediate=24, tokens=(6,))
    _, idx, topk_weights, _ = case.inputs(0, 1)
    problem = case.problem(1)
    return problem, PreparedWeights.from_float(case.local_weights(0, 1), problem), idx, topk_weights


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_does_not_fit_is_refused(recipe: str) -> None:
    problem, weights, idx, topk_weights = arguments(recipe)

    def check(x: object) -> int:
        return check_call(x, idx, topk_weights, weights, problem=problem, slots=8, device=CPU)  # type: ignore[arg-type]

    good = drawn(6, 136, recipe, seed=0)
    assert check(good) == check(drawn(6, 136, recipe, seed=0, sm90=True)) == 6
    blocks = 1 if recipe == "fp8_row" else 2
    packed = torch.empty(6, 136, dtype=torch.uint8).view(torch.float8_e4m3fn)
    for bad, text in (
        (replace(good, values=good.values.float()), r"values of x must be e4m3 \[tokens, 136\].*torch.float32"),
        (replace(good, values=good.values[:, :128]), r"e4m3 \[tokens, 136\].*\(6, 128\)"),
        (replace(good, values=good.values[0]), r"e4m3 \[tokens, 136\].*\(136,\)"),
        (replace(good, values=packed), r"start on 16 bytes, got .*\(136, 1\)"),
        (replace(good, scales=good.scales.double()), rf"scales of x must be fp32 \(6, {blocks}\).*float64"),
        (replace(good, scales=good.scales[:5]), rf"fp32 \(6, {blocks}\) on cpu.*got torch.float32 \(5, {blocks}\)"),
        (replace(good, scales=torch.ones(6, 3)), rf"fp32 \(6, {blocks}\).*\(6, 3\)"),
        (drawn(65, 136, recipe, seed=0), "x has 65 tokens, but problem.max_tokens is 64"),
        (drawn(5, 136, recipe, seed=0), r"topk_idx must be \(5, 2\)"),
        (good.values, r"x must be bf16 \[tokens, 136\].*float8"),
        (torch.zeros(6, 136), r"x must be bf16 .*got torch.float32"),
    ):
        with pytest.raises(ValueError, match=text):
            check(bad)
    with pytest.raises(ValueError, match="for the recipes fp8_block and fp8_row, not bf16"):
        good.check(136, "bf16")


@pytest.mark.parametrize("recipe", RECIPES)
def test_machine_code_is_fit(recipe: str) -> None:
    config = config_for(replace(BASE, recipe=recipe).problem(2), 8, index_64=True)
    config, cast = replace(config, quantised=True), config
    assert config.name != cast.name
    (verdict,) = sweep([Kernel(config.source(), needs=("QGMMA", "UTMALDG"), spills=SPILLS[recipe])])
    assert verdict.faults == ()


def quantised(given: list[Given], recipe: str) -> list[Given]:
    return [replace(g, x=QuantisedTokens.cast(g.x, recipe)) for g in given]  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_tokens_cast_before_give_the_same_bits(recipe: str, world_size: int) -> None:
    layer = Layer(replace(BASE, recipe=recipe), world_size)
    with Virtual(layer) as ranks:
        for turn, kind in enumerate(routing.KINDS):
            given = layer.all_given(seed=turn, kind=kind)
            want = ranks.call(given, kind)
            outs = [torch.full_like(g.x, torch.nan) for g in given]
            ranks.launch(quantised(given, recipe), outs=outs)
            torch.cuda.synchronize()
            for runner, y, out in zip(ranks.runners, want, outs, strict=True):
                runner.check()
                assert torch.equal(y, out), kind


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("hidden", [8, 136, 256, 1032])
def test_any_codes_and_scales(recipe: str, hidden: int) -> None:
    layer = Layer(replace(BASE, recipe=recipe, hidden=hidden), 2)
    with Virtual(layer) as ranks:
        for turn, kind in enumerate(("balanced", "zipf", "masked")):
            given = layer.all_given(seed=turn, kind=kind)
            tokens = [
                replace(g, x=on_gpu(drawn(len(g.x), hidden, recipe, seed=9 * turn + r, sm90=turn > 0)))
                for r, g in enumerate(given)
            ]
            outs = [torch.full_like(g.x, torch.nan) for g in given]
            ranks.finish(tokens, ranks.launch(tokens, outs=outs), f"H {hidden}, {kind}")
