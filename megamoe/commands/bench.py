"""``python -m megamoe bench <what>``: one module of ``megamoe.bench`` a benchmark; each offers ``add(subparsers)``."""

from __future__ import annotations

import argparse
import importlib

BENCHMARKS = ("gemm", "accuracy", "quant", "moe", "scale", "train", "generate")


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command with those benchmarks that exist."""
    parser = subparsers.add_parser("bench", help="measure on this machine", description=__doc__)
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)
    for name in BENCHMARKS:
        try:
            module = importlib.import_module(f"megamoe.bench.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"megamoe.bench.{name}":
                raise
            continue
        module.add(benchmarks)
