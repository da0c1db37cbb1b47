"""``megamoe bench moe``: all of it that needs no GPU; one run with one, and one with two."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megamoe import cli
from megamoe.bench import moe, moe_peers, moe_report
from megamoe.bench.moe_check import check
from megamoe.bench.moe_data import Experts, Tokens, sample
from megamoe.bench.moe_sessions import BOUNDS
from megamoe.bench.results import Row, save
from megamoe.problem import Problem
from megamoe.testing.cases import CASES
from megamoe.testing.mega_activations import Activations
from megamoe.testing.mega_twin import layer
from megamoe.testing.timing import Timing
from tests.lm_case import environment
from tests.repo import ROOT

SMALL = Problem(hidden=128, intermediate=72, num_experts=6, top_k=3, world_size=2, max_tokens=24, recipe="fp8_block")
CPU = torch.device("cpu")


@pytest.mark.parametrize("recipe", ["bf16", "fp8_block", "mxfp4"])
def test_an_expert_is_the_same_wherever_it_is_made(recipe: str) -> None:
    experts = Experts(replace(SMALL, recipe=recipe, bias=True), CPU)
    made = experts.prepared(range(3, 6)).dequantise()
    for slot, expert in enumerate(range(3, 6)):
        one = experts.dense(expert)
        for name in ("w13", "w2", "b13", "b2"):
            assert torch.equal(getattr(one, name), getattr(made, name)[slot])
    assert not torch.equal(experts.dense(0).w2, experts.dense(1).w2)
    assert 0.5 < float(experts.dense(0).w13.std() * SMALL.hidden**0.5) < 2


def test_weights_in_bf16_are_the_prepared_ones() -> None:
    experts = Experts(replace(SMALL, recipe="bf16", bias=True), CPU)
    weights, one = experts.weights(range(2)), experts.dense(1)
    assert torch.equal(weights.w13[1].float(), one.w13) and weights.b2 is not None and one.b2 is not None
    assert torch.equal(weights.b2[1].float(), one.b2)


def test_tokens_and_samples() -> None:
    one, other = (Tokens.make(SMALL, rank, CPU) for rank in (0, 1))
    assert not torch.equal(one.x, other.x) and not torch.equal(one.topk_idx, other.topk_idx)
    assert all(len(set(row)) == 3 for row in one.topk_idx.tolist())
    assert torch.equal(one.first(5).x, one.x[:5])
    assert sample(5, 16).tolist() == [0, 1, 2, 3, 4]
    chosen = sample(8192, 16)
    assert len(chosen.unique()) == 16 and chosen[0] == 0 and chosen[-1] == 8191
    assert torch.equal(chosen, sample(8192, 16))


class OnCpu:
    """A session whose ys are the twin's, so that the check has something to look at."""

    def __init__(self, problem: Problem, *, mid_error: float = 0.0) -> None:
        self.problem, self.ranks, self.slots, self.bounds = problem, [0, 1], 3, BOUNDS["fp32"]
        self.experts = Experts(problem, CPU)
        self.inputs = [Tokens.make(problem, r, CPU) for r in self.ranks]
        self._mid_error = mid_error

    def ys(self, tokens: int) -> list[torch.Tensor]:
        given = [i.first(tokens) for i in self.inputs]
        form = {"problem": self.problem, "slots_per_rank": self.slots}
        twins = [layer(i.x, i.topk_idx, i.topk_weights, self.experts.dense, **form) for i in given]
        return [twin.y.bfloat16() for twin in twins]

    def activations(self, rank: int, at: torch.Tensor, topk_idx: torch.Tensor) -> Activations | None:
        if self.problem.recipe == "bf16":
            return None
        from megamoe.kernels.quant import reference as casts

        given = self.inputs[rank]
        form = {"problem": self.problem, "slots_per_rank": self.slots}
        exact = layer(given.x[at], topk_idx, given.topk_weights[at], self.experts.dense, **form).exact
        q, scale = casts.cast_1x128(exact)
        return Activations(q.float() * (1 + self._mid_error), scale)


@pytest.mark.parametrize("recipe", ["bf16", "fp8_block"])
def test_the_check_sees_one_wrong_row(recipe: str) -> None:
    session = OnCpu(replace(SMALL, recipe=recipe))
    ys = session.ys(20)
    assert 0 < check(session, 20, ys) < 1e-5  # type: ignore[arg-type]
    for value in (0.0, torch.nan):
        ys[1][19] = value
        with pytest.raises(AssertionError, match="y of rank 1, T = 20"):
            check(session, 20, ys)  # type: ignore[arg-type]


def test_the_check_sees_wrong_activations() -> None:
    session = OnCpu(SMALL, mid_error=0.05)
    with pytest.raises(AssertionError, match="activation off by"):
        check(session, 8, session.ys(8))  # type: ignore[arg-type]


class Measured(OnCpu):
    """All that a run asks of a session. y of 7 tokens is wrong."""

    def call(self, tokens: int, outs: list[torch.Tensor] | None = None) -> Any:
        return lambda: [y * (tokens != 7) for y in self.ys(tokens)]

    def check(self) -> None: ...

    def close(self) -> None: ...


def test_rows_of_the_kernel_with_partial_sums_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    here = moe.Run(device=CPU, group=None, world_size=2, virtual=False, engine="mega", sms=None)
    assert here.label_of(SMALL) == "mega"
    assert replace(here, partial_sums=True, virtual=True).label_of(SMALL) == "mega-partial-virtual"
    monkeypatch.setenv("MEGAMOE_PARTIAL_SUMS", "on")
    assert here.label_of(SMALL) == "mega-partial" and replace(here, partial_sums=False).label_of(SMALL) == "mega"
    assert replace(here, engine="staged").label_of(SMALL) == "staged"


def test_a_run_keeps_right_rows_and_fails_for_wrong_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole command but for the GPU's work."""
    monkeypatch.setattr(moe, "time_on_host", lambda call, before: Timing(10.0, 9.0, 11.0))
    monkeypatch.setattr(moe, "compile_ahead", lambda here, chosen: None)
    monkeypatch.setattr(moe, "machine_name", lambda: "2x NVIDIA H200")
    monkeypatch.setattr(moe.Run, "session", lambda self, problem: Measured(SMALL))
    monkeypatch.setattr(moe.Run, "device_name", "NVIDIA H200")
    here = moe.Run(device=CPU, group=None, world_size=2, virtual=False, engine="mega", sms=None)
    options = {"case": ["qwen3"], "recipe": ["fp8_block"], "accumulate": ["fp32"], "tokens": [7, 8, 1]}
    arguments = argparse.Namespace(**options, results=tmp_path, commit="abc", plot=tmp_path / "moe.png")
    assert moe._run(here, arguments) == 1
    (file,) = tmp_path.glob("moe-*.json")
    kept = json.loads(file.read_text())["rows"]
    assert [row["tokens"] for row in kept] == [1, 8] and all(row["us"] == 10 and row["us_min"] == 9 for row in kept)
    assert kept[1]["peers"] == {"numbers.md:deep_gemm-0.1.4.post1": 90, "numbers.md:flashinfer-0.7.2-push": 308}
    assert kept[1]["tflops"] == pytest.approx(6 * 8 * 3 * 128 * 72 / 10 / 1e6) and kept[1]["floor_us"] > 0
    assert (tmp_path / "moe.png").exists()
    printed = capsys.readouterr()
    assert "FAILED qwen3 fp8_block fp32 T = 7: y of rank 0" in printed.err and "T = 8 " in printed.out


def test_problems_have_room_for_the_most_tokens() -> None:
    found = moe.problems(["qwen3", "gptoss"], ["bf16"], ["fp32", "fast"], world_size=2, tokens=[1, 512])
    assert [(name, p.accumulate) for name, p in found] == [
        ("qwen3", "fp32"), ("gptoss", "fp32"), ("qwen3", "fast"), ("gptoss", "fast")
    ]  # fmt: skip
    assert all(p.max_tokens == 512 and p.world_size == 2 and p.recipe == "bf16" for _, p in found)
    assert found[1][1].bias and found[1][1].activation.name == "swiglu_clamped"


def test_published_figures_stand_beside_their_own_machine_alone() -> None:
    assert len([1 for case in ("flash", "flash8", "dsv3-8", "pro8", "qwen3") for T in moe.TOKENS
                if any("deep_gemm" in peer for peer in moe_peers.published(case, "fp8_block", T))]) == 36  # fmt: skip
    assert moe_peers.published("flash", "fp8_block", 8) == {"numbers.md:deep_gemm-0.2.5": 304.0}
    assert moe_peers.published("gptoss", "fp8_block", 8) == {}
    cell = ("qwen3", "bf16", 8192)
    assert moe_peers.comparable(*cell, machine="2x NVIDIA H200", world_size=2)["numbers.md:torch-compiled"] == 4273
    assert not moe_peers.comparable(*cell, machine="2x NVIDIA H100 80GB HBM3", world_size=2)
    assert not moe_peers.comparable(*cell, machine="2x NVIDIA H200", world_size=1)
    assert not moe_peers.comparable(*cell, machine="8x NVIDIA H200", world_size=2)
    eight = {"machine": "8x NVIDIA H200", "world_size": 8}
    assert moe_peers.comparable("flash", "fp8_block", 128, **eight) == {"published:deep_gemm-older": 269}
    assert moe_peers.comparable("flash", "fp8_block", 64, **eight) == {}
    assert {case for times in moe_peers._BY_RANKS.values() for case, _ in times} <= set(CASES)


def test_floors_are_those_of_the_gpu() -> None:
    problem = CASES["flash"].problem(world_size=2, recipe="fp8_block")
    assert moe.floor_us(problem, 8192, "NVIDIA H200") == pytest.approx(1767, rel=0.01)
    assert moe.floor_us(problem, 64, "NVIDIA H100 80GB HBM3") > moe.floor_us(problem, 64, "NVIDIA H200")  # type: ignore[operator]
    assert moe.floor_us(problem, 64, "NVIDIA A100") is None


def rows() -> list[Row]:
    common = {"recipe": "fp8_block", "accumulate": "fp32", "direction": "fwd", "world_size": 2, "engine": "mega"}
    return [
        {**common, "case": case, "tokens": T, "us": 2.0 * T, "us_min": 1.9 * T, "tflops": 500.0, "floor_us": floor,
         "diff": 4e-6, "peers": moe_peers.published(case, "fp8_block", T)}
        for case, floor in (("flash", 700.0), ("gptoss", None)) for T in (8, 512)
    ]  # fmt: skip


def test_report_and_result_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moe_report.show(rows(), machine="a machine")
    out = capsys.readouterr().out
    assert "a machine" in out and "304" in out and "best peer / ours: geometric mean" in out
    assert "x floor 700" in moe_report.line(rows()[0]) and "floor" not in moe_report.line(rows()[2])
    moe_report.plot(rows(), tmp_path / "moe.png", machine="a machine")
    assert (tmp_path / "moe.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="no row"):
        moe_report.plot([], tmp_path / "none.png", machine="")
    source = {"date": "2026-11-27", "commit": "abc", "command": "c", "versions": {}}
    found = [{**row, **source} for row in rows()]
    save(tmp_path, "moe", [*found, {**found[0], "sms": 64}], machine="CPU")
    path = save(tmp_path, "moe", [{**found[0], "us": 1.0}], machine="CPU")
    kept = json.loads(path.read_text())["rows"]
    assert len(kept) == 5 and [row["us"] for row in kept if row["case"] == "flash" and row["tokens"] == 8] == [
        1.0,
        16.0,
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_refusals_are_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "moe"]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    assert cli.main(["bench", "moe", "--virtual", "2", "--engine", "staged"]) == 2
    assert "--virtual needs the engine mega" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["bench", "moe", "--tokens", "0"])
    assert "must be a positive integer" in capsys.readouterr().err


def test_the_launch_script_is_the_command() -> None:
    script = [sys.executable, str(ROOT / "launch_scripts/bench_moe.py"), "--help"]
    done = subprocess.run(script, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0 and "--virtual R" in done.stdout, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_two_ranks_refuse_with_their_status() -> None:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "megamoe"]
    command = [*start, "bench", "moe", "--engine", "staged", "--recipe", "bf16"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(), timeout=200)
    assert done.returncode == 1 and "megamoe bench: bench moe needs a CUDA device" in done.stderr, done.stderr
    assert "exitcode  : 2 " in done.stderr, done.stderr  # a rank's; torchrun's own is 1


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["bf16", "fp8_block"])
@pytest.mark.parametrize("extra", [[], ["--virtual", "2"]], ids=["one", "virtual"])
def test_a_run_on_one_gpu(recipe: str, extra: list[str], tmp_path: Path) -> None:
    arguments = ["bench", "moe", "--case", "qwen3", "--tokens", "1", "300", "--recipe", recipe, *extra]
    plot = ["--plot", str(tmp_path / "moe.png")]
    assert cli.main([*arguments, *plot, "--results", str(tmp_path), "--commit", "abc"]) == 0
    (file,) = tmp_path.glob("moe-*.json")
    found = json.loads(file.read_text())["rows"]
    assert [(row["tokens"], row["world_size"]) for row in found] == [(1, len(extra) or 1), (300, len(extra) or 1)]
    assert all(row["us"] > 0 and 0 < row["diff"] < 1e-4 for row in found)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("engine", ["mega", "staged"])
def test_a_run_on_two_gpus(engine: str, tmp_path: Path) -> None:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*start, str(ROOT / "launch_scripts/bench_moe.py"), "--case", "qwen3", "--tokens", "8", "256"]
    command += ["--recipe", "bf16", "--engine", engine, "--results", str(tmp_path), "--commit", "abc"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(), timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("moe-*.json")
    found = json.loads(file.read_text())["rows"]
    assert [(row["tokens"], row["world_size"], row["engine"]) for row in found] == [(8, 2, engine), (256, 2, engine)]
