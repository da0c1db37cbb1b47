"""``pytest -m gpu --record docs/results``: keep what the marked tests did on this machine, as rows of "check".

Every test marked ``gpu`` or ``multi_gpu`` that ran gives one row: its name, outcome, seconds, and the figures it
stated by pytest's own ``record_property("diff", ...)``. Skipped tests give none. Where the copy has no ``.git``, pass
the commit with ``--commit``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megamoe.bench import results

MARKS = ("gpu", "multi_gpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("megamoe")
    group.addoption("--record", type=Path, metavar="DIR", help="add what GPU tests did to DIR/check-<machine>.json")
    group.addoption("--commit", help="the commit that is tested, where the copy has no .git")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record") is not None:
        config.pluginmanager.register(Recorder(config), "megamoe-recorder")


class Recorder:
    """Saves the row of each marked test when it ends: a session that is cut off, or killed, leaves what it had."""

    def __init__(self, config: pytest.Config) -> None:
        self.folder: Path = config.getoption("--record")
        command = " ".join(("pytest", *(str(a) for a in config.invocation_params.args)))
        self.origin = results.provenance(command, commit=config.getoption("--commit"))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        ran = report.when == "call" or report.failed
        if ran and not report.skipped and any(mark in report.keywords for mark in MARKS):
            results.save(self.folder, "check", [row_of(report) | self.origin])


def row_of(report: pytest.TestReport) -> results.Row:
    """Name, outcome, seconds and stated figures of one test."""
    figures: dict[str, Any] = {str(name): value for name, value in report.user_properties}
    return {**figures, "what": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
