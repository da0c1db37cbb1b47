"""Compile many kernels side by side and say of each whether it is fit: for CI, and to fill a cache before a start."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megamoe.errors import CompileError
from megamoe.kernels.jit.cache import KernelCache
from megamoe.kernels.jit.inspect import opcodes, sass
from megamoe.kernels.jit.ptxas import PtxasReport
from megamoe.kernels.jit.source import KernelSource


@dataclass(frozen=True)
class Case:
    """A kernel, the opcodes its machine code must hold (``("QGMMA", "UTMALDG")`` for an FP8 GEMM), and the bytes of
    spilled registers it may store or load: machine code of a kernel that may spill none uses no local memory at all."""

    source: KernelSource
    needs: tuple[str, ...] = ()
    spills: int = 0


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What came of a case. ``faults``: sentences, empty if it is fit. ``report`` is None if it did not compile."""

    name: str
    report: PtxasReport | None
    opcodes: Mapping[str, int]
    faults: tuple[str, ...]
    from_disk: bool
    seconds: float


def sweep(
    cases: Iterable[Case], *, root: Path | None = None, workers: int | None = None, disassemble: bool = True
) -> list[Verdict]:
    """A verdict on each case, in order. Never raises for a kernel that fails.

    Args:
        cases: kernels; one that stands there twice is compiled once, and so is one that the cache holds.
        root: folder of the cache, the default one if None.
        workers: processes; None for as many as there are cores.
        disassemble: False only compiles, and looks neither for ``needs`` nor for local memory.
    """
    order = list(cases)
    unique = list(dict.fromkeys(order))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(workers or cores, len(unique))
    if count <= 1:
        verdicts = [_judge(case, root, disassemble) for case in unique]
    else:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])  # else each worker imports torch
        with ProcessPoolExecutor(count, mp_context=context) as pool:
            rest = len(unique)
            verdicts = list(pool.map(_judge, unique, [root] * rest, [disassemble] * rest))
    by_case = dict(zip(unique, verdicts, strict=True))
    return [by_case[case] for case in order]


def summary(verdicts: Sequence[Verdict]) -> str:
    """One line a kernel that is unfit, and a line of totals."""
    unfit = [v for v in verdicts if v.faults]
    lines = [f"{v.name}: {fault}" for v in unfit for fault in v.faults]
    registers = [v.report.registers for v in verdicts if v.report]
    spread = f", {min(registers)} to {max(registers)} registers" if registers else ""
    slowest = max((v.seconds for v in verdicts), default=0.0)
    return "\n".join([*lines, f"{len(verdicts)} kernels, {len(unfit)} unfit{spread}, slowest {slowest:.1f} s"])


def _judge(case: Case, root: Path | None, disassemble: bool) -> Verdict:
    start = time.perf_counter()
    cache = KernelCache(root)
    report, counts = None, {}
    try:
        compiled = cache.get(case.source)
        report, faults = compiled.report, compiled.report.faults(case.spills)
        if disassemble:
            counts = dict(opcodes(sass(compiled.cubin, case.source.entry)))
            faults += [f"holds no {name}" for name in case.needs if not counts.get(name)]
            if not case.spills:
                faults += [f"uses local memory ({counts[name]} {name})" for name in ("LDL", "STL") if counts.get(name)]
    except CompileError as error:
        faults = [str(error)]
    return Verdict(
        name=case.source.name,
        report=report,
        opcodes=counts,
        faults=tuple(faults),
        from_disk=cache.num_from_disk > 0,
        seconds=time.perf_counter() - start,
    )
