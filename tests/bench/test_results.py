"""Result files: new rows replace old ones of the same key, and every row says where it comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megamoe.bench import results

WHENCE = {"date": "2026-01-01", "commit": "abc", "command": "bench", "versions": {"torch": "2.11"}}


def row(tokens: int, us: float, **more: Any) -> results.Row:
    return {"case": "flash", "engine": "mega", "world_size": 2, "tokens": tokens, "us": us, **WHENCE, **more}


def test_save_merges_by_key_and_sorts(tmp_path: Path) -> None:
    path = results.save(tmp_path, "moe", [row(128, 5.0), row(8, 2.0)], machine="2x NVIDIA H200")
    assert path.name == "moe-2x-nvidia-h200.json"
    results.save(tmp_path, "moe", [row(128, 4.0), row(16, 3.0)], machine="2x NVIDIA H200")
    loaded = results.load(path)
    assert [(r["tokens"], r["us"]) for r in loaded] == [(8, 2.0), (16, 3.0), (128, 4.0)]
    assert {r["machine"] for r in loaded} == {"2x NVIDIA H200"}
    assert "machine" not in json.loads(path.read_text())["rows"][0], "stated once, at the top"
    assert not list(tmp_path.glob("*.tmp"))


def test_rows_that_differ_in_any_key_field_stay_apart(tmp_path: Path) -> None:
    rows = [row(8, 1.0), row(8, 2.0, accumulate="fast"), row(8, 3.0, accumulate="fp32"), row(8, 4.0, recipe="bf16")]
    path = results.save(tmp_path, "moe", rows, machine="CPU")
    assert sorted(r["us"] for r in results.load(path)) == [1.0, 2.0, 3.0, 4.0]


def test_generation_with_graphs_and_without_stays_apart(tmp_path: Path) -> None:
    """Others have no ``graphs``; the same run again replaces its own row alone."""
    for graphs, us in ((True, 1.0), (False, 9.0), (None, 8.0), (False, 10.0)):
        new = row(16, us, new_tokens_each=32, engine="grouped_mm" if graphs is None else "mega")
        path = results.save(tmp_path, "generate", [new if graphs is None else new | {"graphs": graphs}], machine="CPU")
    assert {(r["engine"], r.get("graphs"), r["us"]) for r in results.load(path)} == {
        ("mega", True, 1.0), ("mega", False, 10.0), ("grouped_mm", None, 8.0),
    }  # fmt: skip


def test_refuses_unknown_benchmarks_and_rows_without_origin(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gemm, quant.*got 'speed'"):
        results.save(tmp_path, "speed", [row(8, 1.0)], machine="CPU")
    with pytest.raises(ValueError, match="lacks date, commit, command, versions"):
        results.save(tmp_path, "moe", [{"case": "flash", "us": 1.0}], machine="CPU")
    assert not list(tmp_path.iterdir()), "nothing half-written"


def test_no_file_is_no_rows(tmp_path: Path) -> None:
    assert results.load(tmp_path / "moe-cpu.json") == []


def test_provenance_names_commit_and_versions() -> None:
    whence = results.provenance("python bench.py", commit="1234", peers=["pytest"])
    assert set(whence) == set(results.PROVENANCE)
    assert whence["commit"] == "1234"
    assert whence["versions"]["peers"] == {"pytest": pytest.__version__}
