"""Partial sums without a GPU: who asks for them, what they take of the workspace, when they are thought to pay."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch

from megamoe import costs
from megamoe.mega import partial_sums
from megamoe.mega.partial_sums import chosen, kept_bytes, partial_sums_pay, would_pay
from megamoe.mega.record import Records
from megamoe.mega.runner import config_for, workspace_for
from megamoe.problem import Problem
from megamoe.testing.cases import CASES

PROBLEM = Problem(hidden=128, intermediate=64, num_experts=8, top_k=2, world_size=2)
QWEN3 = CASES["qwen3"].problem(world_size=8, max_tokens=4096, recipe="fp8_block")


def test_rows_are_kept_behind_all_other_fields() -> None:
    plain, partial = (workspace_for(PROBLEM, 4, partial_sums=on) for on in (False, True))
    assert plain.arena.fields["returns"].num_bytes == 0
    assert partial.arena.fields["returns"].shape == (partial.max_blocks * 128, 128)
    assert {n: o for n, o in plain.arena.offsets.items() if n != "returns"} == {
        n: o for n, o in partial.arena.offsets.items() if n != "returns"
    }
    assert "returns" in partial.explain() and partial.arena != plain.arena
    assert partial.config == replace(plain.config, partial_sums=True)


def test_what_the_rows_take() -> None:
    """qwen3 on two ranks of 8192 tokens: 131072 rows of 4 KiB, and whole blocks."""
    problem = CASES["qwen3"].problem(world_size=2, max_tokens=8192, recipe="fp8_block")
    field = workspace_for(problem, 64, partial_sums=True).arena.fields["returns"]
    assert kept_bytes(problem) == 512 << 20 <= field.num_bytes < 544 << 20


def test_a_kernel_says_that_it_is_one() -> None:
    plain, partial = (config_for(PROBLEM, 4, index_64=True, partial_sums=on) for on in (False, True))
    assert "partial" in partial.name and "partial" not in plain.name
    assert "bool partial_sums = true;" in partial.source().code and "bool partial_sums = false;" in plain.source().code
    assert partial.smem_bytes == plain.smem_bytes


@pytest.mark.parametrize("text, wanted", [("on", True), ("off", False), ("auto", False)])
def test_the_environment_chooses_where_nobody_asks(text: str, wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAMOE_PARTIAL_SUMS", text)
    assert chosen(PROBLEM) == config_for(PROBLEM, 4, index_64=True).partial_sums == wanted
    for asked in (False, True):
        assert workspace_for(PROBLEM, 4, partial_sums=asked).config.partial_sums == asked


def test_a_choice_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="partial_sums must be True, False or None, got 'off'"):
        workspace_for(PROBLEM, 4, partial_sums="off")  # type: ignore[arg-type]


def test_auto_is_the_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEGAMOE_PARTIAL_SUMS", raising=False)
    assert would_pay(QWEN3) and not partial_sums_pay(QWEN3) and not chosen(QWEN3)
    monkeypatch.setattr(partial_sums, "_MEASURED_TO_PAY", True)
    assert partial_sums_pay(QWEN3) and chosen(QWEN3) and not chosen(QWEN3, False)


def test_they_pay_where_rows_on_their_way_back_take_long() -> None:
    floors = costs.floors(QWEN3, 4096, costs.H200)
    back = 4096 * costs.remote_routes(QWEN3) * 4096 / (costs.H200.nvlink_gb_s * 1e3)
    assert floors.compute_us == pytest.approx(220.9, abs=0.1) and back == pytest.approx(320.9, abs=0.1)
    assert not would_pay(replace(QWEN3, max_tokens=255))
    assert not would_pay(replace(QWEN3, max_tokens=8192))  # 2 GiB
    assert not would_pay(replace(QWEN3, world_size=1))
    assert not would_pay(replace(QWEN3, top_k=1))
    assert not would_pay(replace(QWEN3, intermediate=2048))  # the GEMMs take longer
    assert not would_pay(replace(QWEN3, recipe="fp32"))


def test_a_wait_for_kept_rows_becomes_a_sentence() -> None:
    records = Records(torch.device("cpu"))
    (ctypes.c_uint32 * 8).from_address(records.record)[:] = [9, 1, 1, 17, 0, 5, 4, 4]
    assert "rank 1 waited longer than" in str(records.error()) and "all rows of y" in str(records.error())
