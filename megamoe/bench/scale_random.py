"""Random problems over real ranks, every token of every rank against the reference: part of ``bench scale``."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megamoe.activation import Activation
from megamoe.bench.gemm import full_fp32
from megamoe.bench.moe_check import check
from megamoe.bench.moe_data import Tokens
from megamoe.bench.moe_run import Run, first_line
from megamoe.errors import MegaMoEError
from megamoe.problem import Problem, Recipe
from megamoe.testing import routing

# Each is a kernel to compile for each recipe; other sizes are arguments of a launch.
_FORMS: tuple[dict[str, Any], ...] = (
    {"top_k": 4},
    {"top_k": 1},
    {"top_k": 16},
    {"top_k": 8, "weights_applied": "before_down"},
    {"top_k": 6, "activation": Activation("swiglu_clamped"), "bias": True},
)
_SLOTS_IN_ALL = 32  # so that all forms share their room in shared memory
_MOST_TOKENS = 400


@dataclass(frozen=True)
class Draw:
    """A problem, how its tokens are routed, and T of every rank."""

    seed: int
    problem: Problem
    kind: str
    tokens: tuple[int, ...]

    def __str__(self) -> str:
        p = self.problem
        return (
            f"seed {self.seed}: {p.recipe}, H {p.hidden}, I {p.intermediate}, E {p.num_experts}, K {p.top_k}, "
            f"{p.activation.name}, {p.weights_applied}, {self.kind}, T {self.tokens}"
        )


@dataclass(frozen=True)
class Outcome:
    """How many problems were tried, and what was wrong with which."""

    tried: int
    wrong: tuple[str, ...]
    seconds: float


def draw(seed: int, world_size: int, recipes: tuple[Recipe, ...]) -> Draw:
    """The random problem of this number, the same on every rank."""
    r = random.Random(seed)
    form = r.choice(_FORMS)
    most = max(1, _SLOTS_IN_ALL // world_size)
    least = min(most, -(-form["top_k"] // world_size))
    sizes = [r.choice([0, 1, r.randint(2, 30), r.randint(31, _MOST_TOKENS)]) for _ in range(world_size)]
    problem = Problem(
        hidden=8 * r.randint(4, 80),
        intermediate=8 * r.randint(4, 60),
        num_experts=world_size * r.randint(least, most),
        world_size=world_size,
        max_tokens=max([1, *sizes]),
        recipe=r.choice(recipes),
        **form,
    )
    return Draw(seed, problem, r.choice(list(routing.KINDS)), tuple(sizes))


def kernels(world_size: int, recipes: tuple[Recipe, ...]) -> Iterator[Problem]:
    """Problems whose kernels are all that the random ones need."""
    for recipe in recipes:
        for form in _FORMS:
            for slots in {1, max(1, _SLOTS_IN_ALL // world_size)}:
                experts = max(world_size * slots, form["top_k"])
                yield Problem(
                    hidden=128, intermediate=128, num_experts=experts, world_size=world_size, recipe=recipe, **form
                )


def run(run_: Run, *, recipes: tuple[Recipe, ...], count: int, go_on: Callable[[], bool]) -> Outcome:
    """Up to ``count`` problems, as long as ``go_on`` (equal on all ranks) says so; collective."""
    begin, wrong, tried = time.monotonic(), [], 0
    for seed in range(count):
        if not go_on():
            break
        given = draw(seed, run_.world_size, recipes)
        faults = [fault for fault in run_.all(_attempt(run_, given)) if fault]
        tried += 1
        if faults:
            wrong.append(f"{given}: {faults[0]}")
    return Outcome(tried, tuple(wrong), time.monotonic() - begin)


def _attempt(run_: Run, given: Draw) -> str:
    """What is wrong with two calls of one problem on this rank, "" if nothing."""
    session, fault = None, ""
    try:
        session = run_.session(given.problem)
    except (ValueError, MegaMoEError) as error:
        fault = first_line(error)
    if any(run_.all(fault)) or session is None:  # no rank goes on without the others
        return fault
    for turn in range(2):
        session.inputs = [
            Tokens.make(given.problem, rank, run_.device, kind=given.kind, seed=2 * given.seed + turn + 1)
            for rank in session.ranks
        ]
        tokens = given.tokens[session.ranks[0]]
        ys = None
        try:
            ys = session.call(tokens)()
            if run_.device.type == "cuda":
                torch.cuda.synchronize()
            session.check()
        except MegaMoEError as error:
            fault = fault or first_line(error)
        run_.all(None)  # every rank's activations lie still now
        if ys is not None and not fault:
            try:
                with full_fp32():
                    check(session, tokens, ys, count=_MOST_TOKENS)
            except AssertionError as error:
                fault = first_line(error)
        run_.all(None)
    session.close()
    del session
    gc.collect()
    return fault
