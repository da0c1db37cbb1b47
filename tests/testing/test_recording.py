"""``pytest --record`` keeps what marked tests did, and nothing of tests that were skipped or not marked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from megamoe.bench import results

TESTS = """
import pytest

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


CUT_OFF = """
import os
import pytest

@pytest.mark.gpu
def test_passes():
    pass

@pytest.mark.gpu
def test_ends_the_session():
    os._exit(7)
"""


def run(folder: Path, tests: str) -> tuple[subprocess.CompletedProcess[str], dict[str, results.Row]]:
    (folder / "conftest.py").write_text('pytest_plugins = ["tests.recording"]\n')
    (folder / "test_it.py").write_text(tests)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(folder)]
    command += ["--rootdir", str(folder), "--record", str(folder / "out"), "--commit", "abc"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    (path,) = (folder / "out").iterdir()
    return done, {row["what"]: row for row in results.load(path)}


def test_rows_of_a_run(tmp_path: Path) -> None:
    done, rows = run(tmp_path, TESTS)
    assert "1 failed, 3 passed, 1 skipped" in done.stdout, done.stdout + done.stderr
    assert {what: row["outcome"] for what, row in rows.items()} == {
        "test_it.py::test_states_a_figure": "passed",
        "test_it.py::test_fails_on_b[a]": "passed",
        "test_it.py::test_fails_on_b[b]": "failed",
    }
    assert rows["test_it.py::test_states_a_figure"]["diff"] == 1.5e-6
    assert {row["commit"] for row in rows.values()} == {"abc"}


def test_rows_of_a_session_that_was_cut_off(tmp_path: Path) -> None:
    done, rows = run(tmp_path, CUT_OFF)
    assert done.returncode == 7
    assert {what: row["outcome"] for what, row in rows.items()} == {"test_it.py::test_passes": "passed"}
