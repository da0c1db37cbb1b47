"""The frame of launch scripts: what torchrun shows of ranks that refuse."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.repo import ROOT

LATE = """
import time
from megamoe.leave import leave
from megamoe.lm.launch import launch

def work(meet):
    world = meet("cpu")
    if world.rank == 0:
        time.sleep(0.5)  # torchrun looks after its ranks each tenth of a second
    raise ValueError("nothing to do")

leave(lambda: launch("late.py", work, launched=True))
"""


def test_a_refusal_is_heard_though_the_rank_that_speaks_comes_late(tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(LATE, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "late.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode != 0
    assert done.stderr.count("late.py: nothing to do") == 1, done.stderr[-3000:]
