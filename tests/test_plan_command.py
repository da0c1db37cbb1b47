"""``python -m megamoe plan``: its tables carry the figures of costs and the planner; nonsense is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megamoe.cli import main
from megamoe.commands.plan import busiest_crossings, size
from megamoe.commands.plan_load import choose_placement, sample_load
from megamoe.costs import GPUS, floors, uniform_crossings
from megamoe.problem import Problem
from megamoe.testing.cases import CASES


def small(**changes: int) -> Problem:
    sizes = {"hidden": 64, "intermediate": 64, "num_experts": 16, "top_k": 2, "world_size": 4, **changes}
    return Problem(**sizes)  # type: ignore[arg-type]


def test_tables_of_flash(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--case", "flash", "--ranks", "2", "--tokens", "4096"]) == 0
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines()]
    problem = CASES["flash"].problem(world_size=2, max_tokens=4096, recipe="fp8_block")
    assert ["512", "704", "110", "17", "704", "memory"] in rows
    expected = floors(problem, 4096, GPUS["h200"])
    assert expected.bound_by == "compute" and expected.us == pytest.approx(884, abs=0.5)
    sent = size(uniform_crossings(problem, 4096).partial_sums)
    assert any(
        row[:6] == ["one", "crossing", "out,", "partial", "sums", "back"] and sent in " ".join(row) for row in rows
    )
    assert any(row[:3] == ["weights", "w13", "local"] for row in rows)
    ranks = [
        row[0] for row in rows[text.splitlines().index(next(t for t in text.splitlines() if "What more" in t)) :] if row
    ]
    assert {"1", "2", "64", "1024"} <= set(ranks)
    assert "…" not in text, "no figure is cut off"


@pytest.mark.parametrize("name", CASES)
def test_every_case_plans(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--case", name, "--tokens", "16", "--recipe", "mxfp4", "--gpu", "h100"]) == 0
    assert "not measured" in " ".join(capsys.readouterr().out.split())


def test_figure_is_a_png(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.png"
    assert main(["plan", "--case", "qwen3", "--tokens", "64", "--png", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000
    assert main(["plan", "--tokens", "1", "--png", str(tmp_path / "no" / "plan.png")]) == 2
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.parametrize("tokens", [0, 1, 300])
def test_loads_add_up(tokens: int) -> None:
    problem = small(max_tokens=tokens)
    load = sample_load(problem, choose_placement(problem, "balanced", 0, 0), tokens, "balanced", 0)
    assert float(load.routes.sum()) == pytest.approx(4 * tokens * 2)
    assert float(load.rows_away.sum()) == pytest.approx(float(load.rows_from_away.sum()))
    assert float(load.routes_away.sum()) == pytest.approx(float(load.routes_from_away.sum()))
    ways = busiest_crossings(problem, load)
    assert ways["partial_sums"] <= ways["one_crossing"] <= ways["per_route"]


def test_even_routing_crosses_what_costs_expect() -> None:
    problem = small(max_tokens=8000)
    load = sample_load(problem, choose_placement(problem, "balanced", 0, 0), 8000, "balanced", 0)
    expected = uniform_crossings(problem, 8000)
    for name, busiest in busiest_crossings(problem, load).items():
        assert busiest == pytest.approx(getattr(expected, name), rel=0.03)


def test_copies_even_the_load_and_left_over_slots_hold_some() -> None:
    problem = small(num_experts=64, max_tokens=2000)
    uneven, even = (
        sample_load(problem, choose_placement(problem, "zipf", n, 0), 2000, "zipf", 0).routes for n in (0, 1)
    )
    assert float(even.max() / even.mean()) < 1.1 < float(uneven.max() / uneven.mean())
    assert choose_placement(small(num_experts=15), "balanced", 0, 0).slots_per_rank == 4


def test_more_ranks_than_experts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--case", "mixtral", "--ranks", "24", "--tokens", "64"]) == 0
    assert "1 expert slots a rank" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--top-k", "300"], "top_k must be at most 16 and at most num_experts (256), got 300"),
        (["--ranks", "0"], "world_size must be an integer of at least 1, got 0"),
        (["--tokens", "-1"], "max_tokens must be an integer of at least 0, got -1"),
        (["--chunks", "0"], "chunks must be at least 1, got 0"),
        (["--redundant", "999"], "1127 slots a rank need as many experts, got 256"),
        (["--hidden", "100"], "hidden must be a multiple of 8"),
    ],
)
def test_nonsense_is_refused(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_sizes_for_people() -> None:
    assert [size(n) for n in (0, 1023, 1536, 2**20, 3 * 2**30, 2**42)] == [
        "0 B", "1023 B", "1.50 KiB", "1.00 MiB", "3.00 GiB", "4096.00 GiB",
    ]  # fmt: skip


def test_empty_routing_has_no_imbalance() -> None:
    problem = small(max_tokens=0)
    load = sample_load(problem, choose_placement(problem, "zipf", 0, 0), 0, "zipf", 0)
    assert torch.equal(load.routes, torch.zeros(4, dtype=torch.float64))
