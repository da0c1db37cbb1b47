"""The main job on GPUs: the README's command over NCCL, one GPU alone, and the CPU's curve in fp32."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megamoe.lm import checkpoint
from megamoe.lm.world import from_group
from megamoe.testing.ranks import RankPool
from tests.lm_case import ALONE, TINY, curve, torchrun, train


def launch(num_ranks: int, out: Path, record_property: Any) -> dict[str, Any]:
    """The default run, under torchrun; its summary."""
    done = torchrun(num_ranks, "--device", "cuda", "--out", str(out))
    assert done.returncode == 0, done.stderr
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    assert summary["ranks"] == num_ranks and summary["device"] == "cuda:0"
    speeds = [speed for _, speed in checkpoint.read_state(checkpoint.find(out))["history"]["speed"]]
    record_property("bits_per_byte", summary["held_out_bits_per_byte"])
    record_property("tokens_per_second", sorted(speeds)[len(speeds) // 2])
    return summary


@pytest.mark.gpu
def test_one_gpu_learns(tmp_path: Path, record_property: Any) -> None:
    summary = launch(1, tmp_path, record_property)
    assert summary["held_out_bits_per_byte"] < 2.8 < summary["without_experts_bits_per_byte"]


@pytest.mark.multi_gpu
def test_two_gpus_learn(tmp_path: Path, record_property: Any) -> None:
    summary = launch(2, tmp_path, record_property)
    assert summary["held_out_bits_per_byte"] < 2.8 < summary["without_experts_bits_per_byte"]


def _train_on_gpus(rank, world_size, group, options, resume=None):
    return dataclasses.asdict(train(options, from_group(device="cuda"), resume)[0].history)


@pytest.mark.multi_gpu
def test_two_gpus_have_the_cpus_curve_and_resume_its_checkpoint(tmp_path: Path) -> None:
    options = dataclasses.replace(TINY, recipe="fp32", out=str(tmp_path / "cpu"))
    want = dataclasses.asdict(train(options, ALONE)[0].history)
    halfway = checkpoint.list_checkpoints(tmp_path / "cpu")[0]
    options = dataclasses.replace(options, device="cuda", out=str(tmp_path / "gpu"))
    with RankPool(2, backend="cpu:gloo,cuda:nccl") as pool:
        assert curve(pool.run(_train_on_gpus, options)[0]) == pytest.approx(curve(want), abs=2e-3)
        resumed = pool.run(_train_on_gpus, dataclasses.replace(options, out=str(tmp_path / "on")), halfway)[0]
    assert curve(resumed)[:10] == curve(want)[:10]
    assert curve(resumed)[10:] == pytest.approx(curve(want)[10:], abs=2e-3)


@pytest.mark.gpu
def test_more_ranks_than_gpus_train_on_the_cpu(tmp_path: Path) -> None:
    ranks = torch.cuda.device_count() + 1
    few = ["--steps", "2", "--eval-sequences", "8", "--sample", "0", "--out", str(tmp_path)]
    done = torchrun(ranks, "--experts", str(2 * ranks), *few)
    assert done.returncode == 0, done.stderr
    assert "training on the CPU over gloo instead" in done.stdout
