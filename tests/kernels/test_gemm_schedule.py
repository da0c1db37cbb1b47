"""The units of grouped GEMMs, and where copies begin where K is grouped: sched/grouping.cuh compiled for the CPU."""

from __future__ import annotations

import ctypes
import itertools
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megamoe.kernels.jit.source import INCLUDE_ROOT

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the schedule for the CPU")
M, N, BLOCK_M, BLOCK_N = 200, 200, 128, 64  # the blocks are those of gemm_schedule.cpp
NAMES = ("m0", "rows", "n0", "group", "kb0", "num_kb", "k0", "k_tail")


class Tile(ctypes.Structure):
    """Tile of sched/tile.cuh."""

    _fields_ = tuple((name, ctypes.c_int32) for name in NAMES)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("schedule") / "schedule.so"
    done = subprocess.run(
        ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{INCLUDE_ROOT}",
         "-include", str(HERE / "emulator" / "cuda_on_cpu.h"), str(HERE / "gemm_schedule.cpp"), "-o", str(path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(path))


def walk(library: Any, align: int, table: list[int], ctas: int) -> list[Tile]:
    tiles = (Tile * 4096)()
    walked = getattr(library, f"walk_by_{align}")
    count = walked((ctypes.c_int * len(table))(*table), len(table) - 1, M, N, ctas, tiles, len(tiles))
    assert count <= len(tiles)
    return list(tiles[:count])


@pytest.mark.parametrize("align", [1, 128])
def test_every_tile_of_every_group_once(library: Any, align: int) -> None:
    rng = random.Random(1)
    for ctas in (1, 7, 200):
        sizes = [align * rng.choice((0, 1, 5, 127)) for _ in range(20)]
        table = list(itertools.accumulate(sizes, initial=0))
        tiles = walk(library, align, table, ctas)
        expected = itertools.product(range(len(sizes)), range(0, M, BLOCK_M), range(0, N, BLOCK_N))
        assert sorted((t.group, t.m0, t.n0) for t in tiles) == sorted(expected)
        for t in tiles:
            size = sizes[t.group]
            assert (t.k0, t.num_kb, t.k_tail, t.rows) == (table[t.group], -(-size // 128), size % 128, M - t.m0)


def test_copies_begin_at_blocks_of_scales_whatever_the_table_says(library: Any) -> None:
    """A copy of e4m3 that begins off 16 bytes is an illegal instruction: a bad offset must not become one."""
    rng = random.Random(2)
    for _ in range(50):
        first = rng.choice((0, 8, 127, 128, 136, 1000, -8, 2**31 - 8, -(2**31) + 8))
        table = [first, first + 7, first + 7, first]
        for t in walk(library, 128, table, 3):
            assert t.k0 % 128 == 0 and abs(t.k0 - table[t.group]) < 128


def test_every_tile_once_by_tickets(library: Any) -> None:
    rng = random.Random(3)
    for ctas in (1, 7, 200):
        sizes = [rng.choice((0, 1, 64, 127, 128, 129, 300)) for _ in range(20)]
        table = list(itertools.accumulate(sizes, initial=0))
        tiles = (Tile * 4096)()
        count = library.walk_by_tickets((ctypes.c_int * len(table))(*table), len(sizes), N, ctas, ctas, tiles, 4096)
        expected = [
            (group, table[group] + row, size - row, column)
            for group, size in enumerate(sizes)
            for row in range(0, size, BLOCK_M)
            for column in range(0, N, BLOCK_N)
        ]
        assert sorted((t.group, t.m0, t.rows, t.n0) for t in tiles[:count]) == expected
