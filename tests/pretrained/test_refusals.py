"""Broken checkpoints end in one sentence that names tensor and file, and the next correct call works."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megamoe.pretrained import PretrainedExperts
from megamoe.problem import Problem
from tests.pretrained.generated import INDEX, E, Generated, H, I, generate

STEM = "model.layers.0.mlp.experts.1"
FILE = "layer0-expert1.safetensors"
PROBLEM = Problem(hidden=H, intermediate=I, num_experts=E, top_k=2, recipe="fp8_block")


def load(folder: Path, problem: Problem = PROBLEM) -> None:
    with PretrainedExperts(folder) as experts:
        experts.prepared(experts.layers[0], problem)


def change(name: str, edit: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Generated], None]:
    def apply(made: Generated) -> None:
        for file in made.files.values():
            if name in file:
                edited = edit(file.pop(name))
                if edited is not None:
                    file[name] = edited
                return
        raise AssertionError(name)

    return apply


def drop(tensor: torch.Tensor) -> None:
    return None


def put(index: tuple[int, ...], code: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def edit(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(torch.uint8)[index] = code
        return tensor

    return edit


BROKEN: dict[str, tuple[str, Callable[[Generated], None], str]] = {
    "weight misshapen": (
        "fp8_block",
        change(f"{STEM}.up_proj.weight", lambda t: t[:-1].contiguous()),
        rf"{STEM}\.gate_proj\.\* of 192 x 160 needs {STEM}\.up_proj\.\* of the same shape.* got 191 x 160",
    ),
    "scale misshapen": (
        "fp8_block",
        change(f"{STEM}.down_proj.weight_scale_inv", lambda t: t[:1].contiguous()),
        rf"{STEM}\.down_proj\.weight_scale_inv in {FILE} must have shape \(2, 2\) for a matrix of 160 x 192 "
        r"\(fp8_block\), got \(1, 2\)",
    ),
    "scale missing": (
        "fp8_block",
        change(f"{STEM}.gate_proj.weight_scale_inv", drop),
        rf"{STEM}\.gate_proj\.weight_scale_inv is missing in",
    ),
    "all scales missing": (
        "fp8_block",
        lambda made: [f.pop(n) for f in made.files.values() for n in list(f) if n.endswith("scale_inv")] and None,
        r"experts\.0\.gate_proj\.weight in layer0-expert0.* must be BF16 or F16 or F32 in format bf16, got F8_E4M3",
    ),
    "mislabelled weight": (
        "fp8_block",
        change(f"{STEM}.up_proj.weight", lambda t: t.view(torch.int8)),
        rf"{STEM}\.up_proj\.weight in {FILE} must be F8_E4M3 in format fp8_block, got I8",
    ),
    "mislabelled scale": (
        "deepseek_v4",
        change("model.layers.0.ffn.experts.1.w3.scale", lambda t: t.float()),
        rf"experts\.1\.w3\.scale in {FILE} must be F8_E8M0 in format deepseek_v4, got F32",
    ),
    "expert missing": (
        "bf16",
        change(f"{STEM}.down_proj.weight", drop),
        rf"{STEM}\.down_proj\.weight is missing in",
    ),
    "unknown tensors": (
        "bf16",
        lambda made: made.files[FILE].update({f"{STEM}.up_proj.weight_zero_point": torch.zeros(1)}),
        r"mlp\.experts in .* have the tensors weight, weight_zero_point, which is none of the known formats",
    ),
    "NaN in e4m3": (
        "fp8_block",
        change(f"{STEM}.up_proj.weight", put((3, 4), 0xFF)),
        rf"{STEM}\.up_proj\.weight in {FILE} holds NaN or infinity, first at \[3, 4\]",
    ),
    "NaN in UE8M0": (
        "compressed_mxfp4",
        change(f"{STEM}.up_proj.weight_scale", put((3, 2), 0xFF)),
        rf"{STEM}\.up_proj\.weight_scale in {FILE} holds NaN or infinity, first at \[3, 2\]",
    ),
    "global scale of zero": (
        "compressed_nvfp4",
        change(f"{STEM}.up_proj.weight_global_scale", torch.zeros_like),
        rf"{STEM}\.up_proj\.weight_global_scale in {FILE} must be greater than 0, got 0",
    ),
    "one expert larger": (
        "bf16",
        lambda made: made.files[FILE].update(
            {
                f"{STEM}.{n}.weight": torch.ones(s).bfloat16()
                for n, s in (("gate_proj", (I + 8, H)), ("up_proj", (I + 8, H)), ("down_proj", (H, I + 8)))
            }
        ),
        r"experts\.1 has \(H, I\) = \(160, 200\), expert 0 \(160, 192\)",
    ),
    "gpt-oss rows": (
        "gpt_oss",
        change("model.layers.0.mlp.experts.gate_up_proj_scales", lambda t: t[:, :-2].contiguous()),
        r"gate_up_proj_scales in layer0\.safetensors must be U8 \(4, 384, 5\) beside down_proj, got U8 \(4, 382, 5\)",
    ),
    "gpt-oss blocks missing": (
        "gpt_oss",
        change("model.layers.0.mlp.experts.down_proj_scales", drop),
        r"experts\.down_proj_scales is missing in",
    ),
    "gpt-oss bias": (
        "gpt_oss",
        change("model.layers.0.mlp.experts.down_proj_bias", lambda t: t[:, 1:].contiguous()),
        r"down_proj_bias in layer0\.safetensors must have shape \(E, 160\), got \(4, 159\)",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_tensor_is_named(case: str, tmp_path: Path) -> None:
    name, damage, sentence = BROKEN[case]
    problem = Problem(hidden=H, intermediate=I, num_experts=E, top_k=2, recipe="fp8_block", bias=name == "gpt_oss")
    made = generate(name)
    damage(made)
    with pytest.raises(ValueError, match=sentence):
        load(made.save(tmp_path / "broken"), problem)
    load(generate(name).save(tmp_path / "whole"), problem)


def edit_header(file: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def test_truncated_files_are_named_with_their_tensor(tmp_path: Path) -> None:
    folder = generate("fp8_block").save(tmp_path)
    file = folder / FILE
    data = file.read_bytes()
    file.write_bytes(data[: len(data) - 100])
    with pytest.raises(ValueError, match=rf"{FILE} is truncated: {STEM}\.\w+\.weight(_scale_inv)? ends at byte \d+"):
        load(folder)
    file.write_bytes(data[:40])
    with pytest.raises(ValueError, match=rf"{FILE} is truncated in its header: \d+ bytes announced, 40 bytes in all"):
        load(folder)
    file.write_bytes(data[:8] + b"x" * (len(data) - 8))
    with pytest.raises(ValueError, match=rf"{FILE} is no safetensors file"):
        load(folder)
    file.unlink()
    with pytest.raises(ValueError, match=rf"{FILE} cannot be read: No such file"):
        load(folder)
    file.write_bytes(data)
    load(folder)


def test_a_header_that_lies_about_a_tensor(tmp_path: Path) -> None:
    folder = generate("bf16").save(tmp_path)

    def lie(header: dict[str, Any]) -> None:
        header[f"{STEM}.up_proj.weight"]["dtype"] = "F32"

    edit_header(folder / FILE, lie)
    with pytest.raises(ValueError, match=rf"{STEM}\.up_proj\.weight in .*{FILE} is mislabelled: F32 \[192, 160\] has"):
        load(folder)


def test_an_index_that_lies(tmp_path: Path) -> None:
    folder = generate("bf16").save(tmp_path)
    text = (folder / INDEX).read_text()
    index = json.loads(text)
    index["weight_map"][f"{STEM}.up_proj.weight"] = "layer0-expert0.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"{STEM}\.up_proj\.weight is missing in layer0-expert0.*where {INDEX} says"):
        load(folder)
    index["weight_map"][f"{STEM}.up_proj.weight"] = "../elsewhere.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="outside its folder"):
        load(folder)
    (folder / INDEX).write_text("[]")
    with pytest.raises(ValueError, match="is no index of safetensors files"):
        load(folder)
    (folder / INDEX).unlink()
    with pytest.raises(ValueError, match=rf"has no {INDEX}, and not one safetensors file but 9"):
        load(folder)
    (folder / INDEX).write_text(text)
    load(folder)


def test_another_problem_is_refused(tmp_path: Path) -> None:
    folder = generate("bf16").save(tmp_path)
    sizes: dict[str, Any] = {"hidden": H, "intermediate": I, "num_experts": E, "top_k": 2}
    for wrong, sentence in (
        ({"hidden": H + 8}, "hidden 160 and intermediate 192, expected 168 and 192"),
        ({"num_experts": E * 2}, "has 4 experts, expected 8"),
        ({"bias": True}, "has bias False, but problem.bias is True"),
        ({"recipe": "fp32"}, "got recipe 'fp32'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            load(folder, Problem(**{**sizes, **wrong}))
    with PretrainedExperts(folder) as experts:
        with pytest.raises(ValueError, match=r"rank must lie in \[0, 1\), got 2"):
            experts.prepared(experts.layers[0], PROBLEM, rank=2)
        with pytest.raises(ValueError, match=r"expert must lie in \[0, 4\), got 4"):
            experts.read(experts.layers[0], 4)


def test_no_experts(tmp_path: Path) -> None:
    Generated({"m.safetensors": {"model.norm.weight": torch.ones(4)}}).save(tmp_path)
    with pytest.raises(ValueError, match="holds no experts under the names this package knows"):
        PretrainedExperts(tmp_path)
