"""Tables and traces of ``bench scale``: one case at a time, its weights made on the GPU, plain PyTorch before ours."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch

from megamoe import costs
from megamoe.bench import moe_report, moe_trace
from megamoe.bench.moe import measure, problems
from megamoe.bench.moe_run import first_line
from megamoe.bench.moe_sessions import Mega, Session
from megamoe.bench.moe_torch import PlainTorch
from megamoe.bench.results import Row
from megamoe.bench.scale_run import Scale
from megamoe.errors import MegaMoEError
from megamoe.mega.runner import workspace_for
from megamoe.mega.trace import EVENTS
from megamoe.problem import Problem, Recipe

_SPARE = 3 << 30  # bytes for NCCL, the flush of L2, the reference's experts
_CTAS = 2  # of a rank, in a trace's file
_SESSION_S, _CELL_S, _TRACE_S = 10.0, 3.0, 10.0  # guesses, until one has been seen
TORCH = f"torch-{torch.__version__.split('+')[0]}"
"""What rows call the baseline among their peers."""


@dataclass(frozen=True)
class Plan:
    """What is measured: every case in every recipe at each T of ``tokens``; traces in the first recipe."""

    cases: tuple[str, ...]
    recipes: tuple[Recipe, ...]
    tokens: tuple[int, ...]
    traced: tuple[int, ...]

    def problems(self, world_size: int) -> list[tuple[str, Problem]]:
        """(case, problem) in the order in which they are measured, each with room for its most tokens."""
        found = []
        for recipe in self.recipes:
            if every := [*self.tokens, *self.traces(recipe)]:
                found += problems(list(self.cases), [recipe], ["fp32"], world_size=world_size, tokens=every)
        return found

    def traces(self, recipe: Recipe) -> tuple[int, ...]:
        """T of the traces in ``recipe``."""
        return self.traced if recipe == self.recipes[0] else ()


def run(scale: Scale, plan: Plan) -> None:
    """Every table and trace that fits into time and memory; collective."""
    for case, whole in plan.problems(scale.run.world_size):
        traced = plan.traces(whole.recipe)
        problem = that_fits(scale, whole, [*plan.tokens, *traced], f"{case} {whole.recipe}")
        if problem is None:
            continue
        tokens = [T for T in plan.tokens if problem.max_tokens >= T]
        plain = _plain(scale, case, problem, tokens) if problem.recipe == "bf16" and tokens else {}
        with _opened(scale, f"{case} {problem.recipe}", partial(scale.run.session, problem)) as session:
            if session is not None:
                _cells(scale, session, case, tokens, plain)
            if isinstance(session, Mega):
                _traces(scale, session, case, [T for T in traced if problem.max_tokens >= T])
        session = None  # its weights go before the next one's come


def _plain(scale: Scale, case: str, problem: Problem, tokens: Sequence[int]) -> dict[int, Row]:
    """Rows of plain PyTorch, by T."""
    run = replace(scale.run, engine="torch")
    what = f"{case} {problem.recipe} in plain PyTorch"
    with _opened(scale, what, lambda: PlainTorch(problem, device=run.device, group=run.group)) as session:
        return {} if session is None else _cells(replace(scale, run=run), session, case, tokens, {})


def that_fits(scale: Scale, problem: Problem, tokens: Iterable[int], what: str) -> Problem | None:
    """``problem`` with room for the most of ``tokens`` that every GPU's free memory allows; None for none of them.

    What does not fit is skipped in words. Collective; on CPUs all fits.
    """
    if scale.run.device.type != "cuda":
        return problem
    _tidy(scale)
    free = min(scale.run.all(torch.cuda.mem_get_info(scale.run.device)[0]))
    fitting, most = None, sorted(set(tokens))
    for T in most:
        needs = needed_bytes(replace(problem, max_tokens=T))
        if needs > free:
            left_out = ", ".join(str(t) for t in most if t >= T)
            scale.report.skip(
                f"{what} T = {left_out}: needs {needs / 2**30:.1f} GiB a GPU, {free / 2**30:.1f} are free"
            )
            break
        fitting = replace(problem, max_tokens=T)
    return fitting


def needed_bytes(problem: Problem) -> int:
    """GPU memory of one rank for a session of either kind, with something to spare."""
    slots, T, H = costs.slots_per_rank(problem), problem.max_tokens, problem.hidden
    weights = slots * sum(costs.expert_bytes(problem).values())
    workspace = workspace_for(problem, slots).arena.num_bytes
    # Plain PyTorch: rows that came, and by expert; both GEMMs' results, activations in fp32; rows that go back and
    # their sum in fp32.
    routes = T * problem.top_k * (10 * H + 6 * problem.w13_rows) * 2 if problem.recipe == "bf16" else 0
    return weights + max(workspace, routes) + 4 * T * H * 2 + _SPARE


@contextmanager
def _opened(scale: Scale, what: str, make: Callable[[], Session]) -> Iterator[Session | None]:
    """A session on all ranks, closed behind; None, with the reason said, where there is none."""
    if not scale.budget.fits("session", _SESSION_S):
        scale.report.skip(f"{what}: no time")
        yield None
        return
    _tidy(scale)
    begin, session, fault = time.monotonic(), None, ""
    try:
        session = make()
    except (ValueError, MegaMoEError, torch.OutOfMemoryError) as error:
        fault = first_line(error)
    faults = [text for text in scale.run.all(fault) if text]  # no rank goes on without the others
    scale.budget.took("session", begin)
    if faults:
        scale.report.skip(f"{what}: {faults[0]}")
    yield None if faults else session
    scale.run.all(None)
    if session is not None:
        session.close()


def _tidy(scale: Scale) -> None:
    """Give back to the device what sessions before have held; symmetric memory is not torch's to reuse."""
    gc.collect()
    if scale.run.device.type == "cuda":
        torch.cuda.empty_cache()


def _cells(scale: Scale, session: Session, case: str, tokens: Sequence[int], peers: dict[int, Row]) -> dict[int, Row]:
    """Rows by T, beside those of plain PyTorch where ``peers`` has them."""
    rows: dict[int, Row] = {}
    for T in tokens:
        what = f"{case} {session.problem.recipe} {scale.run.label} T = {T}"
        if not scale.budget.fits("cell", _CELL_S):
            scale.report.skip(f"{what}: no time")
            continue
        begin = time.monotonic()
        try:
            row = measure(scale.run, session, case, T)
        except AssertionError as error:  # on every rank
            scale.report.failed(f"{what}: {error}")
            continue
        if T in peers:
            row["peers"] = {**row["peers"], TORCH: peers[T]["us"]}
        rows[T] = row
        scale.report.row("moe", row, moe_report.line(row))
        scale.budget.took("cell", begin)
    return rows


def _traces(scale: Scale, session: Mega, case: str, tokens: Sequence[int]) -> None:
    for T in tokens:
        what = f"trace of {case} {session.problem.recipe} T = {T}"
        if not scale.budget.fits("trace", _TRACE_S):
            scale.report.skip(f"{what}: no time")
            continue
        begin = time.monotonic()
        try:
            traced = moe_trace.record(scale.run, session, T, ctas=_CTAS, events=EVENTS)
        except AssertionError as error:  # on every rank
            scale.report.failed(f"{what}: {error}")
            continue
        row = moe_trace.make_row(scale.run, case, session.problem, T, traced)
        scale.report.row("trace", row, f"{what}: {moe_trace.line(row)}")
        if scale.report.out is not None:
            moe_trace.keep(scale.report.out / "traces", row, traced)
        scale.run.all(None)
        scale.budget.took("trace", begin)
