"""What the parts of ``bench scale`` share: the ranks, the time that is left, and what is kept, skipped or wrong."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megamoe.bench.moe_run import Run
from megamoe.bench.results import Row, save


class Budget:
    """``seconds`` from now on. What was done of each kind tells how long the next of it may take.

    ``agree`` gives every rank's value to all (``Run.all``): the first rank's clock counts for all.
    """

    def __init__(self, seconds: float, agree: Callable[[Any], list[Any]]) -> None:
        self._end = time.monotonic() + seconds
        self._agree = agree
        self._longest: dict[str, float] = {}
        self._kept = 0.0

    @property
    def left(self) -> float:
        """Seconds, on this rank's clock, that are not kept for later parts."""
        return self._end - time.monotonic() - self._kept

    def keep(self, seconds: float) -> None:
        """Keep so many seconds for what comes later, instead of what was kept before."""
        self._kept = seconds

    def fits(self, kind: str, guess: float) -> bool:
        """Whether one more of ``kind`` fits: as long as the longest so far, or ``guess`` without any. Collective."""
        return bool(self._agree(self.left >= self._longest.get(kind, guess))[0])

    def took(self, kind: str, begin: float) -> None:
        """One of ``kind`` that began at ``begin`` (time.monotonic()) is done."""
        self._longest[kind] = max(self._longest.get(kind, 0.0), time.monotonic() - begin)


@dataclass
class Report:
    """What rank 0 prints and saves as it comes, for a run that is cut off; others only count."""

    out: Path | None  # None on other ranks
    source: Row  # where rows come from
    rows: list[Row] = field(default_factory=list)  # of the benchmark "moe"
    failures: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def row(self, benchmark: str, row: Row, text: str) -> None:
        """One row, and how it reads."""
        if benchmark == "moe":
            self.rows.append(row)
        if self.out is not None:
            print(text, flush=True)
            save(self.out / "results", benchmark, [{**row, **self.source}])

    def failed(self, text: str) -> None:
        """Something is wrong."""
        self.failures.append(text)
        self._say(f"FAILED {text}")

    def skip(self, text: str) -> None:
        """Something was left out, and why."""
        self.skipped.append(text)
        self._say(f"skipped {text}")

    def _say(self, text: str) -> None:
        if self.out is not None:
            print(text, flush=True)


@dataclass(frozen=True)
class Scale:
    """One run of the benchmark."""

    run: Run
    budget: Budget
    report: Report
