"""Random calls over the same workspaces for minutes: nothing may fail, leak or drift. Part of ``bench scale``.

In each round one of a few layers, whose workspaces stay, gets new tokens, routing and T of every rank, several calls in
a row. All calls of a round must give the same bits; every few rounds y is held against the reference. At the end the
first round is repeated, bit for bit, and no more memory may be taken than after the first rounds.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import torch

from megamoe.bench.gemm import full_fp32
from megamoe.bench.moe_check import check
from megamoe.bench.moe_data import Tokens
from megamoe.bench.moe_run import Run, first_line
from megamoe.bench.moe_sessions import Session
from megamoe.errors import MegaMoEError
from megamoe.problem import Accumulate, Problem, Recipe
from megamoe.testing import routing

_CALLS = 8  # of a round
_WHOLE = 6  # rounds, the first, with all the tokens that there is room for: some are repeated at the end
_CHECKED = 11  # every so many rounds y is held against the reference: each layer's turn comes
_GROWTH = 16 << 20  # bytes that a device may hold beyond what it held: allocators round


@dataclass(frozen=True)
class Outcome:
    """Calls of each rank, and what was wrong (sentences, at most one a round)."""

    calls: int
    wrong: tuple[str, ...]
    seconds: float


def problems(world_size: int, recipes: Sequence[Recipe], *, on_gpu: bool) -> list[Problem]:
    """One layer a recipe, for FP8 on GPUs one for each way to accumulate; on CPUs, where the reference multiplies, tiny
    ones."""
    experts, hidden, inter, tokens = (16, 2048, 768, 1024) if on_gpu else (4, 64, 40, 24)
    return [
        Problem(
            hidden=hidden,
            intermediate=inter,
            num_experts=experts * world_size,
            top_k=4,
            world_size=world_size,
            max_tokens=tokens,
            recipe=recipe,
            accumulate=accumulate,
        )
        for recipe in recipes
        for accumulate in (get_args(Accumulate) if on_gpu and recipe.startswith("fp8") else ("fp32",))
    ]


def run(run_: Run, *, recipes: Sequence[Recipe], go_on: Callable[[], bool]) -> Outcome:
    """Rounds for as long as ``go_on`` (equal on all ranks) says so; collective.

    Raises:
        ValueError: the engine can't do a recipe, on every rank.
    """
    begin, wrong, rounds = time.monotonic(), [], 0
    sessions = [run_.session(p) for p in problems(run_.world_size, recipes, on_gpu=run_.device.type == "cuda")]
    first: dict[int, torch.Tensor] = {}
    held = 0
    while go_on():
        which = rounds % len(sessions)
        fault, y = _round(run_, sessions[which], rounds)
        first.setdefault(which, y)
        rounds += 1
        if rounds == 2 * len(sessions):
            held = _taken(run_)
        if found := [text for text in run_.all(fault) if text]:
            wrong.append(f"round {rounds - 1}: {found[0]}")
            break
    if not wrong and rounds > 2 * len(sessions):
        for which, session in enumerate(sessions):
            fault, y = _round(run_, session, which)
            same = bool(torch.equal(y, first[which]))
            wrong += [
                text for text in run_.all(fault or ("" if same else "the first round has other bits now")) if text
            ]
        grown = max(run_.all(_taken(run_) - held))
        if grown > _GROWTH:
            wrong.append(f"{grown >> 20} MiB more are taken than after the first rounds")
    for session in sessions:
        session.close()
    return Outcome(rounds * _CALLS, tuple(wrong), time.monotonic() - begin)


def _round(run_: Run, session: Session, seed: int) -> tuple[str, torch.Tensor]:
    """What is wrong with some calls of round ``seed``, "" if nothing, and the last y."""
    r = random.Random(seed)
    kind, most = r.choice(list(routing.KINDS)), session.problem.max_tokens
    sizes = [most if seed < _WHOLE else r.choice([0, 1, r.randint(2, most), most]) for _ in range(run_.world_size)]
    rank = session.ranks[0]
    session.inputs = [Tokens.make(session.problem, rank, run_.device, kind=kind, seed=seed + 1)]
    tokens, fault = sizes[rank], ""
    call = session.call(tokens)
    ys: list[torch.Tensor] = []
    try:
        for _ in range(_CALLS):
            ys = [*ys[-1:], call()[0].clone()]
            if len(ys) == 2 and not torch.equal(*ys):
                fault = fault or f"two calls of the same tokens differ ({kind}, T {sizes})"
        session.check()
    except MegaMoEError as error:
        fault = first_line(error)
    run_.all(None)  # every rank's activations lie still now
    if seed % _CHECKED == 0 and not fault:
        try:
            with full_fp32():
                check(session, tokens, ys[-1:])
        except AssertionError as error:
            fault = f"{first_line(error)} ({kind}, T {sizes})"
    run_.all(None)
    return fault, ys[-1]


def _taken(run_: Run) -> int:
    """Bytes of the device that are in use."""
    gc.collect()
    if run_.device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(run_.device)
    return total - free
