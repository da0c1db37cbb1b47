"""Kernels of these tests, compiled side by side before the first of them is launched."""

from __future__ import annotations

import pytest

from megamoe.kernels.jit.sweep import Case, sweep
from tests.mega.problems import sources


@pytest.fixture(scope="session")
def kernels() -> None:
    """All of them in the cache on disk."""
    verdicts = sweep([Case(source) for source in sources()], disassemble=False)
    failed = [f"{v.name}: {v.faults}" for v in verdicts if v.report is None]
    assert not failed, "\n".join(failed)
