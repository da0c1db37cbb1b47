"""``megamoe bench accuracy``: how far our GEMMs are from the fp32 product of the dequantised operands.

Random shapes with tails, empty groups and poisoned results. One row for each grouping and recipe: ``shapes``, the
worst ``whole`` (d over all of D), ``row`` (d of one row) and ``element`` (of its bound, see ``element_share``),
``worst`` (the shape that came nearest to a limit), ``repeats`` (shapes whose second run gave the same bits).
"""

from __future__ import annotations

import argparse
import math
import random
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megamoe.bench.gemm import compile_ours, full_fp32
from megamoe.bench.gemm_cases import GROUPINGS, RECIPES, Case, Recipe, make, product
from megamoe.bench.gemm_ours import ours
from megamoe.bench.results import Row, provenance, save
from megamoe.kernels.gemm.config import Grouping
from megamoe.testing.numerics import difference, row_difference

WHOLE, ROW, ELEMENT = 1e-5, 1e-4, 1.0
LARGEST = 4096


@dataclass(frozen=True, kw_only=True)
class Ragged(Case):
    """A case whose groups have the given rows, some perhaps none."""

    sizes: tuple[int, ...]

    @property
    def counts(self) -> list[int]:
        return list(self.sizes)

    @property
    def most(self) -> int:
        """Rows that a masked group has room for."""
        return max(1, *self.sizes)


def shapes(count: int, largest: int = LARGEST) -> Iterator[Ragged]:
    """``count`` random cases, the same on every run, groupings and recipes in turn; no size above ``largest``."""
    draw = random.Random(count)
    kinds: list[tuple[Grouping, Recipe]] = [
        (grouping, recipe)
        for grouping in GROUPINGS
        for recipe in RECIPES
        if not (grouping == "k" and recipe == "fp8_row")
    ]
    for i in range(count):
        grouping, recipe = kinds[i % len(kinds)]
        groups = 1 if grouping == "dense" else draw.randint(1, 16)
        most = draw.choice((64, 128, 400, 1500)) if groups == 1 else draw.choice((8, 70, 260, 700))
        most = min(most, largest)
        sizes = [0 if groups > 1 and draw.random() < 0.25 else draw.randint(1, most) for _ in range(groups)]
        if not any(sizes):
            sizes[0] = draw.randint(1, most)
        n, k = 8 * draw.randint(4, min(largest, 1600) // 8), 16 * draw.randint(1, min(largest, 2080) // 16)
        mean = max(1, sum(sizes) // groups)
        yield Ragged(recipe=recipe, grouping=grouping, groups=groups, rows=mean, n=n, k=k, sizes=tuple(sizes))


def element_share(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The worst element's error as a share of its bound: 2^-7 of itself plus 2^-7 of its row's root mean square."""
    bound = (expected.abs() + expected.square().mean(-1, keepdim=True).sqrt()) * 2**-7
    return float(((actual.float() - expected).abs() / bound.clamp(min=1e-30)).max())


def measure(case: Case, device: str) -> Row:
    """``whole``, ``row``, ``element`` and ``repeats`` (1 if a second run gave the same bits) of one shape."""
    data = make(case, device)
    with full_fp32():
        expected = product(data)
    mine = ours(data)
    found = []
    for _ in range(2):
        result = mine.call()
        found.append(mine.valid(result).clone())
        result.fill_(float("nan"))  # what the second run does not write is NaN, and so no number below a limit
    actual = found[1].reshape(-1, found[1].shape[-1])
    expected = expected.reshape(actual.shape)
    return {
        "whole": difference(actual, expected),
        "row": float(row_difference(actual, expected).max()),
        "element": element_share(actual, expected),
        "repeats": int(torch.equal(found[0], found[1])),
    }


def summarise(rows: Sequence[tuple[Case, Row]]) -> list[Row]:
    """One row for each grouping and recipe."""
    kinds: dict[tuple[str, str], list[tuple[Case, Row]]] = {}
    for case, row in rows:
        kinds.setdefault((case.grouping, case.recipe), []).append((case, row))
    return [
        {
            "grouping": grouping,
            "recipe": recipe,
            "shapes": len(members),
            **{name: max(row[name] for _, row in members) for name in ("whole", "row", "element")},
            "worst": max(members, key=lambda member: nearness(member[1]))[0].label,
            "repeats": sum(row["repeats"] for _, row in members),
        }
        for (grouping, recipe), members in kinds.items()
    ]


def nearness(row: Row) -> float:
    """How near a shape came to a limit; above 1 it is beyond, and infinite where a figure is no number."""
    shares = [row["whole"] / WHOLE, row["row"] / ROW, row["element"] / ELEMENT]
    return float("inf") if any(math.isnan(share) for share in shares) else max(shares)


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the benchmark to ``megamoe bench``."""
    parser = subparsers.add_parser("accuracy", help="GEMMs against their fp32 products", description=__doc__)
    parser.add_argument("--shapes", type=int, default=300, help="random shapes (default 300)")
    parser.add_argument("--largest", type=int, default=LARGEST, help="bound on every size, at least 32")
    parser.add_argument("--compile", action="store_true", help="compile the kernels and stop; no GPU")
    parser.add_argument("--out", type=Path, help="folder of result files to merge into (default: print only)")
    parser.add_argument("--commit", help="what is measured, where this copy has no .git")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Compare, print, and merge into the result file; 1 if a shape is beyond a limit or does not repeat."""
    if arguments.shapes < 1 or arguments.largest < 32:
        got = f"got {arguments.shapes} and {arguments.largest}"
        raise ValueError(f"--shapes must be at least 1 and --largest at least 32, {got}")
    wanted = list(shapes(arguments.shapes, arguments.largest))
    if arguments.compile:
        return compile_ours(wanted, 0)
    if not torch.cuda.is_available():
        raise ValueError("bench accuracy needs a CUDA device, none is visible")
    source = (
        provenance("python -m megamoe " + shlex.join(sys.argv[1:]), commit=arguments.commit) if arguments.out else {}
    )
    rows = [(case, measure(case, "cuda")) for case in wanted]
    total = summarise(rows)
    for row in total:
        figures = "  ".join(f"{name} {row[name]:.2e}" for name in ("whole", "row", "element"))
        print(f"{row['recipe']:10} {row['grouping']:11} {row['shapes']:4} shapes, {row['repeats']} repeat  {figures}")
    failures = [case.label for case, row in rows if not (nearness(row) <= 1 and row["repeats"])]
    for label in failures:
        print(f"FAILED {label}", file=sys.stderr)
    if arguments.out:
        save(arguments.out, "accuracy", [{**row, **source} for row in total])
    return 1 if failures else 0
