"""``python -m megamoe trace``: what every role of the mega-kernel does when, in one call, as Perfetto JSON and PNG.

    python -m megamoe trace --case flash8 --tokens 128 8192 --out DIR                              # one rank
    python -m megamoe trace --case flash8 --tokens 64 --virtual 2 --out DIR                        # 2 ranks on one GPU
    torchrun --standalone --nproc-per-node=2 -m megamoe trace --case flash8 --tokens 8192 --out DIR  # a rank a GPU

The call is made with cold L2 and lined-up ranks, and its y compared with the untraced kernel's. docs/mega-kernel.md
says what the figures mean.
"""

from __future__ import annotations

import argparse
import gc
import shlex
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megamoe.bench import moe_trace
from megamoe.bench.moe import RECIPES, problems
from megamoe.bench.moe_run import Run, compile_ahead, join, positive
from megamoe.bench.results import Row, provenance, save
from megamoe.mega.trace import EVENTS
from megamoe.testing.cases import case_name


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command."""
    form = argparse.RawDescriptionHelpFormatter
    parser = subparsers.add_parser(
        "trace", help="what the mega-kernel's roles do when", description=__doc__, formatter_class=form
    )
    parser.add_argument("--case", nargs="+", type=case_name, default=["flash8"], help="a named case, or H/I/E/K")
    parser.add_argument("--tokens", nargs="+", type=positive, default=[128, 8192], help="T of each rank")
    parser.add_argument("--recipe", nargs="+", choices=RECIPES, default=["fp8_block"])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for JSON and PNG files")
    parser.add_argument("--virtual", type=positive, metavar="R", help="R ranks in this process, on one GPU")
    parser.add_argument("--sms", type=positive, help="multiprocessors that a rank may use (default: all)")
    parser.add_argument("--ctas", type=positive, default=8, help="CTAs of a rank whose events are kept (default 8)")
    parser.add_argument("--events", type=positive, default=EVENTS, help="room for events of a role of a CTA")
    parser.add_argument("--results", type=Path, metavar="DIR", help="folder of result files to merge into")
    parser.add_argument("--commit", help="what is measured, where this copy has no .git")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Trace every case, recipe and number of tokens."""
    here = join(engine="mega", virtual=arguments.virtual, sms=arguments.sms)
    try:
        _run(here, arguments)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def _run(here: Run, arguments: argparse.Namespace) -> None:
    tokens = sorted(arguments.tokens)
    chosen = problems(arguments.case, arguments.recipe, ["fp32"], world_size=here.world_size, tokens=tokens)
    source: Row = {}
    if here.rank == 0 and arguments.results:
        source = provenance("megamoe " + shlex.join(sys.argv[1:]), commit=arguments.commit)
    compile_ahead(here, [problem for _, problem in chosen], traced=True)
    for case, problem in chosen:
        session = here.mega(problem)
        for T in tokens:
            traced = moe_trace.record(here, session, T, ctas=arguments.ctas, events=arguments.events)
            if here.rank == 0:
                row = moe_trace.make_row(here, case, problem, T, traced)
                print(f"{case} {problem.recipe} T = {T}: {moe_trace.line(row)}", flush=True)
                for path in moe_trace.keep(arguments.out, row, traced):
                    print(f"  {path}", flush=True)
                if arguments.results:
                    save(arguments.results, "trace", [{**row, **source}])
            here.all(None)
        session.close()
        del session
        gc.collect()
        torch.cuda.empty_cache()
