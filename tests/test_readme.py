"""What the README says is so: its example runs, its links and files exist, its lists are complete."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megamoe import cli
from megamoe.functional import ENGINE_ORDER
from tests.repo import ROOT, is_checkout

README = (ROOT / "README.md").read_text(encoding="utf-8")


def example() -> str:
    (code,) = re.findall(r"<!-- example -->\n```python\n(.*?)```", README, flags=re.DOTALL)
    return str(code)


def test_example_learns_on_two_ranks(tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(example(), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in ("0", "1"):
        losses = [float(v) for v in re.findall(rf"rank {rank} step \d+ loss ([\d.]+)", done.stdout)]
        assert len(losses) == 30
        assert losses[-1] < 0.5 * losses[0], losses
