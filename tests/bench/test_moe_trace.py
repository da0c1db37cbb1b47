"""Tracing a call, all of it that needs no GPU: words of a kernel that were written by hand, in place of a launch."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megamoe import cli
from megamoe.bench import moe_trace
from megamoe.bench.moe_run import Run
from megamoe.commands import trace as command
from megamoe.problem import Problem
from megamoe.testing.timing import Timing
from tests.mega.test_trace import WRITTEN, written

PROBLEM = Problem(hidden=128, intermediate=72, num_experts=6, top_k=3, world_size=2, max_tokens=24, recipe="fp8_block")


class Session:
    """Two virtual ranks of two CTAs whose calls take no time; ``wrong``: the traced kernel's y is another."""

    def __init__(self, problem: Problem, *, wrong: bool = False) -> None:
        self.problem, self.ranks = problem, [0, 1]
        self.runners = [SimpleNamespace(num_sms=2)] * 2
        self._wrong = wrong

    def call(self, tokens: int, traces: list[torch.Tensor] | None = None) -> Any:
        def run() -> list[torch.Tensor]:
            for rank, trace in enumerate(traces or []):
                trace.copy_(written(room=8, shift=300 * rank))
            return [torch.full((tokens, 4), float(self._wrong and traces is not None)) for _ in self.ranks]

        return run

    def check(self) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(moe_trace, "time_call", lambda call, before: Timing(10.0, 9.0, 11.0))
    monkeypatch.setattr(moe_trace, "cold_l2", lambda: lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return Run(device=torch.device("cpu"), group=None, world_size=2, virtual=True, engine="mega", sms=None)


def test_a_call_becomes_a_row_and_files(here: Run, tmp_path: Path) -> None:
    traced = moe_trace.record(here, Session(PROBLEM), 24, ctas=1, events=8)  # type: ignore[arg-type]
    assert traced.ctas == [0] and [t.rank for t in traced.aligned.timelines] == [0, 1]
    row = moe_trace.make_row(here, "qwen3", PROBLEM, 24, traced)
    assert (row["us"], row["us_traced"], row["engine"], row["dropped"]) == (10.0, 10.0, "mega-virtual", 0)
    assert row["hidden"] == pytest.approx(1 / 6) and row["exposed_us"] == pytest.approx(4.5)
    assert row["math"] == pytest.approx((0.4 + 0.2) / 2) and row["roles"]["math"]["gemm_1"] == 0.2
    assert "nvlink_us" not in row and "communication hidden 16.7%, exposed 4.5 us, awaited 2.3" in moe_trace.line(row)
    timeline, figure = moe_trace.keep(tmp_path, row, traced)
    assert timeline.name == "trace-qwen3-fp8_block-r2-t24.json" and figure.stat().st_size > 20_000
    content = json.loads(timeline.read_text())
    drawn = [e for e in content["traceEvents"] if e["ph"] == "X"]
    assert len(drawn) == 2 * (len(WRITTEN) + 5) and content["otherData"]["us"] == 10.0


def test_nvlink_is_asked_of_real_ranks_alone(monkeypatch: pytest.MonkeyPatch, here: Run) -> None:
    traced = moe_trace.record(here, Session(PROBLEM), 24, ctas=8, events=8)  # type: ignore[arg-type]
    monkeypatch.setattr(Run, "device_name", "NVIDIA H200")
    real = Run(device=here.device, group=None, world_size=2, virtual=False, engine="mega", sms=64)
    row = moe_trace.make_row(real, "qwen3", PROBLEM, 24, traced)
    assert row["nvlink_us"] > 0 and row["nvlink_hidden"] == pytest.approx(1 - 4.5 / row["nvlink_us"])
    assert row["nvlink_unawaited"] == pytest.approx(1 - 2.3 / row["nvlink_us"])
    assert row["sms"] == 64 and "of NVLink" in moe_trace.line(row)


def test_another_y_is_refused(here: Run) -> None:
    with pytest.raises(AssertionError, match="y of the traced kernel, T = 24, is not that"):
        moe_trace.record(here, Session(PROBLEM, wrong=True), 24, ctas=1, events=8)  # type: ignore[arg-type]


def test_the_command(here: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(command, "join", lambda **options: here)
    monkeypatch.setattr(command, "compile_ahead", lambda run, chosen, traced: None)
    monkeypatch.setattr(Run, "mega", lambda self, problem: Session(problem))
    arguments = ["trace", "--case", "flash8", "256/128/8/2", "--tokens", "8", "4", "--events", "8", "--ctas", "2"]
    where = ["--out", str(tmp_path), "--results", str(tmp_path / "results"), "--commit", "abc"]
    assert cli.main([*arguments, *where]) == 0
    assert len(list(tmp_path.glob("trace-*.json"))) == len(list(tmp_path.glob("trace-*.png"))) == 4
    rows = json.loads(next((tmp_path / "results").glob("trace-*.json")).read_text())["rows"]
    assert [(row["case"], row["tokens"]) for row in rows] == [
        ("256/128/8/2", 4), ("256/128/8/2", 8), ("flash8", 4), ("flash8", 8)
    ]  # fmt: skip
    assert "flash8 fp8_block T = 8: 10.0 us untraced" in capsys.readouterr().out


def test_a_case_is_a_name_or_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["trace", "--case", "flash9", "--out", "x"])
    assert "a case must be one of flash" in capsys.readouterr().err
