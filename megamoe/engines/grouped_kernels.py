"""Kernels of the grouped products of ``staged`` (``grouped.py``), for ``python -m megamoe cache precompile``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from megamoe.kernels.gemm.config import Major, Scaling
from megamoe.kernels.gemm.heuristics import GemmDesc, choose
from megamoe.kernels.jit.sweep import Case
from megamoe.problem import Problem

_STEP = 1.04  # from one number of routes to the next that is tried


def cases_for(problem: Problem) -> Iterable[Case]:
    """Kernels that forward and backward can choose for 1 route to the most that a rank can receive.

    Recipe bf16 only: nobody multiplies in fp32, and the quantised recipes do not run on ``staged``. Experts are shared
    out evenly. Numbers of routes are tried in steps of 4%; a choice that lives between two of them is compiled when it
    is met.
    """
    if problem.recipe != "bf16":
        return []
    configs = dict.fromkeys(choose(desc) for desc in descs(problem))
    return [Case(config.source(), needs=config.opcodes) for config in configs]


def descs(problem: Problem) -> Iterator[GemmDesc]:
    """The six products of one layer and direction: h13, y, their gradients of rows, and of weights."""
    slots = max(1, problem.num_experts // problem.world_size)
    most = problem.max_tokens * problem.world_size * min(problem.top_k, slots)
    hidden, inner, stacked = problem.hidden, problem.intermediate, problem.w13_rows
    rows: list[tuple[int, int, Major]] = [
        (stacked, hidden, "k"),
        (hidden, inner, "k"),
        (inner, hidden, "mn"),
        (hidden, stacked, "mn"),
    ]
    for routes in _steps(most):
        for n, k, b_major in rows:
            yield GemmDesc(
                scaling=Scaling.NONE,
                grouping="contiguous",
                m=routes,
                n=n,
                k=k,
                groups=slots,
                out="f32",
                b_major=b_major,
            )
        for m, n in ((hidden, inner), (stacked, hidden)):
            yield GemmDesc(
                scaling=Scaling.NONE,
                grouping="k",
                m=m,
                n=n,
                k=max(1, routes // slots),
                groups=slots,
                out="f32",
                a_major="mn",
                b_major="mn",
            )


def _steps(most: int) -> Iterator[int]:
    routes = 1
    while routes < most:
        yield routes
        routes = max(routes + 1, int(routes * _STEP))
    if most:
        yield most
