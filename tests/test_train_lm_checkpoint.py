"""Checkpoints of the main job: any number of ranks goes on from them, and what does not fit is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megamoe.lm import checkpoint
from megamoe.lm.console import Console
from megamoe.lm.data import Corpus
from megamoe.lm.options import Options, merge
from megamoe.lm.train import Trainer
from tests.lm_case import ALONE, TINY, curve, train, train_rank


@pytest.mark.parametrize(("first", "then"), [(1, 1), (2, 1), (1, 3), (2, 4)])
@pytest.mark.parametrize("balance", ["aux", "bias"])
def test_resuming_with_other_ranks_continues_the_curve(ranks, tmp_path, first, then, balance):
    def go(world_size: int, options: Options, resume: Path | None = None) -> dict[str, list[tuple[int, float]]]:
        if world_size == 1:
            return dataclasses.asdict(train(options, ALONE, resume)[0].history)
        return ranks(world_size).run(train_rank, options, resume)[0][0]

    options = dataclasses.replace(TINY, balance=balance, out=str(tmp_path))
    whole = go(first, options)
    names = [p.name for p in checkpoint.list_checkpoints(tmp_path)]
    assert names == ["checkpoint-000010.safetensors", "checkpoint-000012.safetensors"]  # 5 was dropped
    (tmp_path / names[1]).unlink()
    resumed = go(then, options, checkpoint.find(tmp_path))
    if first == then:
        assert curve(resumed) == curve(whole)
    assert curve(resumed)[:10] == curve(whole)[:10]
    assert curve(resumed)[10:] == pytest.approx(curve(whole)[10:], abs=2e-4)
    assert [step for step, _ in resumed["held_out"]] == [6, 12]


def test_a_crash_beside_a_checkpoint_leaves_it_alone(tmp_path):
    out = tmp_path / "run"
    train(dataclasses.replace(TINY, steps=2, out=str(out)), ALONE)
    (path,) = checkpoint.list_checkpoints(out)
    (out / ".checkpoint-000009.safetensors.partial").write_bytes(b"half of one")
    assert checkpoint.find(out) == checkpoint.find(tmp_path) == path
    assert checkpoint.read_state(path)["options"]["experts"] == 12


def test_what_cannot_be_resumed_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"--resume found no checkpoint"):
        checkpoint.find(tmp_path)
    broken = tmp_path / "checkpoint-000001.safetensors"
    broken.write_bytes(b"\x10\0\0\0\0\0\0\0nonsense")
    with pytest.raises(ValueError, match="is not a readable checkpoint"):
        checkpoint.read_state(broken)
    broken.unlink()
    save_file({"x": torch.zeros(1)}, broken)
    with pytest.raises(ValueError, match=r"must carry .* in its header"):
        checkpoint.read_state(broken)
    broken.unlink()
    train(dataclasses.replace(TINY, steps=1, out=str(tmp_path)), ALONE)
    saved = checkpoint.read_state(checkpoint.find(tmp_path))["options"]
    with pytest.raises(ValueError, match=r"--experts is 12 in the checkpoint, got 8: start a new run"):
        merge({"experts": 8}, saved)
    assert merge({"steps": 7, "experts": 12}, saved) == dataclasses.replace(TINY, steps=7, out=str(tmp_path))
    other = Corpus(*(2 * [torch.zeros(500, dtype=torch.uint8)]), "zeros")
    with pytest.raises(ValueError, match="the text differs from the one the checkpoint was trained on"):
        Trainer(TINY, ALONE, other, Console(steps=1, speaks=False), resume=checkpoint.find(tmp_path))
