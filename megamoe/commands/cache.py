"""``python -m megamoe cache``: compiled kernels on disk; list, prune, clear, and compile ahead of a start."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from megamoe import catalog
from megamoe.kernels.jit.compiler import chosen_compiler, compiler_id
from megamoe.kernels.jit.store import DiskStore, Entry, default_root
from megamoe.kernels.jit.sweep import summary, sweep
from megamoe.problem import Problem
from megamoe.testing.cases import CASES

_DAY_S = 86400.0


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser("cache", help="compiled kernels on disk", description=__doc__)
    parser.add_argument("--dir", type=Path, help="the folder (default: the one that MEGAMOE_CACHE_DIR names)")
    actions = parser.add_subparsers(dest="action", required=True)

    show = actions.add_parser("list", help="what is there, with registers and spills")
    show.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    show.set_defaults(run=run_list)

    prune = actions.add_parser("prune", help="remove what is damaged, long unused, or too much")
    prune.add_argument("--days", type=float, default=30.0, help="unused for so many days (default 30)")
    prune.add_argument("--max-mb", type=float, help="then the longest unused, until the rest fits")
    prune.add_argument("--other-compilers", action="store_true", help="and what this compiler did not make")
    prune.set_defaults(run=run_prune)

    actions.add_parser("clear", help="remove every entry").set_defaults(run=run_clear)

    ahead = actions.add_parser("precompile", help="compile all that a layer can need, so that a start is warm")
    ahead.add_argument("--case", choices=CASES, help="layer whose sizes the next four override")
    for name in ("hidden", "intermediate", "experts", "top-k"):
        ahead.add_argument(f"--{name}", type=int)
    ahead.add_argument("--ranks", type=int, default=1, help="R (default 1)")
    ahead.add_argument("--tokens", type=int, default=8192, help="bound on the tokens of a rank (default 8192)")
    ahead.add_argument("--recipe", choices=("bf16", "fp8_block", "fp8_row", "mxfp4"), default="bf16")
    ahead.add_argument("--accumulate", choices=("fp32", "fast"), default="fp32")
    ahead.add_argument("--workers", type=int, help="processes (default: one a core)")
    ahead.add_argument("--check", action="store_true", help="also look into the machine code; unfit kernels: status 1")
    ahead.set_defaults(run=run_precompile)


def run_list(arguments: argparse.Namespace) -> int:
    """Print the entries."""
    store = _store(arguments)
    entries = list(store.entries())
    if arguments.json:
        print(json.dumps([{**dataclasses.asdict(entry), "path": str(entry.path)} for entry in entries], indent=1))
        return 0
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("kernel", "key", "arch", "compiler"):
        table.add_column(name, overflow="fold")
    for name in ("registers", "spilled B", "kB", "unused days"):
        table.add_column(name, justify="right")
    for entry in entries:
        report = entry.report
        spilled = report.spill_store_bytes + report.spill_load_bytes
        figures = (report.registers, spilled, entry.num_bytes // 1024, int((time.time() - entry.used) / _DAY_S))
        table.add_row(entry.name, entry.key[:8], entry.arch, entry.compiler, *map(str, figures))
    console = Console()
    if entries:
        console.print(table)
    console.print(f"{len(entries)} kernels, {_megabytes(entries):.1f} MB in {store.root}", soft_wrap=True)
    return 0


def run_prune(arguments: argparse.Namespace) -> int:
    """Remove the damaged and the old, then the longest unused until ``--max-mb`` holds."""
    store = _store(arguments)
    damaged = store.damaged()
    whole = [entry for entry in store.entries() if entry.path not in damaged]
    oldest = time.time() - arguments.days * _DAY_S
    compiler = compiler_id(chosen_compiler()) if arguments.other_compilers else None
    gone = [e for e in whole if e.used < oldest or (compiler is not None and e.compiler != compiler)]
    kept = sorted((entry for entry in whole if entry not in gone), key=lambda entry: entry.used)
    while arguments.max_mb is not None and kept and _megabytes(kept) > arguments.max_mb:
        gone.append(kept.pop(0))
    for path in [*damaged, *(entry.path for entry in gone)]:
        store.remove(path)
    store.sweep()
    print(f"removed {len(damaged)} damaged and {len(gone)} unwanted kernels, kept {len(kept)} in {store.root}")
    return 0


def run_clear(arguments: argparse.Namespace) -> int:
    """Remove every entry, and what crashed processes left."""
    store = _store(arguments)
    paths = store.folders()
    for path in paths:
        store.remove(path)
    store.sweep()
    print(f"removed {len(paths)} kernels from {store.root}")
    return 0


def run_precompile(arguments: argparse.Namespace) -> int:
    """Compile what the layer can need; 1 if a kernel does not compile or ``--check`` finds one unfit."""
    problem = _problem(arguments)
    cases = catalog.cases_for(problem)
    if not cases:
        print(f"no provider of the catalog knows a kernel for recipe {problem.recipe}: nothing to compile")
        return 0
    store = _store(arguments)
    verdicts = sweep(cases, root=store.root, workers=arguments.workers, disassemble=arguments.check)
    found = sum(verdict.from_disk for verdict in verdicts)
    print(summary(verdicts))
    print(f"{len(verdicts) - found} compiled, {found} were there, in {store.root}")
    unfit = [v for v in verdicts if v.faults and (arguments.check or v.report is None)]
    return 1 if unfit else 0


def _problem(arguments: argparse.Namespace) -> Problem:
    sizes = {
        "hidden": arguments.hidden,
        "intermediate": arguments.intermediate,
        "num_experts": arguments.experts,
        "top_k": arguments.top_k,
    }
    given = {name: value for name, value in sizes.items() if value is not None}
    choices = {"world_size": arguments.ranks, "max_tokens": arguments.tokens, "recipe": arguments.recipe}
    if arguments.case is None:
        missing = [f"--{name.replace('num_', '').replace('_', '-')}" for name in sizes if name not in given]
        if missing:
            raise ValueError(f"precompile needs --case or all four sizes, {', '.join(missing)} not given")
        problem = Problem(**given, **choices)
    else:
        problem = dataclasses.replace(CASES[arguments.case].problem(**choices), **given)
    return dataclasses.replace(problem, accumulate=arguments.accumulate)


def _store(arguments: argparse.Namespace) -> DiskStore:
    return DiskStore(arguments.dir or default_root())


def _megabytes(entries: list[Entry]) -> float:
    return sum(entry.num_bytes for entry in entries) / 1e6
