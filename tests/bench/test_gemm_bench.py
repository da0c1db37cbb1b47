"""``megamoe bench gemm``: arguments, cases, rows and means without a GPU (twins, a fake clock), small runs with one."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megamoe import cli
from megamoe.bench import gemm, gemm_cases, gemm_ours, gemm_report
from megamoe.bench.gemm_cases import Case, cases
from megamoe.bench.results import KEYS
from megamoe.testing.timing import Timing


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    gemm.add(parser.add_subparsers())
    return parser.parse_args(["gemm", *words])


def clock(*times: float) -> Callable[[Callable[[], object]], Timing]:
    """A timer that runs the call and answers ``times`` in turn."""
    left = list(times)

    def timer(call: Callable[[], object]) -> Timing:
        call()
        us = left.pop(0)
        return Timing(us, us / 2, us * 2)

    return timer


def test_arguments() -> None:
    usual = parse()
    assert usual.recipe == ["bf16", "fp8_block"] and usual.m == [64, 128, 4096, 8192] and usual.groups is None
    given = parse("--shape", "576x7168", "8X16", "--groups", "32x4x4096x2048", "--warm-peers", "14")
    assert given.shape == [(576, 7168), (8, 16)] and given.groups == [(32, 4, 4096, 2048)] and given.warm_peers == 14


@pytest.mark.parametrize("words", [("--shape", "576"), ("--groups", "1x2x3"), ("--shape", "0x8"), ("--recipe", "fp4")])
def test_bad_arguments_are_refused(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(*words)
    assert words[1] in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "gemm"]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_cases_are_distinct_and_decode_reads_many_weights() -> None:
    chosen = list(cases(gemm_cases.RECIPES, gemm_cases.GROUPINGS))
    by_k = 2 * len(gemm_cases.CONTIGUOUS)  # not with scales per row
    assert len(set(chosen)) == len(chosen) == 3 * (4 * 10 + len(gemm_cases.CONTIGUOUS) + len(gemm_cases.MASKED)) + by_k
    assert all(case.n % 8 == 0 and case.k % 128 == 0 for case in chosen)
    assert all(max(case.counts) <= case.most for case in chosen if case.grouping == "masked")
    decode = [case for case in chosen if case.grouping == "masked" and case.rows <= 16 and case.recipe != "bf16"]
    assert {case.rows for case in decode} == {1, 4, 16}
    assert all(case.groups * case.n * case.k >= 400e6 for case in decode)
    # Keys of result files hold valid rows: they tell cases apart and come out the same on every run.
    keys = {(case.grouping, case.recipe, case.groups, sum(case.counts), case.n, case.k) for case in chosen}
    assert len(keys) == len(chosen)
    assert [case.counts for case in chosen] == [case.counts for case in cases(gemm_cases.RECIPES, gemm_cases.GROUPINGS)]


def test_layouts_are_those_of_training_in_bf16() -> None:
    chosen = list(cases(gemm_cases.RECIPES, gemm_cases.GROUPINGS, layouts=gemm_cases.LAYOUTS))
    assert len(set(chosen)) == len(chosen)
    turned = [case for case in chosen if case.layout != "nt"]
    assert {(case.grouping, case.layout) for case in turned} == {
        ("dense", "nn"), ("dense", "tn"), ("dense", "tt"), ("contiguous", "nn"),
    }  # fmt: skip
    assert {case.recipe for case in turned} == {"bf16"} and min(case.rows for case in turned) >= 256
    assert {case.rows for case in turned if case.grouping == "dense"} == {4096, 8192}


@pytest.mark.parametrize("layout", ["nn", "tn", "tt"])
def test_a_row_of_another_layout(layout: gemm_cases.Layout) -> None:
    case = Case(recipe="bf16", grouping="dense", groups=1, rows=24, n=160, k=256, layout=layout)
    data = gemm_cases.make(case, "cpu")
    assert (data.a.stride(0) == 1, data.b.stride(0) == 1) == (layout[0] == "t", layout[1] == "n")
    row, notes = gemm.measure(case, timer=clock(4.0, 6.0), device="cpu")
    assert row["layout"] == layout and f"_{layout}_" in row["config"] and row["peers"] == {"torch.mm": 6.0}
    assert gemm_report.kind(row) == f"dense {layout}" and not notes


def test_a_row_of_weight_gradients() -> None:
    case = Case(recipe="fp8_block", grouping="k", groups=3, rows=100, n=160, k=256)
    row, notes = gemm.measure(case, timer=clock(4.0, 8.0), device="cpu")
    assert row["out"] == "f32" and "_vector_k_" in row["config"] and not notes
    assert row["peers"] == {"torch._grouped_mm in bf16": 8.0}
    assert row["gbps"] == pytest.approx((case.m * (160 + 256) + 4 * 3 * 160 * 256) / 4e3)
    case = Case(recipe="bf16", grouping="k", groups=3, rows=100, n=160, k=256)
    row, notes = gemm.measure(case, timer=clock(4.0, 5.0), device="cpu")
    assert row["peers"] == {"torch._grouped_mm": 5.0} and row["out"] == "bf16" and not notes


@pytest.mark.parametrize("grouping", [grouping for grouping in gemm_cases.GROUPINGS if grouping != "k"])
@pytest.mark.parametrize("recipe", gemm_cases.RECIPES)
def test_a_row_has_its_fields(recipe: gemm_cases.Recipe, grouping: gemm_cases.Grouping) -> None:
    groups = 1 if grouping == "dense" else 3
    case = Case(recipe=recipe, grouping=grouping, groups=groups, rows=7, n=160, k=256)
    row, _ = gemm.measure(case, timer=clock(4.0), device="cpu", with_peers=False)
    assert set(KEYS["gemm"]) - set(row) == {"accumulate", "layout"}
    m = sum(case.counts)
    weight_bytes = 2 if recipe == "bf16" else 1
    assert row["m"] == m and row["us"] == 4 and row["us_min"] == 2 and row["peers"] == {} and row["ratios"] == {}
    assert row["tflops"] == pytest.approx(2 * m * 160 * 256 / 4e6)
    assert row["gbps"] == pytest.approx((weight_bytes * 256 * (m + groups * 160) + 2 * m * 160) / 4e3)
    assert 0 < row["diff"] < 1e-5 and grouping in row["config"]


def test_peers_are_timed_in_turn() -> None:
    case = Case(recipe="bf16", grouping="dense", groups=1, rows=16, n=64, k=128)
    row, notes = gemm.measure(case, timer=clock(4.0, 6.0), device="cpu")
    assert row["peers"] == {"torch.mm": 6.0} and not notes
    assert row["ratios"] == {"torch.mm": 1.5, gemm_report.BEST: 1.5}


def test_other_configurations_are_checked_and_timed() -> None:
    case = Case(recipe="fp8_block", grouping="masked", groups=3, rows=7, n=160, k=256)
    row, _ = gemm.measure(case, timer=clock(4.0, 5.0, 6.0), device="cpu", tries=3)
    assert row["us"] == 4 and sorted(row["tried"].values()) == [5, 6] and row["config"] not in row["tried"]
    assert set(row["tried"]) | {row["config"]} == {config.name for config in gemm_ours.likely(case, 3)}
    assert row["floor_us"] == pytest.approx(case.num_bytes / 4.65e6)


def test_kernels_of_cases_are_compiled_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAMOE_CACHE_DIR", str(tmp_path))
    words = ["--recipe", "fp8_block", "--grouping", "masked", "--groups", "32x4x4096x2048", "--compile"]
    assert cli.main(["bench", "gemm", *words]) == 0
    assert [path.name.rsplit("-", 1)[0] for path in tmp_path.glob("gemm_*")] == [
        gemm_ours.likely(Case(recipe="fp8_block", grouping="masked", groups=32, rows=4, n=4096, k=2048), 1)[0].name
    ]


def test_a_missing_or_wrong_peer_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(data: gemm_cases.Data) -> gemm_ours.Contender:
        raise NotImplementedError("no such kernel\nat all")

    def wrong(data: gemm_cases.Data) -> gemm_ours.Contender:
        return gemm_ours.Contender(lambda: torch.ones(data.a.shape[0], data.case.n))

    monkeypatch.setattr(gemm, "peers", lambda data: [("absent", absent), ("wrong", wrong)])
    case = Case(recipe="bf16", grouping="dense", groups=1, rows=16, n=64, k=128)
    row, notes = gemm.measure(case, timer=clock(4.0), device="cpu")
    assert row["peers"] == {} and notes[0] == "absent: NotImplementedError: no such kernel"
    assert notes[1].startswith("wrong: not timed, d =")


def test_a_wrong_result_is_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(recipe="bf16", grouping="dense", groups=1, rows=16, n=64, k=128)
    for value in (1.0, float("nan")):
        broken = gemm_ours.Contender(lambda value=value: torch.full((16, 64), value))  # type: ignore[misc]
        monkeypatch.setattr(gemm, "ours", lambda data, broken=broken: broken)
        with pytest.raises(gemm.WrongResultError, match="exceeds 1e-05"):
            gemm.measure(case, timer=clock(), device="cpu")


def test_tf32_comes_back() -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        with pytest.raises(KeyError), gemm.full_fp32():
            assert not torch.backends.cuda.matmul.allow_tf32
            raise KeyError
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def rows() -> list[dict[str, object]]:
    row = {"recipe": "bf16", "grouping": "dense", "groups": 1, "rows": 64, "m": 64, "n": 8, "k": 128, "us": 2.0}
    row |= {"tflops": 1.0, "gbps": 1.0, "diff": 1e-6}
    return [row | {"peers": {"x": 2.0, "y": 8.0}}, row | {"rows": 128, "m": 128, "peers": {"x": 8.0}}]


def test_means() -> None:
    assert gemm_report.geometric_mean([1, 4, 16]) == pytest.approx(4)
    with pytest.raises(ValueError, match="at least one"):
        gemm_report.geometric_mean([])
    found = {entry[2:4]: entry[4:] for entry in gemm_report.summary(rows())}
    assert found["64", "x"] == (1, pytest.approx(1), 1) and found["128", "x"] == (1, pytest.approx(4), 4)
    assert found["all", "x"] == (2, pytest.approx(2), 1) and found["all", "y"] == (1, pytest.approx(4), 4)
    assert found["all", gemm_report.BEST] == (2, pytest.approx(2), 1)


def test_tables_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gemm_report.show(rows())
    printed = capsys.readouterr().out
    assert "4.000" in printed and "geometric mean" in printed and gemm_report.BEST in printed
    gemm_report.plot(rows(), tmp_path / "sub" / "ratios.png")
    assert (tmp_path / "sub" / "ratios.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="no row has a peer"):
        gemm_report.plot([], tmp_path / "none.png")


@pytest.mark.gpu
@pytest.mark.parametrize("grouping", gemm_cases.GROUPINGS)
def test_a_run_merges_rows(grouping: str, tmp_path: Path) -> None:
    words = ["bench", "gemm", "--grouping", grouping, "--m", "64", "--shape", "512x1024", "--groups", "4x20x512x1024"]
    words += ["--recipe", *gemm_cases.RECIPES, "--out", str(tmp_path), "--commit", "abc"]
    assert cli.main([*words, "--plot", str(tmp_path / "plot.png")]) == 0
    (file,) = tmp_path.glob("gemm-*.json")
    found = json.loads(file.read_text())["rows"]
    recipes = {"bf16", "fp8_block"} if grouping == "k" else set(gemm_cases.RECIPES)
    assert {row["recipe"] for row in found} == recipes
    assert all(row["us"] > 0 and row["diff"] < 1e-5 and row["commit"] == "abc" for row in found)
    if grouping == "dense":
        assert all("torch.mm" in row["peers"] for row in found if row["recipe"] == "bf16")


@pytest.mark.gpu
def test_warming_and_a_spent_budget(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["bench", "gemm", "--grouping", "dense", "--m", "64", "--shape", "512x1024", "--recipe", "bf16"]
    assert cli.main([*small, "--warm-peers", "1"]) == 0
    assert "warmed 1 of 1 cases" in capsys.readouterr().out
    assert cli.main([*small, "--seconds", "0"]) == 0
    assert "stopped after 0 of 1 cases" in capsys.readouterr().out
