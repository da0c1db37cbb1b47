"""The examples of docs/ run as they stand, each in a process of its own, on CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import megamoe
from tests.repo import ROOT, is_checkout

PAGES = ("checkpoints",)


@pytest.mark.skipif(not is_checkout(), reason="needs docs/")
@pytest.mark.parametrize("page", PAGES)
def test_example_of_a_page_runs(page: str, tmp_path: Path) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"<!-- example -->\n```python\n(.*?)```", text, flags=re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(code, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(Path(megamoe.__file__).parent.parent)}  # also where not installed
    command = [sys.executable, str(script)]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
