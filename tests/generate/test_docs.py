"""The commands at the top of docs/generation.md, word for word."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import pytest

pytest.importorskip("transformers", reason="needs transformers; .ci/client_transformers runs these tests")

from megamoe.adapters.transformers.parallel import has_implementations
from tests.repo import ROOT


def test_the_pages_commands() -> None:
    page = (ROOT / "docs/generation.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"<!-- example -->\n```\n(.*?)```", page, flags=re.DOTALL)
    commands = block.splitlines()
    assert [c.split()[0] for c in commands] == ["python", "torchrun"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "CUDA_VISIBLE_DEVICES": ""}
    for line in commands:
        program, *arguments = shlex.split(line)
        module = ["-m", "torch.distributed.run"] if program == "torchrun" else []
        command = [sys.executable, *module, *arguments]
        done = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=250
        )
        if program == "torchrun" and not has_implementations():
            assert done.returncode != 0 and "can't spread eager experts over ranks" in done.stderr, done.stderr[-3000:]
            continue
        assert done.returncode == 0, done.stderr[-3000:]
        rows = re.findall(r"^(megamoe|eager|grouped_mm) +(\d+) +\d+ +[\d,.]+ +[\d.]+", done.stdout, flags=re.MULTILINE)
        expected = (
            [("megamoe", "1"), ("megamoe", "4")]
            if program == "python"
            else [("megamoe", "4"), ("eager", "4"), ("grouped_mm", "4")]
        )
        assert rows == expected, done.stdout
