"""``megamoe bench moe``: forward of whole layers over the ranks, checked, then timed with cold L2 and ranks lined up.

    python -m megamoe bench moe --case qwen3                                                # one rank
    torchrun --standalone --nproc-per-node=2 launch_scripts/bench_moe.py --case flash qwen3  # a rank a GPU
    python -m megamoe bench moe --virtual 8 --case qwen3 --tokens 64                         # 8 ranks on one GPU

Each row: ``us`` (median of 20 single calls, the slower rank) and ``us_min``, ``tflops`` of one rank, ``floor_us``
(megamoe/costs.py), ``diff`` to the reference on a sample of tokens, ``peers`` {name: us}. What is wrong is not timed.
Rows of the kernel with partial sums call the engine "mega-partial". Times of virtual ranks (engine "mega-virtual") are
those of R ranks sharing one GPU: no floor, no peer.
"""

from __future__ import annotations

import argparse
import gc
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch
import torch.distributed as dist

from megamoe import costs
from megamoe.bench import moe_report
from megamoe.bench.gemm import full_fp32
from megamoe.bench.moe_check import check
from megamoe.bench.moe_peers import comparable
from megamoe.bench.moe_run import Run, compile_ahead, first_line, join, positive
from megamoe.bench.moe_sessions import Session
from megamoe.bench.results import Row, machine_name, provenance, save
from megamoe.errors import MegaMoEError
from megamoe.problem import Accumulate, Problem, Recipe
from megamoe.testing.cases import case_name, case_of
from megamoe.testing.timing import time_call, time_on_host

TOKENS = (1, 8, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
DEFAULT_CASES = ("flash", "flash8", "dsv3-8", "pro8", "qwen3")
RECIPES: tuple[Recipe, ...] = ("bf16", "fp8_block", "fp8_row")
_PARTIAL_SUMS = {"on": True, "off": False, "auto": None}


def problems(
    cases: list[str], recipes: list[Recipe], accumulates: list[Accumulate], *, world_size: int, tokens: list[int]
) -> list[tuple[str, Problem]]:
    """(case, problem) of every combination, with room for the most tokens."""
    found = []
    for recipe in recipes:
        for accumulate in accumulates:
            for name in cases:
                problem = case_of(name).problem(world_size=world_size, max_tokens=max(tokens), recipe=recipe)
                found.append((name, replace(problem, accumulate=accumulate)))
    return found


def floor_us(problem: Problem, tokens: int, device_name: str) -> float | None:
    """Of a call on a GPU of that name; None for GPUs that nobody has measured."""
    gpu = costs.named(device_name)
    return costs.floors(problem, tokens, gpu).us if gpu else None


def make_row(run: Run, case: str, problem: Problem, tokens: int, *, us: float, us_min: float, diff: float) -> Row:
    """One row, without where it comes from."""
    flops = 2 * tokens * problem.top_k * problem.hidden * (problem.w13_rows + problem.intermediate)
    floor = None if run.virtual else floor_us(problem, tokens, run.device_name)
    machine = "" if run.virtual else machine_name()
    peers = comparable(case, problem.recipe, tokens, machine=machine, world_size=run.world_size)
    row: Row = {
        "engine": run.label_of(problem),
        "recipe": problem.recipe,
        "accumulate": problem.accumulate,
        "direction": "fwd",
        "case": case,
        "world_size": run.world_size,
        "tokens": tokens,
        "us": us,
        "us_min": us_min,
        "tflops": flops / us / 1e6,
        "floor_us": floor,
        "diff": diff,
        "peers": peers,
    }
    return {**row, "sms": run.sms} if run.sms else row


def measure(run: Run, session: Session, case: str, tokens: int) -> Row:
    """Check, then time, one cell; every process of the run together.

    Raises:
        AssertionError: y of some rank is wrong, on every rank.
    """
    problem = session.problem
    outs = [torch.full_like(i.first(tokens).x, torch.nan) for i in session.inputs]
    call = session.call(tokens, outs)
    ys = call()
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    session.check()
    run.all(None)  # every rank's activations lie still now
    diff, fault = 0.0, ""
    try:
        with full_fp32():
            diff = check(session, tokens, ys)
    except AssertionError as error:
        fault = str(error)
    verdicts = run.all((diff, fault))
    if faults := [text for _, text in verdicts if text]:
        raise AssertionError(faults[0])
    timer = time_call if run.device.type == "cuda" else time_on_host
    timing = timer(call, before=run.line_up())
    session.check()
    times = run.all((timing.us, timing.us_min))
    us, us_min = (max(values) for values in zip(*times, strict=True))
    return make_row(run, case, problem, tokens, us=us, us_min=us_min, diff=max(d for d, _ in verdicts))


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the benchmark to ``megamoe bench``."""
    form = argparse.RawDescriptionHelpFormatter
    parser = subparsers.add_parser("moe", help="whole layers over ranks", description=__doc__, formatter_class=form)
    parser.add_argument("--case", nargs="+", type=case_name, default=list(DEFAULT_CASES), help="named, or H/I/E/K")
    parser.add_argument("--tokens", nargs="+", type=positive, default=list(TOKENS), help="T of each rank")
    parser.add_argument("--recipe", nargs="+", choices=RECIPES, default=["fp8_block"])
    parser.add_argument("--accumulate", nargs="+", choices=get_args(Accumulate), default=["fp32"])
    parser.add_argument("--engine", choices=("mega", "staged"), default="mega")
    parser.add_argument("--virtual", type=positive, metavar="R", help="R ranks in this process, on one GPU")
    parser.add_argument("--sms", type=positive, help="multiprocessors that a rank may use (default: all)")
    parser.add_argument(
        "--partial-sums", choices=_PARTIAL_SUMS, default="auto",
        help="whether owners add up a token's rows (default: MEGAMOE_PARTIAL_SUMS)",
    )  # fmt: skip
    parser.add_argument("--results", type=Path, metavar="DIR", help="folder of result files to merge into")
    parser.add_argument("--commit", help="what is measured, where this copy has no .git")
    parser.add_argument("--plot", type=Path, help="draw time over tokens into this file")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, and merge every row into the result file; 1 if something was refused or wrong."""
    here = join(engine=arguments.engine, virtual=arguments.virtual, sms=arguments.sms)
    here = replace(here, partial_sums=_PARTIAL_SUMS[arguments.partial_sums])
    try:
        if here.device.type != "cuda":
            raise ValueError("bench moe needs a CUDA device, none is visible")
        return _run(here, arguments)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _run(here: Run, arguments: argparse.Namespace) -> int:
    first, tokens = here.rank == 0, sorted(arguments.tokens)
    chosen = problems(arguments.case, arguments.recipe, arguments.accumulate, world_size=here.world_size, tokens=tokens)
    source: Row = {}
    if first and arguments.results:
        command = "megamoe bench moe " + shlex.join(sys.argv[1:])
        source = provenance(command, commit=arguments.commit)
    compile_ahead(here, [problem for _, problem in chosen])
    rows: list[Row] = []
    failures: list[str] = []
    for case, problem in chosen:
        try:
            session = here.session(problem)
        except (ValueError, MegaMoEError, torch.OutOfMemoryError) as error:
            # The same on every rank, but for memory; a rank that goes on alone would be waited for in vain.
            failures.append(f"{case} {problem.recipe} {problem.accumulate}: {first_line(error)}")
            if first:
                print(f"FAILED {failures[-1]}", flush=True)
            continue
        for T in tokens:
            try:
                row = measure(here, session, case, T)
            except AssertionError as error:
                failures.append(f"{case} {problem.recipe} {problem.accumulate} T = {T}: {error}")
                if first:
                    print(f"FAILED {failures[-1]}", flush=True)
                continue
            rows.append(row)
            if first:
                print(moe_report.line(row), flush=True)
            if first and arguments.results:  # now, for a run that is cut off
                save(arguments.results, "moe", [{**row, **source}])
        here.all(None)
        session.close()
        del session
        gc.collect()
        torch.cuda.empty_cache()
    if first and rows:
        moe_report.show(rows, machine=machine_name())
        if arguments.plot:
            moe_report.plot(rows, arguments.plot, machine=machine_name())
    if first:
        for failure in failures:
            print(f"FAILED {failure}", file=sys.stderr)
    # Together: once a rank has failed, torchrun ends one that still speaks.
    return int(any(here.all(bool(failures))))
