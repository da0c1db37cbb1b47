"""``megamoe bench moe``: forward of whole layers over the ranks, checked, then timed with cold L2 and ranks lined up.

    python -m megamoe bench moe --case qwen3                                                # one rank
    torchrun --standalone --nproc-per-node=2 launch_scripts/bench_moe.py --case flash qwen3  # a rank a GPU
    python -m megamoe bench moe --virtual 8 --case qwen3 --tokens 64                         # 8 ranks on one GPU

Each row: ``us`` (median of 20 single calls, the slower rank) and ``us_min``, ``tflops`` of one rank, ``floor_us``
(megamoe/costs.py), ``diff`` to the reference on a sample of tokens, ``peers`` {name: us}. What is wrong is not timed.
Times of virtual ranks (engine "mega-virtual") are those of R ranks sharing one GPU: no floor, no peer.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist

from megamoe import costs, env
from megamoe.bench import moe_report
from megamoe.bench.gemm import full_fp32
from megamoe.bench.moe_check import check
from megamoe.bench.moe_peers import comparable
from megamoe.bench.moe_sessions import Mega, Session, Staged
from megamoe.bench.results import Row, machine_name, provenance, save
from megamoe.errors import MegaMoEError
from megamoe.kernels.jit.sweep import Case as Source
from megamoe.kernels.jit.sweep import sweep
from megamoe.mega.runner import config_for, why_not
from megamoe.problem import Accumulate, Problem, Recipe
from megamoe.testing.cases import CASES
from megamoe.testing.timing import time_call

TOKENS = (1, 8, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
DEFAULT_CASES = ("flash", "flash8", "dsv3-8", "pro8", "qwen3")
RECIPES: tuple[Recipe, ...] = ("bf16", "fp8_block", "fp8_row")
_START = datetime.timedelta(minutes=10)  # kernels are compiled while other ranks wait


@dataclass(frozen=True)
class Run:
    """The ranks and what they measure."""

    device: torch.device
    group: dist.ProcessGroup | None
    world_size: int
    virtual: bool
    engine: str
    sms: int | None

    @property
    def rank(self) -> int:
        return 0 if self.group is None else self.group.rank()

    @property
    def label(self) -> str:
        return f"{self.engine}-virtual" if self.virtual else self.engine

    def all(self, value: Any) -> list[Any]:
        """``value`` of every process; waits for all of them."""
        if self.group is None:
            return [value]
        values = [None] * self.group.size()
        dist.all_gather_object(values, value, group=self.group)
        return values

    def session(self, problem: Problem) -> Session:
        """Raises ValueError where the engine can't do ``problem``."""
        if self.engine == "mega":
            options = {"virtual": self.virtual, "sms": self.sms}
            return Mega(problem, device=self.device, group=self.group, **options)  # type: ignore[arg-type]
        return Staged(problem, device=self.device, group=self.group)


def problems(
    cases: list[str], recipes: list[Recipe], accumulates: list[Accumulate], *, world_size: int, tokens: list[int]
) -> list[tuple[str, Problem]]:
    """(case, problem) of every combination, with room for the most tokens."""
    found = []
    for recipe in recipes:
        for accumulate in accumulates:
            for name in cases:
                problem = CASES[name].problem(world_size=world_size, max_tokens=max(tokens), recipe=recipe)
                found.append((name, replace(problem, accumulate=accumulate)))
    return found


def floor_us(problem: Problem, tokens: int, device_name: str) -> float | None:
    """Of a call on a GPU of that name; None for GPUs that nobody has measured."""
    known = [gpu for name, gpu in costs.GPUS.items() if name in device_name.lower()]
    return costs.floors(problem, tokens, known[0]).us if known else None


def make_row(run: Run, case: str, problem: Problem, tokens: int, *, us: float, us_min: float, diff: float) -> Row:
    """One row, without where it comes from."""
    flops = 2 * tokens * problem.top_k * problem.hidden * (problem.w13_rows + problem.intermediate)
    floor = None if run.virtual else floor_us(problem, tokens, torch.cuda.get_device_name(run.device))
    machine = "" if run.virtual else machine_name()
    peers = comparable(case, problem.recipe, tokens, machine=machine, world_size=run.world_size)
    row: Row = {
        "engine": run.label,
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
    one = torch.zeros(1, device=run.device)
    line_up = None if run.group is None else lambda: dist.all_reduce(one, group=run.group)
    timing = time_call(call, before=line_up)
    session.check()
    times = run.all((timing.us, timing.us_min))
    us, us_min = (max(values) for values in zip(*times, strict=True))
    return make_row(run, case, problem, tokens, us=us, us_min=us_min, diff=max(d for d, _ in verdicts))


def compile_ahead(run: Run, chosen: list[tuple[str, Problem]]) -> None:
    """Every kernel that will be launched into the cache on disk, each process its share, in parallel."""
    if run.engine != "mega":
        return
    sources = []
    for _, problem in chosen:
        slots = -(-problem.num_experts // problem.world_size)
        if why_not(problem, slots) is None:
            sources.append(Source(config_for(problem, slots, index_64=True).source()))
    processes = 1 if run.group is None else run.group.size()
    share = list(dict.fromkeys(sources))[run.rank :: processes]
    if share:
        sweep(share, workers=len(share), disassemble=False)  # one that fails says so when it is launched
    run.all(None)


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the benchmark to ``megamoe bench``."""
    form = argparse.RawDescriptionHelpFormatter
    parser = subparsers.add_parser("moe", help="whole layers over ranks", description=__doc__, formatter_class=form)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(DEFAULT_CASES))
    parser.add_argument("--tokens", nargs="+", type=_positive, default=list(TOKENS), help="T of each rank")
    parser.add_argument("--recipe", nargs="+", choices=RECIPES, default=["fp8_block"])
    parser.add_argument("--accumulate", nargs="+", choices=get_args(Accumulate), default=["fp32"])
    parser.add_argument("--engine", choices=("mega", "staged"), default="mega")
    parser.add_argument("--virtual", type=_positive, metavar="R", help="R ranks in this process, on one GPU")
    parser.add_argument("--sms", type=_positive, help="multiprocessors that a rank may use (default: all)")
    parser.add_argument("--results", type=Path, metavar="DIR", help="folder of result files to merge into")
    parser.add_argument("--commit", help="what is measured, where this copy has no .git")
    parser.add_argument("--plot", type=Path, help="draw time over tokens into this file")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, and merge every row into the result file; 1 if something was refused or wrong."""
    if arguments.virtual and arguments.engine != "mega":
        raise ValueError(f"--virtual needs the engine mega, got {arguments.engine}")
    if not torch.cuda.is_available():
        raise ValueError("bench moe needs a CUDA device, none is visible")
    launched = dist.is_torchelastic_launched()
    if arguments.virtual and launched:
        raise ValueError("--virtual runs all ranks in one process: start it without torchrun")
    here = _join(arguments, launched)
    try:
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
    compile_ahead(here, chosen)
    rows: list[Row] = []
    failures: list[str] = []
    for case, problem in chosen:
        try:
            session = here.session(problem)
        except (ValueError, MegaMoEError, torch.OutOfMemoryError) as error:
            # The same on every rank, but for memory; a rank that goes on alone would be waited for in vain.
            failures.append(f"{case} {problem.recipe} {problem.accumulate}: {_first_line(error)}")
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
    return 1 if failures else 0


def _join(arguments: argparse.Namespace, launched: bool) -> Run:
    options = {"engine": arguments.engine, "sms": arguments.sms}
    if not launched:
        size = arguments.virtual or 1
        device = torch.device("cuda", torch.cuda.current_device())
        return Run(device=device, group=None, world_size=size, virtual=arguments.virtual is not None, **options)
    local = dist.get_node_local_rank()
    if local >= torch.cuda.device_count():
        raise ValueError(
            f"each rank needs a GPU of its own, got local rank {local} and {torch.cuda.device_count()} GPUs: start "
            "fewer ranks, or use --virtual"
        )
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    env.disable_multicast()
    dist.init_process_group("cpu:gloo,cuda:nccl", timeout=_START)
    group = dist.group.WORLD
    assert group is not None
    return Run(device=device, group=group, world_size=group.size(), virtual=False, **options)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:300]


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)
