"""Every format of published experts is read to the numbers it means, and nothing but this rank's experts is read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megamoe.activation import Activation
from megamoe.dispatch.placement import Placement
from megamoe.functional import mega_moe
from megamoe.prepared import PreparedWeights
from megamoe.pretrained import PretrainedExperts
from megamoe.problem import Problem
from megamoe.testing.numerics import difference
from tests.pretrained.generated import FORMATS, E, Generated, H, I, generate

RECIPES = ("bf16", "fp8_block", "fp8_row", "mxfp4")


def problem(name: str = "bf16", **changes: Any) -> Problem:
    sizes = Problem(hidden=H, intermediate=I, num_experts=E, top_k=2, bias=name == "gpt_oss")
    return dataclasses.replace(sizes, **changes)


def stacked(made: Generated, layer: int, experts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 (w13 [S, 2I, H], w2 [S, H, I]) of the generated numbers."""
    w13 = torch.stack([torch.cat([made.weights[layer, e, k] for k in ("gate", "up")]) for e in experts])
    return w13.float(), torch.stack([made.weights[layer, e, "down"] for e in experts]).float()


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_are_what_the_format_says(name: str, tmp_path: Path) -> None:
    made = generate(name)
    with PretrainedExperts(made.save(tmp_path)) as experts:
        assert [layer.format_name for layer in experts.layers] == [name, name]
        for number, layer in enumerate(experts.layers):
            assert (layer.num_experts, layer.bias) == (E, name == "gpt_oss")
            assert layer.sizes(experts.files) == (H, I)
            weights = experts.floating(layer, problem(name), dtype=torch.float32)
            w13, w2 = stacked(made, number, list(range(E)))
            assert torch.equal(weights.w13, w13) and torch.equal(weights.w2, w2)
            if name == "gpt_oss":
                assert weights.b13 is not None and weights.b2 is not None
                for e in range(E):
                    both = torch.cat([made.biases[number, e, kind] for kind in ("gate", "up")])
                    assert torch.equal(weights.b13[e], both.float())
                    assert torch.equal(weights.b2[e], made.biases[number, e, "down"].float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_come_in_any_float(dtype: torch.dtype, tmp_path: Path) -> None:
    made = generate("fp8_block", scale_dtype=dtype)
    with PretrainedExperts(made.save(tmp_path)) as experts:
        weights = experts.floating(experts.layers[1], problem(), dtype=torch.float32)
        assert torch.equal(weights.w13, stacked(made, 1, list(range(E)))[0])


def test_mixtral_names(tmp_path: Path) -> None:
    made = generate("bf16", mixtral=True)
    with PretrainedExperts(made.save(tmp_path)) as experts:
        assert experts.layers[0].naming == "w123"
        weights = experts.floating(experts.layers[0], problem())
        assert torch.equal(weights.w13.float(), stacked(made, 0, list(range(E)))[0])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_any_format_to_any_recipe(name: str, recipe: Any, tmp_path: Path) -> None:
    p = problem(name, recipe=recipe)
    made = generate(name)
    with PretrainedExperts(made.save(tmp_path)) as experts:
        weights, report = experts.prepared(experts.layers[0], p)
    weights.check(p, E)
    back, (w13, w2) = weights.dequantise(), stacked(made, 0, list(range(E)))
    is_mxfp4 = name in ("deepseek_v4", "compressed_mxfp4", "gpt_oss")
    if is_mxfp4 or (name, recipe) in {("bf16", "bf16"), ("fp8_block", "fp8_block")}:
        assert torch.equal(back.w13, w13) and torch.equal(back.w2, w2)
        assert report.total == 0 and report.num_exact == 3 * E
    else:
        masters = dataclasses.replace(experts_of(w13, w2), b13=back.b13, b2=back.b2)
        rounded = PreparedWeights.from_float(masters, p).dequantise()
        assert difference(back.w13, w13) <= 1.001 * difference(rounded.w13, w13)
        assert 0 < report.total < {"bf16": 3e-3, "fp8_block": 4e-2, "fp8_row": 4e-2, "mxfp4": 0.2}[recipe]
        measured = (back.w13 - w13).double().square().sum() + (back.w2 - w2).double().square().sum()
        norm = w13.double().square().sum() + w2.double().square().sum()
        assert report.total == pytest.approx(float((measured / norm).sqrt()), rel=1e-6)


def experts_of(w13: torch.Tensor, w2: torch.Tensor) -> Any:
    from megamoe.weights import ExpertWeights

    return ExpertWeights(w13, w2)


def test_same_form_keeps_the_same_bits(tmp_path: Path) -> None:
    made = generate("fp8_block")
    with PretrainedExperts(made.save(tmp_path)) as experts:
        weights, _ = experts.prepared(experts.layers[0], problem(recipe="fp8_block"))
    tensors = {name: t for file in made.files.values() for name, t in file.items()}
    stem = "model.layers.0.mlp.experts.2"
    assert weights.w13_scale is not None
    for k, kind in enumerate(("gate_proj", "up_proj")):
        rows = slice(k * I, (k + 1) * I)
        assert torch.equal(weights.w13[2, rows].view(torch.uint8), tensors[f"{stem}.{kind}.weight"].view(torch.uint8))
        assert torch.equal(weights.w13_scale[2, 2 * k : 2 * k + 2], tensors[f"{stem}.{kind}.weight_scale_inv"])


def test_powers_of_two_are_exact_in_bf16(tmp_path: Path) -> None:
    made = generate("fp8_block")
    for file in made.files.values():
        for key in [k for k in file if k.endswith("scale_inv")]:
            file[key] = torch.exp2(file[key].log2().round())
    with PretrainedExperts(made.save(tmp_path)) as experts:
        _, bf16 = experts.prepared(experts.layers[0], problem(recipe="bf16"))
        _, row = experts.prepared(experts.layers[0], problem(recipe="fp8_row"))
    assert bf16.total == 0 and bf16.num_exact == 3 * E
    assert row.total < 0.04, "blocks of a row may lie too far apart"


def test_least_error_scales(tmp_path: Path) -> None:
    p = problem(recipe="mxfp4")
    with PretrainedExperts(generate("bf16").save(tmp_path)) as experts:
        totals = [
            experts.prepared(experts.layers[0], p, mxfp4_scales=choice)[1].total for choice in ("ceil", "least_error")
        ]
    assert totals[1] < 0.99 * totals[0]


def test_mxfp4_that_spreads_too_far_for_e4m3_is_rounded_and_reported(tmp_path: Path) -> None:
    made = generate("deepseek_v4")
    scale = made.files["layer0-expert1.safetensors"]["model.layers.0.ffn.experts.1.w1.scale"]
    scale.view(torch.uint8)[5, 0] = 60  # 60 octaves below its neighbours: one block of one matrix
    with PretrainedExperts(made.save(tmp_path)) as experts:
        _, report = experts.prepared(experts.layers[0], problem(recipe="fp8_block"))
    inexact = [error.name for error in report.errors if error.largest]
    assert inexact == ["model.layers.0.ffn.experts.1.gate"]
    assert report.num_exact == 3 * E - 1


@pytest.mark.parametrize("name", ["bf16", "compressed_nvfp4"])
def test_only_the_files_of_this_ranks_experts_are_opened(name: str, tmp_path: Path) -> None:
    made = generate(name)
    folder = made.save(tmp_path)
    placement = Placement(torch.tensor([[1, 3, 0], [2, 0, 1]]))  # 0 and 1 have copies
    for file in folder.glob("*.safetensors"):
        if file.name not in {f"layer1-expert{e}.safetensors" for e in (2, 0, 1)}:
            file.write_bytes(b"not to be read")
    with PretrainedExperts(folder) as experts:
        p = problem(world_size=2)
        weights, report = experts.prepared(experts.layers[1], p, rank=1, placement=placement)
        assert [error.name.split(".")[-2] for error in report.errors[::3]] == ["2", "0", "1"]
        assert torch.equal(weights.w13.float(), stacked(made, 1, [2, 0, 1])[0].bfloat16().float())
        with pytest.raises(ValueError, match=r"layer1-expert3\.safetensors"):
            experts.prepared(experts.layers[1], p, rank=0, placement=placement)


def test_contiguous_ranks_of_a_stacked_file(tmp_path: Path) -> None:
    made = generate("gpt_oss")
    with PretrainedExperts(made.save(tmp_path)) as experts:
        weights = experts.floating(experts.layers[0], problem("gpt_oss", world_size=2), rank=1, dtype=torch.float32)
    assert torch.equal(weights.w13, stacked(made, 0, [2, 3])[0])


def test_one_file_without_an_index(tmp_path: Path) -> None:
    made = generate("bf16")
    everything = {name: t for file in made.files.values() for name, t in file.items()}
    save_file(everything, tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with PretrainedExperts(path) as experts:
            assert len(experts.layers) == 2
            assert experts.read(experts.layers[1], 3).biases is None


@pytest.mark.parametrize(
    ("name", "recipe", "activation", "bound"),
    [
        ("gpt_oss", "mxfp4", Activation("swiglu_clamped"), 2e-3),
        ("gpt_oss", "fp8_block", Activation("swiglu_clamped"), 2e-3),
        ("fp8_block", "fp8_block", Activation(), 2e-3),
        ("fp8_block", "bf16", Activation(), 1e-4),
    ],
)
def test_a_layer_runs_as_its_own_formula_says(
    name: str, recipe: Any, activation: Activation, bound: float, tmp_path: Path
) -> None:
    """Prepared, then run by the engine: within the error of activations and results of the recipe, in d."""
    p = problem(name, recipe=recipe, activation=activation)
    made = generate(name)
    with PretrainedExperts(made.save(tmp_path)) as experts:
        weights, _ = experts.prepared(experts.layers[0], p)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(24, H, generator=generator).bfloat16()
    idx = torch.stack([torch.randperm(E, generator=generator)[:2] for _ in range(24)])
    gates = torch.rand(24, 2, generator=generator)
    y = mega_moe(x, idx, gates, weights.dequantise(), problem=p, engine="reference")
    expected = torch.zeros(24, H, dtype=torch.float64)
    for t in range(24):
        for k in range(2):
            e, row = int(idx[t, k]), x[t].double()
            parts = [made.weights[0, e, kind] @ row for kind in ("gate", "up")]
            if name == "gpt_oss":
                parts = [part + made.biases[0, e, kind] for part, kind in zip(parts, ("gate", "up"), strict=True)]
                gate, up = parts[0].clamp(max=7.0), parts[1].clamp(-7.0, 7.0)
                hidden = gate * torch.sigmoid(1.702 * gate) * (up + 1)
            else:
                hidden = parts[0] * torch.sigmoid(parts[0]) * parts[1]
            out = made.weights[0, e, "down"] @ hidden
            if name == "gpt_oss":
                out = out + made.biases[0, e, "down"]
            expected[t] += gates[t, k].double() * out
    assert difference(y, expected) < bound


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_on_a_gpu_the_same_bits(name: str, recipe: Any, tmp_path: Path) -> None:
    p = problem(name, recipe=recipe)
    with PretrainedExperts(generate(name).save(tmp_path)) as experts:
        here, _ = experts.prepared(experts.layers[0], p)
        there, report = experts.prepared(experts.layers[0], p, device="cuda")
        masters = experts.floating(experts.layers[0], p, device="cuda", dtype=torch.float32)
    assert there.w13.is_cuda and masters.w13.is_cuda and len(report.errors) == 3 * E
    for key, tensor in there.tensors().items():
        assert torch.equal(tensor.cpu().view(torch.uint8), here.tensors()[key].view(torch.uint8)), key
