"""The training script and the documentation's example, as processes under torchrun."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.repo import ROOT

pytest.importorskip("megatron.core", reason="needs megatron-core 0.16 or 0.19 (and triton)", exc_type=ImportError)

pytestmark = pytest.mark.filterwarnings("ignore")
SCRIPT = ROOT / "launch_scripts" / "train_megatron.py"


def torchrun(script: Path, *arguments: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.run(
        [*launcher, str(script), *arguments],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip


def test_the_script_trains_through_either_layer(tmp_path: Path) -> None:
    small = ["--device", "cpu", "--steps", "3", "--warmup", "1", "--batch", "8", "--length", "16"]
    curves = []
    for moe in ("stock", "megamoe"):
        load = ["--load", str(tmp_path)] if curves else ["--save", str(tmp_path)]
        done = torchrun(SCRIPT, *small, "--moe", moe, *load)
        assert done.returncode == 0, done.stderr[-3000:]
        steps = re.findall(r"^step (\d) loss ([\d.]+) grad_norm ([\d.]+)$", done.stdout, flags=re.MULTILINE)
        assert [n for n, _, _ in steps] == ["1", "2", "3"]
        (speed,) = re.findall(rf"^tokens_per_second (\d+) \({moe}, steps 2 to 3\)$", done.stdout, flags=re.MULTILINE)
        assert int(speed) > 0
        curves.append([float(loss) for _, loss, _ in steps])
    assert curves[1][0] < curves[0][0] - 0.05  # it went on from the stock layer's checkpoint


def test_the_script_refuses_in_a_sentence() -> None:
    done = torchrun(SCRIPT, "--device", "cpu", "--ep", "3")
    assert done.returncode != 0
    assert "train_megatron.py: --ep (3) must divide the ranks (2) and --experts (8)" in done.stderr
    alone = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False,
        env={k: v for k, v in os.environ.items() if k != "RANK"},
    )  # fmt: skip
    assert alone.returncode == 1 and "start with torchrun" in alone.stderr


def test_the_example_learns(tmp_path: Path) -> None:
    page = (ROOT / "docs/megatron.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"<!-- example -->\n```python\n(.*?)```", page, flags=re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(code, encoding="utf-8")
    done = torchrun(script)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in ("0", "1"):
        losses = [float(v) for v in re.findall(rf"rank {rank} step \d+ loss ([\d.]+)", done.stdout)]
        assert len(losses) == 20
        assert losses[-1] < 0.6 * losses[0], losses
