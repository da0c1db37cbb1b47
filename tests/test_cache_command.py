from __future__ import annotations

import json
import os
import sys
import time
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from megamoe import catalog
from megamoe.cli import main
from megamoe.kernels.gemm.config import Scaling
from megamoe.kernels.gemm.heuristics import GemmDesc, choose
from megamoe.kernels.jit.cache import KernelCache
from megamoe.kernels.jit.store import DiskStore
from megamoe.kernels.jit.sweep import Case
from megamoe.problem import Problem
from tests.kernels.jit_kernels import saxpy, spilling

SIZES = ("--hidden", "512", "--intermediate", "256", "--experts", "8", "--top-k", "2")


def cache(root: Path, *arguments: str) -> int:
    return main(["cache", "--dir", str(root), *arguments])


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """Three kernels, used today, 10 and 50 days ago."""
    for days, name in ((0, "new"), (10, "middle"), (50, "old")):
        KernelCache(tmp_path).get(saxpy(name))
        (path,) = tmp_path.glob(f"{name}-*")
        used = time.time() - days * 86400
        os.utime(path, (used, used))
    (tmp_path / "not-ours").mkdir()
    return tmp_path


def names(root: Path) -> list[str]:
    return sorted(entry.name for entry in DiskStore(root).entries())


def test_list(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cache(filled, "list", "--json") == 0
    entries = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in entries] == ["middle", "new", "old"]
    assert all(entry["report"]["registers"] > 0 and entry["num_bytes"] > 1000 for entry in entries)
    assert cache(filled, "list") == 0
    out = capsys.readouterr().out
    assert "old" in out and "3 kernels" in out and str(filled) in out


def test_prune_removes_the_old_and_the_damaged(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (next(filled.glob("middle-*")) / "kernel.cubin").write_bytes(b"")
    assert cache(filled, "prune") == 0
    assert "removed 1 damaged and 1 unwanted kernels, kept 1" in capsys.readouterr().out
    assert names(filled) == ["new"]
    assert (filled / "not-ours").is_dir()


def test_prune_to_a_size_removes_the_longest_unused_first(filled: Path) -> None:
    one = next(iter(DiskStore(filled).entries())).num_bytes / 1e6
    assert cache(filled, "prune", "--days", "1000", "--max-mb", str(2.5 * one)) == 0
    assert names(filled) == ["middle", "new"]


def test_prune_of_other_compilers_keeps_this_ones(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache(filled, "prune", "--days", "1000", "--other-compilers") == 0
    assert names(filled) == ["middle", "new", "old"]
    monkeypatch.setattr("megamoe.commands.cache.compiler_id", lambda kind: "nvrtc 99.0")
    assert cache(filled, "prune", "--days", "1000", "--other-compilers") == 0
    assert names(filled) == []


def test_clear_touches_nothing_else(filled: Path) -> None:
    assert cache(filled, "clear") == 0
    assert [path.name for path in filled.iterdir()] == ["not-ours"]
    assert cache(filled / "absent", "clear") == 0


def test_precompile_compiles_what_the_catalog_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Problem] = []

    def cases_for(problem: Problem) -> Iterable[Case]:
        asked.append(problem)
        return [Case(saxpy()), Case(spilling()), Case(saxpy())]

    provider = types.ModuleType("provider_of_a_test")
    provider.cases_for = cases_for  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, provider.__name__, provider)
    monkeypatch.setattr(catalog, "PROVIDERS", (provider.__name__,))
    command = ("precompile", *SIZES, "--recipe", "fp8_block", "--workers", "1")
    assert cache(tmp_path, *command) == 0
    assert "2 compiled, 0 were there" in capsys.readouterr().out
    assert asked == [Problem(hidden=512, intermediate=256, num_experts=8, top_k=2, recipe="fp8_block")]
    assert names(tmp_path) == ["saxpy", "spilling"]
    assert cache(tmp_path, *command, "--check") == 1
    out = capsys.readouterr().out
    assert "0 compiled, 2 were there" in out and "spilling: spills" in out


def test_precompile_asks_for_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cache(tmp_path, "precompile", "--hidden", "512") == 2
    assert "--intermediate, --experts, --top-k not given" in capsys.readouterr().err
    assert cache(tmp_path, "precompile", "--case", "flash", "--hidden", "4095") == 2
    assert "hidden must be a multiple of 8" in capsys.readouterr().err


def test_every_provider_can_be_asked() -> None:
    problem = Problem(hidden=512, intermediate=256, num_experts=8, top_k=2)
    found = catalog.cases_for(problem)
    assert len({case.source.name for case in found}) == len(found) > 3 and all(case.needs for case in found)


def test_the_staged_engine_finds_its_kernels_compiled() -> None:
    """For numbers of routes that were not tried, as ``grouped`` asks for them."""
    problem = Problem(hidden=1024, intermediate=512, num_experts=16, top_k=4, max_tokens=2048)
    names = {case.source.name for case in catalog.cases_for(problem)}
    assert any("_k_tn_f32_" in name for name in names) and any("_nn_f32_" in name for name in names)
    by_rows: dict[str, Any] = {"scaling": Scaling.NONE, "grouping": "contiguous", "groups": 16, "out": "f32"}
    for routes in range(3, 2048 * 4, 97):
        for n, k, major in ((1024, 1024, "k"), (1024, 512, "k"), (512, 1024, "mn"), (1024, 1024, "mn")):
            config = choose(GemmDesc(m=routes, n=n, k=k, b_major=major, **by_rows))
            assert config.name in names, f"{routes} routes"
