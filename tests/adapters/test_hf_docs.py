"""The example of docs/huggingface.md, as a user would run it: alone and under torchrun."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs transformers; .ci/client_transformers runs these tests")

from tests.repo import ROOT


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_pages_example(tmp_path: Path, world_size: int) -> None:
    page = (ROOT / "docs/huggingface.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"<!-- example -->\n```python\n(.*?)```", page, flags=re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(code, encoding="utf-8")
    logs = ["--redirects=1", f"--log-dir={tmp_path / 'logs'}"]  # a file a rank: on one pipe their lines run together
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}", *logs]
    command = [sys.executable, *(torchrun if world_size > 1 else []), str(script)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout + "".join(log.read_text(encoding="utf-8") for log in (tmp_path / "logs").rglob("stdout.log"))
    differences = [float(v) for v in re.findall(r"^(?:one rank|spread): ([\d.e+-]+)$", said, flags=re.MULTILINE)]
    assert len(differences) == (1 if world_size == 1 else 2 * world_size), said
    assert max(differences) < 1e-5
