"""``megamoe bench accuracy``: its shapes and sums on a CPU, where ours are the twins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megamoe import cli
from megamoe.bench import accuracy, gemm_ours


def test_shapes_have_tails_and_empty_groups() -> None:
    chosen = list(accuracy.shapes(300))
    assert len(set(chosen)) == 300 and chosen == list(accuracy.shapes(300))
    assert {(case.grouping, case.recipe) for case in chosen} == {
        (grouping, recipe)
        for grouping in accuracy.GROUPINGS
        for recipe in accuracy.RECIPES
        if (grouping, recipe) != ("k", "fp8_row")
    }
    grouped = [case for case in chosen if case.groups > 1]
    assert sum(0 in case.counts for case in grouped) > 100 and all(any(case.counts) for case in chosen)
    assert {case.k % 128 for case in chosen} == set(range(0, 128, 16)) and any(case.n % 128 for case in chosen)


@pytest.mark.parametrize("index", range(11))
def test_a_shape_of_each_kind(index: int) -> None:
    case = list(accuracy.shapes(11))[index]
    small = accuracy.Ragged(**{**vars(case), "sizes": tuple(min(size, 40) for size in case.sizes), "n": 136, "k": 272})
    row = accuracy.measure(small, "cpu")
    assert row["repeats"] == 1 and 0 <= row["whole"] <= 1e-5 and row["row"] <= 1e-4 and row["element"] <= 1
    (total,) = accuracy.summarise([(small, row), (small, {**row, "element": 0.99})])
    assert total["shapes"] == 2 and total["element"] == 0.99 and total["worst"] == small.label


def test_a_row_that_is_not_written_is_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    case = accuracy.Ragged(recipe="bf16", grouping="dense", groups=1, rows=24, n=64, k=128, sizes=(24,))
    real = gemm_ours.ours

    def lazy(data: gemm_ours.Data) -> gemm_ours.Contender:
        mine, calls = real(data), []

        def call() -> torch.Tensor:
            before = mine.call().clone() if not calls else calls[0].clone()
            calls.append(before)
            result = mine.call()
            if len(calls) > 1:
                result[5] = float("nan")
            return result

        return gemm_ours.Contender(call)

    monkeypatch.setattr(accuracy, "ours", lazy)
    row = accuracy.measure(case, "cpu")
    assert accuracy.nearness(row) == float("inf") and row["repeats"] == 0


def test_an_element_off_by_its_row_is_seen() -> None:
    expected = torch.ones(3, 16)
    actual = expected.clone()
    actual[1, 7] += 2**-5
    assert accuracy.element_share(actual, expected) == pytest.approx(2.0)


def test_no_shape_is_larger_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[accuracy.Case] = []

    def measure(case: accuracy.Case, device: str) -> dict[str, float]:
        measured.append(case)
        return {"whole": 0.0, "row": 0.0, "element": 0.0, "repeats": 1}

    monkeypatch.setattr(accuracy, "measure", measure)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cli.main(["bench", "accuracy", "--shapes", "22", "--largest", "64"]) == 0
    assert len(measured) == 22 and all(max(case.n, case.k, *case.counts) <= 64 for case in measured)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "accuracy"]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_run_merges_rows(tmp_path: Path) -> None:
    assert cli.main(["bench", "accuracy", "--shapes", "22", "--out", str(tmp_path), "--commit", "abc"]) == 0
    (file,) = tmp_path.glob("accuracy-*.json")
    found = json.loads(file.read_text())["rows"]
    assert len(found) == 11 and all(row["shapes"] == row["repeats"] == 2 for row in found)
