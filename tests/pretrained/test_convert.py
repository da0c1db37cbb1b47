"""``convert``: every format to every other and back, exact where it can be, the rest of a model untouched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megamoe import cli
from megamoe.pretrained import Conversion, PretrainedExperts, convert
from megamoe.pretrained import load as load_module
from megamoe.pretrained.layers import Expert, MoeLayer
from tests.pretrained.generated import FORMATS, INDEX, LAYERS, E, Generated, H, I, generate, prefix

MXFP4 = ("deepseek_v4", "compressed_mxfp4", "gpt_oss")
NVFP4 = ("modelopt_nvfp4", "compressed_nvfp4")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor, after a look at the index."""
    where = json.loads((folder / INDEX).read_text())["weight_map"]
    found = {name: t for file in sorted(set(where.values())) for name, t in load_file(folder / file).items()}
    assert set(found) == set(where)
    return found


def numbers(folder: Path) -> dict[tuple[int, int, int], torch.Tensor]:
    """fp32 of every expert matrix."""
    with PretrainedExperts(folder) as experts:
        return {
            (number, e, k): matrix.dequantise()
            for number, layer in enumerate(experts.layers)
            for e in range(layer.num_experts)
            for k, matrix in enumerate(experts.read(layer, e).matrices)
        }


def is_exact(source: str, target: str) -> bool:
    """Whether every number of the generated source exists in the target's format."""
    return target == source or (source in MXFP4 and target in (*MXFP4, *NVFP4, "bf16", "fp8_block"))


@pytest.mark.parametrize("source", FORMATS)
@pytest.mark.parametrize("target", FORMATS)
def test_every_format_to_every_other_and_back(source: str, target: str, tmp_path: Path) -> None:
    made = generate(source)
    made.save(tmp_path / "a")
    there = convert(tmp_path / "a", tmp_path / "b", target)
    with PretrainedExperts(tmp_path / "b") as experts:
        assert {layer.format_name for layer in experts.layers} == {target}
        assert {layer.bias for layer in experts.layers} == {source == "gpt_oss"}
    before, after = numbers(tmp_path / "a"), numbers(tmp_path / "b")
    assert len(there.report.errors) == len(before) == 3 * E * LAYERS
    if is_exact(source, target):
        assert there.report.total == 0
        assert all(torch.equal(after[at], before[at]) for at in before)
    else:
        errors = [(after[at].double() - before[at].double()).square().sum() for at in before]
        norms = [w.double().square().sum() for w in before.values()]
        assert there.report.total == pytest.approx(float((sum(errors) / sum(norms)) ** 0.5), rel=1e-9)
        assert 0 < there.report.total < 0.2
    back = convert(tmp_path / "b", tmp_path / "c", source)
    if is_exact(target, source) or is_exact(source, target):
        assert back.report.total == 0
        again = numbers(tmp_path / "c")
        assert all(torch.equal(again[at], after[at]) for at in after)


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_format_keeps_every_bit(name: str, tmp_path: Path) -> None:
    made = generate(name)
    made.save(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", name, shard_bytes=50_000)
    assert len(list((tmp_path / "b").glob("model-*-of-*.safetensors"))) > 3
    before, after = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    dropped = {n for n in before if n.endswith(("input_scale", "input_global_scale"))}  # activations' calibration
    assert set(after) == set(before) - dropped
    for key, tensor in after.items():
        assert tensor.dtype == before[key].dtype and tensor.shape == before[key].shape, key
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), before[key].reshape(-1).view(torch.uint8)), key
    assert (tmp_path / "b/config.json").read_text() == (tmp_path / "a/config.json").read_text()


def test_gate_and_up_share_a_global_scale(tmp_path: Path) -> None:
    generate("bf16").save(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", "modelopt_nvfp4", experts_only=True)
    found = tensors(tmp_path / "b")
    stem = f"{prefix('bf16', 0)}experts.1"
    assert torch.equal(found[f"{stem}.gate_proj.weight_scale_2"], found[f"{stem}.up_proj.weight_scale_2"])
    assert not any("embed" in name for name in found)


def test_least_error_scales_and_other_names(tmp_path: Path) -> None:
    generate("bf16").save(tmp_path / "a")
    plain = convert(tmp_path / "a", tmp_path / "b", "mxfp4", naming="w123")
    least = convert(tmp_path / "a", tmp_path / "c", "mxfp4", mxfp4_scales="least_error")
    assert least.report.total < 0.99 * plain.report.total
    assert "model.layers.1.mlp.experts.3.w2.scale" in tensors(tmp_path / "b")


def test_only_one_expert_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads follow one another, and a shard is on disk before the next expert is read."""
    generate("bf16").save(tmp_path / "a")
    seen = []
    original = PretrainedExperts.read

    def read(self: PretrainedExperts, layer: MoeLayer, expert: int) -> Expert:
        seen.append(len(list((tmp_path / "b").glob(".model-*.partial"))))
        return original(self, layer, expert)

    monkeypatch.setattr(load_module.PretrainedExperts, "read", read)
    convert(tmp_path / "a", tmp_path / "b", "bf16", shard_bytes=1)
    assert len(seen) == E * LAYERS
    assert seen == sorted(seen) and seen[-1] - seen[0] == 3 * (E * LAYERS - 1)


def test_a_failed_conversion_leaves_no_checkpoint(tmp_path: Path) -> None:
    made = generate("bf16")
    made.files["layer1-expert3.safetensors"]["model.layers.1.mlp.experts.3.down_proj.weight"][0, 5] = torch.nan
    made.save(tmp_path / "a")
    with pytest.raises(
        ValueError, match=r"layers\.1\.mlp\.experts\.3\.down_proj\.weight in layer1-expert3.*NaN.*\[0, 5\]"
    ):
        convert(tmp_path / "a", tmp_path / "b", "fp8_block", shard_bytes=1)
    assert not list((tmp_path / "b").iterdir())
    made.files["layer1-expert3.safetensors"]["model.layers.1.mlp.experts.3.down_proj.weight"][0, 5] = 0.0
    made.save(tmp_path / "a")
    assert convert(tmp_path / "a", tmp_path / "b", "fp8_block").num_bytes > 0
    with pytest.raises(ValueError, match="already holds a checkpoint"):
        convert(tmp_path / "a", tmp_path / "b", "fp8_block")


def test_gpt_oss_needs_whole_blocks(tmp_path: Path) -> None:
    w = {"gate_proj": (48, 40), "up_proj": (48, 40), "down_proj": (40, 48)}
    odd = Generated({"m.safetensors": {f"experts.0.{n}.weight": torch.ones(s).bfloat16() for n, s in w.items()}})
    odd.save(tmp_path / "a")
    with pytest.raises(ValueError, match="whole blocks of 32 columns, got 40"):
        convert(tmp_path / "a", tmp_path / "b", "gpt_oss")
    result: Conversion = convert(tmp_path / "a", tmp_path / "c", "deepseek_v4")
    assert result.report.total == 0


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate("fp8_block").save(tmp_path / "a")
    lines = tmp_path / "errors.jsonl"
    command = ["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "mxfp4", "--report", str(lines)]
    assert cli.main([*command, "--mxfp4-scales", "least_error"]) == 0
    printed = capsys.readouterr()
    assert "2 layers from fp8_block to mxfp4: 0 of 24 expert matrices are exact; relative error in all" in printed.out
    assert "experts to deepseek_v4" in printed.err, "the progress bar"
    entries = [json.loads(line) for line in lines.read_text().splitlines()]
    assert len(entries) == 25 and entries[0]["name"] == "model.layers.0.mlp.experts.0.gate"
    assert 0 < entries[0]["relative"] < 0.2 and entries[-1]["matrices"] == 24
    assert cli.main(command) == 2
    assert "already holds a checkpoint" in capsys.readouterr().err
    assert cli.main(["convert", str(tmp_path / "none"), str(tmp_path / "c"), "--to", "bf16"]) == 2
    assert "neither a safetensors file nor a folder" in capsys.readouterr().err


def test_mxfp4_to_nvfp4_beyond_its_range_rounds(tmp_path: Path) -> None:
    """18 octaves between blocks of an expert: one more than E4M3's powers of two."""
    made = generate("compressed_mxfp4")
    for e in range(E):
        scale = made.files[f"layer0-expert{e}.safetensors"][f"model.layers.0.mlp.experts.{e}.down_proj.weight_scale"]
        scale.fill_(120)
        scale[:, 0] = 120 + (17 if e == 0 else 18)
    made.save(tmp_path / "a")
    report = convert(tmp_path / "a", tmp_path / "b", "compressed_nvfp4").report
    inexact = {error.name for error in report.errors if error.largest}
    assert inexact == {f"model.layers.0.mlp.experts.{e}.down" for e in range(1, E)}


def test_shapes_differ_from_one_another(tmp_path: Path) -> None:
    """A file as torch saves it, whose tensors are views of one storage, is written whole."""
    weights = torch.randn(3, max(H, I), max(H, I)).bfloat16()
    views = {"gate_proj": weights[0, :I, :H], "up_proj": weights[1, :I, :H], "down_proj": weights[2, :H, :I]}
    (tmp_path / "a").mkdir()
    save_file({f"experts.0.{n}.weight": t.contiguous() for n, t in views.items()}, tmp_path / "a/model.safetensors")
    convert(tmp_path / "a", tmp_path / "b", "bf16")
    for name, view in views.items():
        assert torch.equal(tensors(tmp_path / "b")[f"experts.0.{name}.weight"], view)
