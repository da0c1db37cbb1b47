"""Checkpoints with the real names, dtypes and scale conventions, made from raw bits, and their numbers by other means.

Nothing here uses the code under test: codes are drawn, and weights follow from tables and loops over blocks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
H, I, E, LAYERS = 160, 192, 4, 2  # noqa: E741 - 160 and 192 are no multiples of 128
FORMATS = ("bf16", "fp8_block", "deepseek_v4", "modelopt_nvfp4", "compressed_nvfp4", "compressed_mxfp4", "gpt_oss")
INDEX = "model.safetensors.index.json"


@dataclass
class Generated:
    """``tensors`` by file, and the weights: {(layer, expert, gate | up | down): fp64 [N, K]}."""

    files: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    weights: dict[tuple[int, int, str], torch.Tensor] = field(default_factory=dict)
    biases: dict[tuple[int, int, str], torch.Tensor] = field(default_factory=dict)

    def save(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        where = {}
        for file, tensors in self.files.items():
            save_file(tensors, folder / file, {"format": "pt"})
            where |= dict.fromkeys(tensors, file)
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
        (folder / "config.json").write_text('{"model_type": "generated"}')
        return folder


def prefix(name: str, layer: int) -> str:
    """Of the experts' names, as the models of that format have them."""
    return f"model.layers.{layer}.{'ffn.' if name == 'deepseek_v4' else 'mlp.'}"


def projections(name: str, *, mixtral: bool = False) -> tuple[str, str, str]:
    return ("w1", "w3", "w2") if name == "deepseek_v4" or mixtral else ("gate_proj", "up_proj", "down_proj")


def generate(name: str, *, mixtral: bool = False, seed: int = 0, scale_dtype: torch.dtype = torch.float32) -> Generated:
    """A model of two layers; one file an expert (gpt-oss: one a layer), one file with everything else."""
    generator = torch.Generator().manual_seed(seed)
    made = Generated()
    made.files["other.safetensors"] = {
        "model.embed_tokens.weight": torch.randn(32, H, generator=generator).bfloat16(),
        "model.layers.0.mlp.gate.weight": torch.randn(E, H, generator=generator),
        "model.layers.0.mlp.shared_experts.gate_proj.weight": torch.randn(I, H, generator=generator).bfloat16(),
    }
    for layer in range(LAYERS):
        if name == "gpt_oss":
            _gpt_oss(made, layer, generator)
            continue
        stem = f"model.layers.{layer}.block_sparse_moe." if mixtral else prefix(name, layer)
        for expert in range(E):
            tensors: dict[str, torch.Tensor] = {}
            for kind, projection in zip(("gate", "up", "down"), projections(name, mixtral=mixtral), strict=True):
                shape = (H, I) if kind == "down" else (I, H)
                parts, weight = one_matrix(name, shape, generator, scale_dtype)
                tensors |= {f"{stem}experts.{expert}.{projection}.{suffix}": t for suffix, t in parts.items()}
                made.weights[layer, expert, kind] = weight
            made.files[f"layer{layer}-expert{expert}.safetensors"] = tensors
    return made


def one_matrix(
    name: str, shape: tuple[int, int], generator: torch.Generator, scale_dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """({suffix: tensor}, fp64 [N, K])."""
    N, K = shape
    if name == "bf16":
        w = (torch.randn(shape, generator=generator) * 0.05).bfloat16()
        return {"weight": w}, w.double()
    if name == "fp8_block":
        q = (torch.randn(shape, generator=generator) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
        blocks = (-(-N // 128), -(-K // 128))
        scale = (torch.rand(blocks, generator=generator) * 1e-3 + 1e-4).to(scale_dtype)
        w = q.double()
        for a in range(blocks[0]):
            for b in range(blocks[1]):
                w[a * 128 : a * 128 + 128, b * 128 : b * 128 + 128] *= scale[a, b].double()
        return {"weight": q, "weight_scale_inv": scale}, w
    packed, values = codes(shape, generator)
    if name in ("deepseek_v4", "compressed_mxfp4"):
        exponent = torch.randint(118, 124, (N, K // 32), generator=generator).to(torch.uint8)
        w = values * torch.exp2(exponent.double() - 127).repeat_interleave(32, 1)
        if name == "deepseek_v4":
            return {"weight": packed.view(torch.int8), "scale": exponent.view(torch.float8_e8m0fnu)}, w
        return {"weight_packed": packed, "weight_scale": exponent}, w
    scale8 = (torch.rand(N, K // 16, generator=generator) * 300 + 50).to(torch.float8_e4m3fn)
    spread = scale8.double().repeat_interleave(16, 1)
    if name == "modelopt_nvfp4":
        factor = torch.rand((), generator=generator) * 1e-4 + 1e-5
        w = values * spread * factor.double()
        extra = {"weight_scale_2": factor, "input_scale": torch.tensor(0.01)}
        return {"weight": packed, "weight_scale": scale8, **extra}, w
    assert name == "compressed_nvfp4"
    divisor = torch.rand(1, generator=generator) * 1e4 + 1e3
    w = values * spread / divisor.double()
    extra = {"weight_global_scale": divisor, "input_global_scale": torch.tensor([100.0])}
    return {"weight_packed": packed, "weight_scale": scale8, **extra}, w


def codes(shape: tuple[int, ...], generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(packed uint8 [..., K / 2], low nibble = even k; fp64 values [..., K])."""
    drawn = torch.randint(0, 16, shape, generator=generator)
    packed = (drawn[..., 0::2] + 16 * drawn[..., 1::2]).to(torch.uint8)
    return packed, E2M1[drawn].double()


def _gpt_oss(made: Generated, layer: int, generator: torch.Generator) -> None:
    stem = f"{prefix('gpt_oss', layer)}experts."
    tensors: dict[str, torch.Tensor] = {}
    for part, rows, columns in (("gate_up_proj", 2 * I, H), ("down_proj", H, I)):
        packed, values = codes((E, rows, columns), generator)
        scales = torch.randint(118, 124, (E, rows, columns // 32), generator=generator).to(torch.uint8)
        bias = torch.randn(E, rows, generator=generator).bfloat16()
        tensors[f"{stem}{part}_blocks"] = packed.reshape(E, rows, columns // 32, 16)
        tensors[f"{stem}{part}_scales"] = scales
        tensors[f"{stem}{part}_bias"] = bias
        w = values * torch.exp2(scales.double() - 127).repeat_interleave(32, -1)
        for expert in range(E):
            if part == "down_proj":
                made.weights[layer, expert, "down"] = w[expert]
                made.biases[layer, expert, "down"] = bias[expert]
            else:
                for kind, k in (("gate", 0), ("up", 1)):
                    made.weights[layer, expert, kind] = w[expert, k::2]
                    made.biases[layer, expert, kind] = bias[expert, k::2]
    made.files[f"layer{layer}.safetensors"] = tensors
