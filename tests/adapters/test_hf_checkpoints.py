"""Checkpoints of gpt-oss (MXFP4) and DeepSeek-V3 (block FP8), converted and run, against transformers' own modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers; .ci/client_transformers runs these tests")

from megamoe.activation import Activation
from megamoe.functional import mega_moe
from megamoe.pretrained import PretrainedExperts, convert
from megamoe.problem import Problem
from megamoe.testing.numerics import difference
from tests.pretrained.generated import E, Generated, H, I, generate

TOKENS, TOP_K = 40, 2


def routed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(TOKENS, H, generator=generator).bfloat16()
    index = torch.stack([torch.randperm(E, generator=generator)[:TOP_K] for _ in range(TOKENS)])
    return x, index, torch.rand(TOKENS, TOP_K, generator=generator)


def tensors(made: Generated) -> dict[str, torch.Tensor]:
    return {name: t for file in made.files.values() for name, t in file.items()}


def gpt_oss(made: Generated) -> Any:
    """transformers' module, its weights unpacked by transformers' own function."""
    from transformers import GptOssConfig
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    module = GptOssExperts(GptOssConfig(hidden_size=H, intermediate_size=I, num_local_experts=E)).float()
    found = tensors(made)
    stem = "model.layers.1.mlp.experts."
    with torch.no_grad():
        for part in ("gate_up_proj", "down_proj"):
            blocks, scales = (found[f"{stem}{part}_{suffix}"] for suffix in ("blocks", "scales"))
            getattr(module, part).copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
            getattr(module, f"{part}_bias").copy_(found[f"{stem}{part}_bias"])
    return module


def deepseek_v3(made: Generated) -> Any:
    """transformers' module, its weights dequantised block by block."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

    config = DeepseekV3Config(hidden_size=H, moe_intermediate_size=I, n_routed_experts=E, num_local_experts=E)
    module = DeepseekV3Experts(config).float()
    with torch.no_grad():
        for e in range(E):
            module.gate_up_proj[e].copy_(torch.cat([made.weights[1, e, kind] for kind in ("gate", "up")]))
            module.down_proj[e].copy_(made.weights[1, e, "down"])
    return module


CASES = {
    "gpt_oss": (gpt_oss, Activation("swiglu_clamped"), True),
    "fp8_block": (deepseek_v3, Activation(), False),
}


@pytest.mark.parametrize(
    ("source", "through", "recipe", "bound"),
    [
        # Weights are exact: what is left is the rounding of activations (bf16, or e4m3 with a scale per 128) and y.
        ("gpt_oss", None, "mxfp4", 2e-3),
        ("gpt_oss", None, "bf16", 5e-5),
        ("gpt_oss", "fp8_block", "fp8_block", 2e-3),
        ("gpt_oss", "deepseek_v4", "mxfp4", 2e-3),
        ("fp8_block", None, "fp8_block", 2e-3),
        ("fp8_block", None, "bf16", 1e-4),
        # One rounding of the weights to E2M1 more.
        ("fp8_block", "mxfp4", "mxfp4", 3e-2),
    ],
)
def test_converted_and_run(source: str, through: str | None, recipe: Any, bound: float, tmp_path: Path) -> None:
    build, activation, bias = CASES[source]
    made = generate(source)
    folder = made.save(tmp_path / "published")
    if through is not None:
        convert(folder, tmp_path / "converted", through)
        folder = tmp_path / "converted"
    x, index, weights = routed()
    problem = Problem(
        hidden=H, intermediate=I, num_experts=E, top_k=TOP_K, recipe=recipe, activation=activation, bias=bias
    )
    with PretrainedExperts(folder) as experts:
        prepared, _ = experts.prepared(experts.layers[1], problem)
    y = mega_moe(x, index, weights, prepared.dequantise(), problem=problem, engine="reference")
    with torch.no_grad():
        expected = build(made)(x.float(), index, weights)
    assert difference(y, expected) < bound
