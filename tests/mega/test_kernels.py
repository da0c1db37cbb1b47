"""Machine code of the mega-kernels that the named cases need: tensor cores and bulk copies, bounded spills."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megamoe.activation import Activation
from megamoe.kernels.jit.cache import KernelCache
from megamoe.kernels.jit.inspect import sass
from megamoe.kernels.jit.sweep import Case, sweep
from megamoe.mega.config import MegaConfig
from megamoe.mega.kernels import cases_for
from megamoe.mega.runner import config_for
from megamoe.problem import Accumulate, Problem, Recipe
from megamoe.testing.cases import CASES
from tests.kernels.machine_code import with_hints
from tests.mega.problems import RECIPES

NOT_GATED = tuple(replace(CASES[name], activation=Activation("relu2")) for name in ("qwen3", "gptoss"))
FP8: tuple[Recipe, ...] = ("fp8_block", "fp8_row")
PROBLEM = Problem(hidden=128, intermediate=64, num_experts=8, top_k=2, world_size=2)
# Biases, gated and not, the most offsets to keep, and none of these.
SAMPLE = [
    *(CASES[n].problem(world_size=r, recipe="fp8_block") for n, r in (("gptoss", 2), ("flash", 1))),
    CASES["qwen3"].problem(world_size=2),
    CASES["gptoss"].problem(world_size=2, recipe="fp8_row"),
    *(replace(CASES["flash"].problem(world_size=2, recipe=recipe), accumulate="fast") for recipe in FP8),
    replace(
        CASES["flash"].problem(world_size=2, recipe="fp8_block"),
        weights_applied="before_down",
        activation=Activation("swiglu_limited", limit=10.0),
    ),
    replace(NOT_GATED[1].problem(world_size=2, recipe="fp8_block"), weights_applied="before_down"),
]
# With partial sums: each recipe, biases, most ranks, one accumulator.
PARTIAL = [
    *(CASES["qwen3"].problem(world_size=r, recipe=recipe) for r, recipe in zip((2, 4, 8), RECIPES, strict=True)),
    *(CASES["gptoss"].problem(world_size=2, recipe=recipe) for recipe in RECIPES),
    *(replace(CASES["flash"].problem(world_size=2, recipe=recipe), accumulate="fast") for recipe in FP8),
]


def problems() -> Iterable[Problem]:
    """The named cases on 1 to 8 ranks, one problem for each kernel."""
    seen: set[MegaConfig] = set()
    for case in (*CASES.values(), *NOT_GATED):
        for world_size in (1, 2, 4, 8):
            for recipe in RECIPES:
                problem = case.problem(world_size=world_size, recipe=recipe)
                config = config_for(problem, -(-problem.num_experts // world_size), index_64=True)
                if config not in seen:
                    seen.add(config)
                    yield problem


def faults(found: Iterable[Problem], **choices: Any) -> list[str]:
    """What is wrong with the machine code of one kernel for each problem; ``choices``: as ``cases_for`` takes them."""
    verdicts = sweep([next(iter(cases_for(problem, **choices))) for problem in found])
    bad = [f"{verdict.name}: {fault}" for verdict in verdicts for fault in verdict.faults]
    for verdict in verdicts:
        if verdict.report is not None and "C7517" in verdict.report.codes:
            bad.append(f"{verdict.name}: the compiler waits for MMAs of its own accord (C7517)")
    return bad


def test_cases_are_the_kernels_that_are_launched() -> None:
    first, second = cases_for(PROBLEM)
    assert isinstance(first, Case) and {first.source, second.source} == {
        config_for(PROBLEM, 4, index_64=index_64).source() for index_64 in (True, False)
    }
    assert not list(cases_for(CASES["flash"].problem(recipe="fp32")))


def test_machine_code_of_a_sample_is_fit() -> None:
    assert faults(SAMPLE) == []


def test_machine_code_with_partial_sums_is_fit() -> None:
    assert faults(PARTIAL, partial_sums=True) == []
    assert faults(PARTIAL[2:3], partial_sums=True, num_shared=1) == []


def test_only_a_traced_kernel_reads_cycles() -> None:
    """A stopwatch of a kernel that is not traced leaves no instruction behind."""
    problem = CASES["qwen3"].problem(world_size=2)
    (case, _) = cases_for(problem)
    config = config_for(problem, problem.num_experts // 2, index_64=True)
    assert config.source() == case.source
    reads = {}
    for trace in (False, True):
        source = replace(config, trace=trace).source()
        text = sass(KernelCache().get(source).cubin, source.entry)
        reads[trace] = text.count("SR_CLOCKLO")
    assert reads[False] == 0 and reads[True] > 10


def test_a_drawn_ticket_is_not_awaited() -> None:
    """A copying warp's next ticket is on its way while it copies: ptxas gathers additions over the warp, and would have
    to tell the lanes what came of it (docs/performance.md); it leaves increments alone."""
    problem = CASES["qwen3"].problem(world_size=2, recipe="fp8_block")
    source = config_for(problem, problem.num_experts // 2, index_64=True).source()
    lines = [line for line in sass(KernelCache().get(source).cubin, source.entry).splitlines() if "/*" in line]
    drawn = [i for i, line in enumerate(lines) if "ATOMG.E.INC" in line]
    assert len(drawn) == 2  # before the loop, where it is wanted at once, and in it
    (ticket,) = re.findall(r"ATOMG\.E\.INC\S* PT, (R\d+),", lines[drawn[-1]])
    assert not any(re.search(rf"\b{ticket}\b", line) for line in lines[drawn[-1] + 1 : drawn[-1] + 40])


def test_machine_code_of_every_choice_is_fit(pytestconfig: pytest.Config) -> None:
    if not pytestconfig.getoption("--every-kernel"):
        pytest.skip("compiles a mega-kernel for every case and number of ranks: asked for with --every-kernel")
    assert faults(problems()) == []


@pytest.mark.parametrize("accumulate, wanted", [("fp32", 4), ("fast", 2)])
def test_warps_take_turns(accumulate: Accumulate, wanted: int, tmp_path: Path) -> None:
    """Behind each k-block's MMAs every second FFMA, of a promotion or of a chain's factor, lets the other warp go first
    (docs/performance.md)."""
    problem = replace(CASES["flash8"].problem(world_size=2, recipe="fp8_block"), accumulate=accumulate)
    code = with_hints(config_for(problem, problem.num_experts // 2, index_64=True).source(), tmp_path)
    mmas = [i for i, (name, _) in enumerate(code) if name.startswith("QGMMA")]
    loops = 0
    for last, following in itertools.pairwise([*mmas, len(code)]):
        if following - last < 80:  # the next of the same block of K, or of the second one queued
            continue
        hints = [hint for name, hint in code[last : min(last + 100, following)] if name.startswith("FFMA")]
        assert len(hints) >= 50 and sum(hints) >= 0.4 * len(hints), (last, len(hints), sum(hints))
        loops += 1
    assert loops == wanted  # promoted: two parts; pairs, and the last of an odd number. Chains: of many rows, of few
