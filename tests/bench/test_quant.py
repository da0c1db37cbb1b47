"""``megamoe bench quant``: what it offers without a GPU, and one small run with one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megamoe import cli
from megamoe.bench import quant
from megamoe.testing.timing import SLEEP_CYCLES, time_call


def test_operations_have_names_of_their_own_and_shapes() -> None:
    names = [operation.op for operation in quant.operations()]
    assert len(set(names)) == len(names) >= 15
    assert all(quant.shapes_of(name) for name in names)
    assert "cast_1x128 activation=swiglu layout=sm90" in names and "cast_128x128_both fp32" in names


def test_equal_share_counts_elements() -> None:
    a = torch.tensor([1.0, 2.0, -0.0, torch.nan])
    assert quant._equal_share((a,), (torch.tensor([1.0, 3.0, 0.0, torch.nan]),)) == 0.5


def test_bad_arguments_end_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "quant", "--op", "nonsense"]) == 2
    assert "no operation contains 'nonsense': cast_1x128" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "quant"]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    with pytest.raises(ValueError, match="none is visible"):
        time_call(lambda: None)


@pytest.mark.gpu
def test_timing_measures_the_device() -> None:
    short = time_call(lambda: torch.cuda._sleep(SLEEP_CYCLES // 10), samples=5)
    long = time_call(lambda: torch.cuda._sleep(SLEEP_CYCLES), samples=5)
    assert 5 < long.us / short.us < 15
    assert long.us_min <= long.us <= long.us_max


@pytest.mark.gpu
def test_a_run_merges_rows(tmp_path: Path) -> None:
    arguments = ["bench", "quant", "--op", "cast_1x128 layout=sm90", "--shape", "512,1024", "--out", str(tmp_path)]
    assert cli.main([*arguments, "--commit", "abc"]) == 0
    (file,) = tmp_path.glob("quant-*.json")
    (row,) = json.loads(file.read_text())["rows"]
    assert row["equal"] == 1 and row["commit"] == "abc" and row["us"] > 0 and (row["m"], row["n"]) == (512, 1024)
