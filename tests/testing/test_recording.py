"""``pytest --record`` keeps what marked tests did, and nothing of tests that were skipped or not marked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from megamoe.bench import results

TESTS = """
import pytest

pytest_plugins = ["tests.recording"]

@pytest.mark.gpu
def test_states_a_figure(record_property):
    record_property("diff", 1.5e-6)

@pytest.mark.gpu
@pytest.mark.parametrize("case", ["a", "b"])
def test_fails_on_b(case):
    assert case == "a"

@pytest.mark.gpu
@pytest.mark.skip(reason="no device")
def test_skipped():
    pass

def test_unmarked():
    pass
"""


def test_rows_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["tests.recording"]\n')
    (tmp_path / "test_it.py").write_text(TESTS.replace('pytest_plugins = ["tests.recording"]\n', ""))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tmp_path)]
    command += ["--rootdir", str(tmp_path), "--record", str(tmp_path / "out"), "--commit", "abc"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "1 failed, 3 passed, 1 skipped" in done.stdout, done.stdout + done.stderr
    (path,) = (tmp_path / "out").iterdir()
    rows = {row["what"]: row for row in results.load(path)}
    assert {what: row["outcome"] for what, row in rows.items()} == {
        "test_it.py::test_states_a_figure": "passed",
        "test_it.py::test_fails_on_b[a]": "passed",
        "test_it.py::test_fails_on_b[b]": "failed",
    }
    assert rows["test_it.py::test_states_a_figure"]["diff"] == 1.5e-6
    assert {row["commit"] for row in rows.values()} == {"abc"}
