"""``megamoe bench scale``: all GPUs of a machine, in one command and a fixed time.

    torchrun --standalone --nproc-per-node=8 launch_scripts/scale.py --out DIR

Random problems over all ranks against the reference; FP8 and BF16 tables of whole layers beside plain PyTorch; traces;
a rank that is killed. What no longer fits into ``--seconds``, or into memory, is skipped and said. Into DIR go
``results/*.json`` (docs/results.md), a plot of times, and the traces' files (docs/tracing.md).
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path

import torch.distributed as dist

from megamoe.bench import moe_report, scale_lost, scale_random, scale_soak, scale_tables
from megamoe.bench.moe import RECIPES
from megamoe.bench.moe_run import Run, compile_ahead, first_line, join, positive
from megamoe.bench.results import Row, machine_name, provenance
from megamoe.bench.scale_run import Budget, Report, Scale
from megamoe.problem import Recipe
from megamoe.testing.cases import case_name

CASES = ("flash", "dsv3", "pro", "qwen3")
TOKENS = (1, 8, 64, 128, 512, 2048, 8192)
TRACED = (128, 8192)
PARTS = ("random", "tables", "traces", "lost")
MORE_PARTS = ("soak",)  # when asked for alone
SECONDS = 480.0  # torchrun, imports and the end take the rest of nine minutes
_LOST_S = 75.0  # processes of their own, their kernels and waits
_PROBLEM_S = 1.0  # a guess


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the benchmark to ``megamoe bench``."""
    form = argparse.RawDescriptionHelpFormatter
    parser = subparsers.add_parser("scale", help="all GPUs of a machine", description=__doc__, formatter_class=form)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for results, plot and traces")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"what it may take (default {SECONDS:g})")
    parser.add_argument("--parts", nargs="+", choices=PARTS + MORE_PARTS, default=list(PARTS))
    parser.add_argument("--case", nargs="+", type=case_name, default=list(CASES), help="named, or H/I/E/K")
    parser.add_argument("--tokens", nargs="+", type=positive, default=list(TOKENS), help="T of each rank")
    parser.add_argument("--trace-tokens", nargs="+", type=positive, default=list(TRACED), help="T of the traces")
    parser.add_argument("--recipe", nargs="+", choices=RECIPES, default=["fp8_block", "bf16"])
    parser.add_argument("--engine", choices=("mega", "staged", "reference"), default="mega")
    parser.add_argument("--problems", type=positive, default=200, help="random problems at most (default 200)")
    parser.add_argument("--problem-seconds", type=float, default=60.0, help="what they may take (default 60)")
    parser.add_argument("--commit", help="what is measured, where this copy has no .git")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run all parts; 1 if something was wrong. What was skipped is no failure."""
    here = join(engine=arguments.engine)
    try:
        return _run(here, arguments)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _run(here: Run, arguments: argparse.Namespace) -> int:
    first, budget = here.rank == 0, Budget(arguments.seconds, here.all)
    source: Row = {}
    if first:
        words = shlex.join(sys.argv[1:]).removeprefix("bench scale ")  # launch_scripts/scale.py leaves them out
        source = provenance(f"megamoe bench scale {words}", commit=arguments.commit)
    scale = Scale(here, budget, Report(arguments.out if first else None, source))
    parts, recipes = arguments.parts, tuple(dict.fromkeys(arguments.recipe))
    lost = "lost" in parts and _can_lose(scale)
    plan = scale_tables.Plan(
        cases=tuple(arguments.case),
        recipes=recipes,
        tokens=tuple(sorted(set(arguments.tokens))) if "tables" in parts else (),
        traced=tuple(sorted(set(arguments.trace_tokens))) if "traces" in parts and _can_trace(scale) else (),
    )
    _compile(scale, plan, lost=lost, with_random="random" in parts, with_soak="soak" in parts)
    budget.keep(_LOST_S if lost else 0.0)
    if "random" in parts:
        _random(scale, recipes, arguments.problems, arguments.problem_seconds)
    scale_tables.run(scale, plan)
    if "soak" in parts:
        _soak(scale, recipes)
    budget.keep(0.0)
    if lost:
        _lose(scale, recipes[0])
    if first:
        _end(scale.report)
    return int(any(here.all(bool(scale.report.failures))))


def _compile(scale: Scale, plan: scale_tables.Plan, *, lost: bool, with_random: bool, with_soak: bool) -> None:
    """Everything that will be launched, before the first part: kernels are made side by side."""
    begin, size = time.monotonic(), scale.run.world_size
    problems = [*scale_random.kernels(size, plan.recipes)] if with_random else []
    if with_soak:
        problems += scale_soak.problems(size, plan.recipes, on_gpu=True)
    if lost:
        problems += [scale_lost.problem(ranks, plan.recipes[0]) for ranks in (size, size - 1)]
    compile_ahead(scale.run, problems)
    for recipe in plan.recipes:
        chosen = [problem for _, problem in plan.problems(size) if problem.recipe == recipe]
        compile_ahead(scale.run, chosen, traced=bool(plan.traces(recipe)))
    if scale.report.out is not None:
        print(f"{size} x {scale.run.device_name}, kernels made in {time.monotonic() - begin:.0f} s", flush=True)


def _random(scale: Scale, recipes: tuple[Recipe, ...], count: int, seconds: float) -> None:
    limit = Budget(min(seconds, scale.budget.left), scale.run.all)
    outcome = scale_random.run(scale.run, recipes=recipes, count=count, go_on=lambda: limit.fits("one", _PROBLEM_S))
    for text in outcome.wrong:
        scale.report.failed(f"random problem, {text}")
    if outcome.tried < count:
        scale.report.skip(f"{count - outcome.tried} of {count} random problems: no time")
    row = _row(
        scale,
        "random problems",
        "+".join(recipes),
        count=outcome.tried,
        wrong=len(outcome.wrong),
        seconds=outcome.seconds,
    )
    scale.report.row("scale", row, f"{outcome.tried} random problems in {outcome.seconds:.0f} s")


def _soak(scale: Scale, recipes: tuple[Recipe, ...]) -> None:
    """For what time is left."""
    try:
        outcome = scale_soak.run(scale.run, recipes=recipes, go_on=lambda: scale.budget.fits("round", _PROBLEM_S))
    except ValueError as error:
        scale.report.failed(f"soak: {first_line(error)}")
        return
    for text in outcome.wrong:
        scale.report.failed(f"soak: {text}")
    row = _row(scale, "soak", "+".join(recipes), count=outcome.calls, wrong=len(outcome.wrong), seconds=outcome.seconds)
    scale.report.row("scale", row, f"{outcome.calls} calls of the same layers in {outcome.seconds:.0f} s")


def _can_lose(scale: Scale) -> bool:
    if scale.run.engine != "mega":
        scale.report.skip(f"the lost rank: it is the mega-kernel's, not the engine {scale.run.engine}'s")
    elif scale.run.world_size == 1:
        scale.report.skip("the lost rank: there is only one")
    return scale.run.engine == "mega" and scale.run.world_size > 1


def _can_trace(scale: Scale) -> bool:
    if scale.run.engine != "mega":
        scale.report.skip(f"the traces: they are the mega-kernel's, not the engine {scale.run.engine}'s")
    return scale.run.engine == "mega"


def _lose(scale: Scale, recipe: Recipe) -> None:
    if not scale.budget.fits("lost", _LOST_S):
        scale.report.skip("the lost rank: no time")
        return
    if scale.run.rank == 0:
        try:
            lost = scale_lost.run(scale.run.world_size, recipe)
        except Exception as error:  # what keeps its processes from starting, say
            lost = scale_lost.Lost((first_line(error),), None)
        for text in lost.wrong:
            scale.report.failed(f"lost rank: {text}")
        row = _row(scale, "lost rank", recipe, count=1, wrong=len(lost.wrong), seconds=lost.seconds)
        scale.report.row("scale", row, f"lost rank: the others waited {lost.seconds} s, {len(lost.wrong)} wrong")
    scale.run.all(None)


def _row(scale: Scale, what: str, recipe: str, *, count: int, wrong: int, seconds: float | None) -> Row:
    row: Row = {"what": what, "recipe": recipe, "engine": scale.run.label, "world_size": scale.run.world_size}
    return {**row, "count": count, "wrong": wrong, "seconds": None if seconds is None else round(seconds, 1)}


def _end(report: Report) -> None:
    assert report.out is not None
    if report.rows:
        moe_report.show(report.rows, machine=machine_name())
        moe_report.plot(report.rows, report.out / "moe.png", machine=machine_name())
    for kind, texts in (("skipped", report.skipped), ("FAILED", report.failures)):
        for text in texts:
            print(f"{kind} {text}", file=sys.stderr)
