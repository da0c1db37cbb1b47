"""What a conversion cost in precision: per tensor and in total."""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich import box
from rich.table import Table


@dataclass(frozen=True)
class TensorError:
    """One matrix: the sum of squared differences, of squared weights, and the largest difference, in fp64."""

    name: str
    squared_error: float
    squared_norm: float
    largest: float

    @property
    def relative(self) -> float:
        """|w' - w| / |w| over the tensor (root of the sums); 0 is exact."""
        return relative(self.squared_error, self.squared_norm)


def relative(squared_error: float, squared_norm: float) -> float:
    """Root of the quotient; inf for an error against nothing."""
    if squared_norm == 0:
        return 0.0 if squared_error == 0 else math.inf
    return math.sqrt(squared_error / squared_norm)


@dataclass
class ErrorReport:
    """Errors of all matrices that were converted; ``name`` is ``{prefix}experts.{e}.{gate, up or down}``."""

    errors: list[TensorError] = field(default_factory=list)

    def measure(self, name: str, before: torch.Tensor, after: torch.Tensor) -> TensorError:
        """Add one matrix, given in fp32 before and after."""
        norm = float(torch.linalg.vector_norm(before, dtype=torch.float64)) ** 2
        if torch.equal(before, after):
            error = TensorError(name, 0.0, norm, 0.0)
        else:
            difference = after.double() - before.double()
            largest = float(difference.abs().max())
            error = TensorError(name, float(torch.linalg.vector_norm(difference)) ** 2, norm, largest)
        self.errors.append(error)
        return error

    @property
    def total(self) -> float:
        """``relative`` over all matrices together."""
        return _total(self.errors)

    @property
    def num_exact(self) -> int:
        """Matrices whose every number is unchanged."""
        return sum(error.largest == 0 for error in self.errors)

    def summary(self) -> str:
        """One sentence."""
        if not self.errors:
            return "no expert matrices were converted"
        worst = max(self.errors, key=lambda error: error.relative)
        if worst.largest == 0:
            return f"all {len(self.errors)} expert matrices are exact"
        return (
            f"{self.num_exact} of {len(self.errors)} expert matrices are exact; relative error in all "
            f"{self.total:.3e}, worst {worst.relative:.3e} ({worst.name})"
        )

    def table(self) -> Table:
        """One line a layer and kind of matrix."""
        groups: dict[tuple[str, str], list[TensorError]] = defaultdict(list)
        for error in self.errors:
            prefix, _, rest = error.name.rpartition("experts.")
            groups[prefix.rstrip("."), rest.rpartition(".")[2]].append(error)
        table = Table(title="relative error |w' - w| / |w|", box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
        for name in ("layer", "matrix"):
            table.add_column(name)
        for name in ("experts", "exact", "together", "worst", "largest difference"):
            table.add_column(name, justify="right")
        for (layer, kind), errors in groups.items():
            exact, worst = sum(e.largest == 0 for e in errors), max(e.relative for e in errors)
            largest = max(e.largest for e in errors)
            figures = (str(len(errors)), str(exact), *(f"{x:.3e}" for x in (_total(errors), worst, largest)))
            table.add_row(layer, kind, *figures)
        return table

    def save(self, path: str | os.PathLike[str]) -> None:
        """Every tensor as a line of JSON, then a line with the total."""
        lines = [json.dumps({**asdict(error), "relative": error.relative}) for error in self.errors]
        lines.append(json.dumps({"total": self.total, "exact": self.num_exact, "matrices": len(self.errors)}))
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _total(errors: Iterable[TensorError]) -> float:
    errors = list(errors)
    return relative(sum(e.squared_error for e in errors), sum(e.squared_norm for e in errors))
