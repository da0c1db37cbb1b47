"""Traced calls on GPUs: the same y, and events that are in order, cover what math did, and name every tile once."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megamoe import cli
from megamoe.mega.trace import Moment, Timeline, Track, What, decode, empty
from megamoe.trace.shares import shares
from tests.lm_case import environment
from tests.mega.problems import BASE, RECIPES, Given, Layer, Virtual

COVERED = 0.9  # of a math warpgroup's time; between two events lie a few instructions
IN_ORDER = (
    (Moment.START, Moment.SORTED, Moment.PUSHED),
    (Moment.SORTED, Moment.TOLD_PLAN),
    (Moment.MATH_DONE, Moment.RESULTS_IN, Moment.END),
)


def rows_of(layer: Layer, given: list[Given], rank: int) -> list[int]:
    """Rows that each local expert of ``rank`` gets, those without left out."""
    slots = torch.cat([g.topk_idx.flatten().long() for g in given]).cpu()
    counts = torch.bincount(slots[slots >= 0], minlength=layer.case.experts)
    return [n for n in counts[rank * layer.slots : (rank + 1) * layer.slots].tolist() if n]


def in_order(timeline: Timeline) -> None:
    start, end = timeline.moments[:, Moment.START], timeline.moments[:, Moment.END]
    for chain in IN_ORDER:
        for before, after in itertools.pairwise(chain):
            assert bool((timeline.moments[:, before] <= timeline.moments[:, after]).all()), (before.name, after.name)
    assert bool((timeline.begin_ns >= start[timeline.cta]).all() and (timeline.end_ns <= end[timeline.cta]).all())
    assert bool((timeline.begin_ns <= timeline.end_ns).all())
    same = (timeline.cta.diff() == 0) & (timeline.track.diff() == 0)
    assert bool((timeline.begin_ns[1:][same] >= timeline.end_ns[:-1][same]).all())


def covers(timeline: Timeline) -> None:
    """Events of the first math warpgroup, from where it parts from the others to its end."""
    spent, wanted = 0, 0
    for cta in range(timeline.num_ctas):
        at = (timeline.cta == cta) & (timeline.track == Track.MATH)
        spent += int((timeline.end_ns - timeline.begin_ns)[at].sum())
        wanted += int(timeline.moments[cta, Moment.MATH_DONE] - timeline.moments[cta, Moment.SORTED])
    assert spent >= COVERED * wanted, f"{spent} of {wanted} ns"


def names_every_tile_once(timeline: Timeline, rows: list[int], up_tiles: int, down_tiles: int, *, casts: bool) -> None:
    blocks = sum(-(-n // 128) for n in rows)
    for what, tiles in ((What.GEMM_1, up_tiles), (What.GEMM_2, down_tiles)):
        at = (timeline.what == what) & (timeline.track == Track.MATH)
        seen = Counter(zip(timeline.block[at].tolist(), timeline.tile[at].tolist(), strict=True))
        assert seen == Counter(itertools.product(range(blocks), range(tiles))), what.name
    groups = sum(-(-n // 4) for n in rows)  # kCopyRowsOf
    assert int((timeline.what == What.COPY).sum()) == groups
    assert int((timeline.what == What.CAST).sum()) == (groups if casts else 0)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_traced_call(recipe: str, world_size: int) -> None:
    case = replace(BASE, recipe=recipe, hidden=1024, intermediate=520, tokens=(900, 400), experts=8, top_k=4)
    layer = Layer(case, world_size)
    with Virtual(layer) as ranks:
        given = layer.all_given(kind="zipf")
        want = ranks.call(given)
        traces = [empty(r.num_sms, device=r.buffer.device) for r in ranks.runners]
        for _ in range(2):  # what the first left is written over
            ys = ranks.launch(given, traces=traces)
            ranks.finish(given, ys, "traced")
            assert all(torch.equal(y, w) for y, w in zip(ys, want, strict=True))
        for rank, (runner, trace) in enumerate(zip(ranks.runners, traces, strict=True)):
            timeline = decode(trace.cpu(), rank=rank)
            assert timeline.num_ctas == runner.num_sms and not timeline.dropped.any()
            in_order(timeline)
            covers(timeline)
            w = runner.workspace
            casts = recipe == "fp8_row"
            names_every_tile_once(timeline, rows_of(layer, given, rank), w.up_tiles, w.down_tiles, casts=casts)
            found = shares(timeline)
            assert found.hidden is not None and 0 <= found.hidden < 1 and found.exposed_us > 0
            assert int(timeline.spent.min()) >= 0 and int(timeline.spent.max()) > 0
        small = [empty(r.num_sms, events=2, device=r.buffer.device) for r in ranks.runners]
        ranks.finish(given, ranks.launch(given, traces=small), "short of room")
        for rank, trace in enumerate(small):
            timeline = decode(trace.cpu(), rank=rank)
            assert int(timeline.dropped.sum()) > 0
            in_order(timeline)
        with pytest.raises(ValueError, match="trace must be contiguous int64"):
            ranks.launch(given, traces=[t[1:] for t in small])
        ranks.call(given, "after a refusal")


def kept(folder: Path, ranks: int) -> None:
    (timeline,) = folder.glob("trace-*.json")
    assert (timeline.with_suffix(".png")).stat().st_size > 20_000
    content = json.loads(timeline.read_text())
    assert {e["pid"] for e in content["traceEvents"]} == set(range(ranks))
    (row,) = json.loads(next((folder / "results").glob("trace-*.json")).read_text())["rows"]
    assert row["world_size"] == ranks and row["us"] > 0 and row["us_traced"] > 0 and 0 <= row["hidden"] < 1
    assert 0 < row["math"] < 1 and row["exposed_us"] > 0 and not row["dropped"]


def options(folder: Path) -> list[str]:
    where = ["--out", str(folder), "--results", str(folder / "results"), "--commit", "abc"]
    return ["trace", "--case", "2048/768/32/4", "--tokens", "256", *where]


@pytest.mark.gpu
@pytest.mark.parametrize("virtual", [None, 2])
def test_the_command_on_one_gpu(virtual: int | None, tmp_path: Path) -> None:
    extra = ["--virtual", str(virtual)] if virtual else []
    assert cli.main([*options(tmp_path), *extra]) == 0
    kept(tmp_path, virtual or 1)


@pytest.mark.multi_gpu
def test_the_command_on_two_gpus(tmp_path: Path) -> None:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "megamoe"]
    done = subprocess.run(
        [*start, *options(tmp_path)], capture_output=True, text=True, check=False, env=environment(), timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kept(tmp_path, 2)
    (row,) = json.loads(next((tmp_path / "results").glob("trace-*.json")).read_text())["rows"]
    assert row["nvlink_us"] > 0 and row["nvlink_hidden"] < 1 and row["clock_us"] < 100
