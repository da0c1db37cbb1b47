"""``megamoe bench scale``: its parts without GPUs, two gloo ranks through all of it, and a short run on two GPUs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megamoe import cli, costs
from megamoe.bench import scale_lost, scale_random, scale_soak, scale_tables
from megamoe.bench.moe_check import check
from megamoe.bench.moe_run import Run
from megamoe.bench.moe_torch import PlainTorch
from megamoe.bench.scale_run import Budget, Report, Scale
from megamoe.mega.runner import config_for, why_not
from megamoe.problem import Problem
from megamoe.testing import routing
from megamoe.testing.cases import CASES, case_of
from megamoe.testing.ranks import RankDied, RankPool
from tests.lm_case import environment
from tests.repo import ROOT

RECIPES = ("fp8_block", "bf16")
CPU = Run(device=torch.device("cpu"), group=None, world_size=8, virtual=False, engine="mega", sms=None)


def scale_of(run: Run) -> Scale:
    return Scale(run, Budget(100, run.all), Report(None, {}))


def test_time_is_spent_on_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    budget = Budget(100, lambda value: [value])
    assert budget.fits("cell", 99) and not budget.fits("cell", 101)
    now[0] += 20
    budget.took("cell", 1000.0)
    budget.took("cell", 1015.0)
    assert budget.fits("cell", 999), "the longest so far counts, not the guess"
    budget.keep(70)
    assert budget.left == 10 and not budget.fits("cell", 1)
    budget.keep(0)
    now[0] += 61
    assert not budget.fits("cell", 1) and budget.fits("other", 19)
    assert not Budget(100, lambda value: [False, value]).fits("cell", 1), "the first rank decides"


def test_recipes_are_measured_in_turn_with_room_for_their_tokens() -> None:
    plan = scale_tables.Plan(cases=("flash", "qwen3"), recipes=RECIPES, tokens=(1, 512), traced=(128, 8192))
    found = plan.problems(8)
    assert [(case, p.recipe, p.max_tokens) for case, p in found] == [
        ("flash", "fp8_block", 8192), ("qwen3", "fp8_block", 8192), ("flash", "bf16", 512), ("qwen3", "bf16", 512)
    ]  # fmt: skip
    assert all(p.world_size == 8 for _, p in found)
    assert not replace(plan, tokens=(), traced=()).problems(8)
    assert [p.recipe for _, p in replace(plan, tokens=()).problems(8)] == ["fp8_block"] * 2


@pytest.mark.parametrize("name", ["flash", "dsv3", "pro", "qwen3"])
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_everything_fits_on_one_h200_a_rank(name: str, world_size: int) -> None:
    for recipe in RECIPES:
        problem = CASES[name].problem(world_size=world_size, recipe=recipe)
        weights = costs.slots_per_rank(problem) * sum(costs.expert_bytes(problem).values())
        assert weights + (3 << 30) < scale_tables.needed_bytes(problem) < 130 << 30


def test_what_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = CASES["dsv3"].problem(world_size=8, recipe="fp8_block")
    at = {T: scale_tables.needed_bytes(replace(problem, max_tokens=T)) for T in (1, 512, 8192)}
    assert at[1] < at[512] < at[8192]
    gpu = replace(CPU, device=torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    for free, most in ((at[8192], 8192), (at[8192] - 1, 512), (at[1], 1), (at[1] - 1, None)):
        scale = scale_of(gpu)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 1 << 40))
        found = scale_tables.that_fits(scale, problem, [8192, 1, 512], "dsv3 fp8_block")
        assert (None if found is None else found.max_tokens) == most
        left_out = [T for T in at if at[T] > free]
        assert len(scale.report.skipped) == bool(left_out)
        if left_out:
            assert f"dsv3 fp8_block T = {', '.join(map(str, left_out))}: needs" in scale.report.skipped[0]
    assert scale_tables.that_fits(scale_of(CPU), problem, [8192], "") is problem


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_random_problems_need_no_kernel_but_those_made_ahead(world_size: int) -> None:
    def source(problem: Problem) -> object:
        slots = costs.slots_per_rank(problem)
        assert why_not(problem, slots) is None
        return config_for(problem, slots, index_64=True).source()

    ahead = {source(problem) for problem in scale_random.kernels(world_size, RECIPES)}
    draws = [scale_random.draw(seed, world_size, RECIPES) for seed in range(300)]
    assert {source(d.problem) for d in draws} <= ahead and len(ahead) <= 20
    assert {d.problem.recipe for d in draws} == set(RECIPES) and {d.kind for d in draws} == set(routing.KINDS)
    assert any(0 in d.tokens for d in draws) and all(max(d.tokens) <= d.problem.max_tokens for d in draws)
    assert draws[7] == scale_random.draw(7, world_size, RECIPES)
    assert "seed 7" in str(draws[7])


def _plain(rank: int, world_size: int, group: dist.ProcessGroup) -> list[float]:
    """d of the baseline, for several T."""
    problem = Problem(hidden=128, intermediate=72, num_experts=6, top_k=3, world_size=world_size, max_tokens=40)
    session = PlainTorch(problem, device=torch.device("cpu"), group=group)
    return [check(session, T, session.call(T)(), count=40) for T in (1, 17, 40)]


def test_plain_pytorch_is_right(ranks: Callable[[int], RankPool]) -> None:
    for found in [_plain(0, 1, None), *ranks(2).run(_plain), *ranks(3).run(_plain)]:  # type: ignore[arg-type]
        assert all(0 < d < 3e-5 for d in found)


def test_plain_pytorch_refuses_in_a_sentence() -> None:
    for change in ({"recipe": "fp8_block"}, {"bias": True}, {"weights_applied": "before_down"}):
        problem = replace(CASES["qwen3"].problem(), **change)
        with pytest.raises(ValueError, match="baseline is bf16, no bias"):
            PlainTorch(problem, device=torch.device("cpu"), group=None)


def survivor(**changes: Any) -> dict[str, Any]:
    error = "rank 0 waited longer than MEGAMOE_TIMEOUT_S (6 s) for rank 3 to start its call: block 1"
    return {
        "error": error,
        "seconds": 6.5,
        "y was not all NaN": False,
        "no GEMM ran": False,
        "new group": "",
        **changes,
    }


def test_answers_of_ranks_that_lost_one() -> None:
    good, died = survivor(), RankDied("rank 3 of 4 ended with status -9")
    assert scale_lost.judge([good, survivor(seconds=7.0), good, died]) == scale_lost.Lost((), 7.0)
    for answers, text in (
        ([good, good, good, {}], "the last rank was to be killed"),
        ([good, good, RuntimeError("no memory"), died], "rank 2: no memory"),
        ([good, {}, good, died], "rank 1 made 1000 calls without a PeerTimeout"),
        ([survivor(seconds=30.0), good, good, died], "rank 0 waited 30.0 s, the limit is 6"),
        ([good, survivor(**{"y was not all NaN": True}), good, died], "rank 1: y was not all NaN"),
        ([good, survivor(**{"no GEMM ran": True}), good, died], "rank 1: no GEMM ran"),
        ([good, good, survivor(**{"new group": "AssertionError: y"}), died], "rank 2 in the new group: AssertionError"),
        ([survivor(error="for rank 2 to")] * 3 + [died], "no rank named rank 3"),
    ):
        wrong = scale_lost.judge(answers).wrong
        assert len(wrong) == 1 and text in wrong[0], wrong
    for ranks in (2, 4, 8):
        for size in (ranks, ranks - 1):
            problem = scale_lost.problem(size, "fp8_block")
            assert why_not(problem, costs.slots_per_rank(problem)) is None and problem.num_experts % size == 0


def run_scale(folder: Path, *arguments: str, limit_s: float) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*start, str(ROOT / "launch_scripts/scale.py"), "--out", str(folder), "--commit", "abc", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment(), timeout=limit_s)


def rows_of(folder: Path, benchmark: str) -> list[dict[str, Any]]:
    (file,) = (folder / "results").glob(f"{benchmark}-*.json")
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"]
    return rows


TINY = ("--engine", "reference", "--case", "64/40/8/2", "--tokens", "1", "16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_what_an_engine_cannot_do_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--out", str(tmp_path), "--commit", "abc", "--recipe", "fp8_block", "bf16", "--problems", "4"]
    assert cli.main(["bench", "scale", *TINY, *options]) == 1
    out = capsys.readouterr().out
    assert "skipped 64/40/8/2 fp8_block: ValueError: the engine reference is timed in bf16" in out
    assert re.search(r"FAILED random problem, seed \d: fp8_block.*ValueError: the engine reference is timed", out)
    assert {row["recipe"] for row in rows_of(tmp_path, "moe")} == {"bf16"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_no_time_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--out", str(tmp_path), "--commit", "abc", "--recipe", "bf16", "--problems", "4", "--seconds", "0.1"]
    assert cli.main(["bench", "scale", *TINY, *options]) == 0
    out = capsys.readouterr().out
    assert "skipped 4 of 4 random problems: no time" in out and "skipped 64/40/8/2 bf16: no time" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_two_ranks_on_cpus_through_all_of_it(tmp_path: Path) -> None:
    done = run_scale(tmp_path, *TINY, "--recipe", "bf16", "--problems", "2", limit_s=200)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {(row["engine"], row["tokens"]): row for row in rows_of(tmp_path, "moe")}
    assert set(found) == {("reference", 1), ("reference", 16), ("torch", 1), ("torch", 16)}
    assert found["reference", 16]["peers"] == {scale_tables.TORCH: found["torch", 16]["us"]}
    (checked,) = [row for row in rows_of(tmp_path, "scale") if row["recipe"] == "bf16"]
    assert (checked["what"], checked["count"], checked["wrong"]) == ("random problems", 2, 0)
    assert (tmp_path / "moe.png").stat().st_size > 5000
    assert "skipped the lost rank" in done.stderr and "skipped the traces" in done.stderr


class Forgets(Run):
    """A run whose engine gives other numbers in a column from some call on: by how much, in units of themselves."""

    after, off = 10**9, 0.0

    def session(self, problem: Problem) -> Any:
        session, seen = super().session(problem), [0]
        make = session.call

        def call(tokens: int, outs: Any = None) -> Any:
            inner = make(tokens, outs)

            def one() -> list[torch.Tensor]:
                seen[0] += 1
                factor = 1 + self.off * (seen[0] > self.after)
                return [torch.cat([y[:, :1] * factor, y[:, 1:]], dim=1) for y in inner()]

            return one

        session.call = call  # type: ignore[method-assign]
        return session


def test_a_soak_sees_what_drifts() -> None:
    def outcome(after: int, off: float) -> scale_soak.Outcome:
        run = Forgets(device=torch.device("cpu"), group=None, world_size=1, virtual=False, engine="reference", sms=None)
        object.__setattr__(run, "after", after)
        object.__setattr__(run, "off", off)
        left = iter(range(12))
        return scale_soak.run(run, recipes=("bf16",), go_on=lambda: next(left, None) is not None)

    good, little, much = outcome(10**9, 0.0), 2.0**-7, 0.5
    assert (good.calls, good.wrong) == (96, ())
    assert "two calls of the same tokens differ" in outcome(8 * 6 + 4, little).wrong[0]
    assert outcome(8 * 12, little).wrong == ("the first round has other bits now",)
    assert "round 11" in outcome(8 * 11, much).wrong[0]  # the one that is held against the reference
    layers = scale_soak.problems(2, ("fp8_block", "bf16", "fp8_row"), on_gpu=True)
    assert [p.accumulate for p in layers] == ["fp32", "fast", "fp32", "fp32", "fast"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_refusals_are_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "scale", "--out", str(tmp_path)]) == 2
    assert "the engine mega needs a CUDA device" in capsys.readouterr().err
    assert case_of("7168/2048/256/8").problem().top_k == 8
    with pytest.raises(ValueError, match="H/I/E/K in numbers, got '7168/2048/256'"):
        case_of("7168/2048/256")


@pytest.mark.multi_gpu
def test_a_short_run_on_two_gpus(tmp_path: Path) -> None:
    done = run_scale(
        tmp_path, "--case", "2048/768/32/4", "--tokens", "8", "256", "--trace-tokens", "64", "--problems", "4",
        "--seconds", "250", limit_s=290,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert {(r["engine"], r["recipe"], r["tokens"]) for r in rows_of(tmp_path, "moe")} == {
        ("mega", "fp8_block", 8), ("mega", "fp8_block", 256), ("mega", "bf16", 8), ("mega", "bf16", 256),
        ("torch", "bf16", 8), ("torch", "bf16", 256),
    }  # fmt: skip
    assert [(r["what"], r["wrong"]) for r in rows_of(tmp_path, "scale")] == [("lost rank", 0), ("random problems", 0)]
    (trace,) = rows_of(tmp_path, "trace")
    assert trace["tokens"] == 64 and len(list((tmp_path / "traces").glob("*.png"))) == 1
