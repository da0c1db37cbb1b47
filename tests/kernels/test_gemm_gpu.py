"""The GEMM kernels against their twins on a GPU: random dense data, poisoned outputs, bitwise repeat."""

from __future__ import annotations

import pytest
import torch

from megamoe.kernels.gemm import api, reference
from megamoe.kernels.gemm.config import Scaling
from megamoe.kernels.gemm.heuristics import GemmDesc, candidates
from megamoe.kernels.gemm.knobs import knobs
from megamoe.kernels.gemm.launch import Operands, run
from tests.kernels.gemm_problems import POISON, RECIPES, check, group_rows, left, poisoned, right

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("seed", range(40))
def test_dense(recipe: str, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    m = int(torch.randint(1, [65, 129, 400, 1500][seed % 4], (1,), generator=g))
    n = 8 * int(torch.randint(1, 200, (1,), generator=g))
    k = 16 * int(torch.randint(1, 130, (1,), generator=g))
    a, b = left(m, k, recipe, g, device="cuda"), right(0, n, k, recipe, g, device="cuda")
    dtype = (torch.bfloat16, torch.float32)[seed % 2]
    expected = reference.gemm(a.values, b.values, a_scale=a.scale, b_scale=b.scale, out_dtype=dtype)
    outs = [poisoned(m, n, dtype=dtype) for _ in range(2)]
    for out in outs:
        api.gemm(a.values, b.values, a_scale=a.scale, b_scale=b.scale, out=out)
    check(outs[0], expected, f"{recipe} {m}x{n}x{k}")
    assert torch.equal(outs[0], outs[1]), "two runs differ"
    if dtype == torch.float32:
        twice = api.gemm(a.values, b.values, a_scale=a.scale, b_scale=b.scale, out=outs[0], accumulate=True)
        check(twice, 2 * expected, f"accumulate {recipe} {m}x{n}x{k}")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("seed", range(30))
def test_grouped(recipe: str, seed: int) -> None:
    g = torch.Generator().manual_seed(1000 + seed)
    groups = int(torch.randint(1, 17, (1,), generator=g))
    rows = group_rows(groups, [40, 300, 2500, 6000][seed % 4], g)
    total = sum(rows) + seed % 3  # some rows at the end belong to no group
    n, k = 8 * int(torch.randint(4, 120, (1,), generator=g)), 16 * int(torch.randint(1, 80, (1,), generator=g))
    a, b = left(max(total, 1), k, recipe, g, device="cuda"), right(groups, n, k, recipe, g, device="cuda")
    offsets = torch.tensor([0, *rows], device="cuda").cumsum(0).int()
    out, again = (poisoned(max(total, 1), n, dtype=torch.bfloat16) for _ in range(2))
    for d in (out, again):
        api.grouped_gemm(a.values, b.values, offsets, a_scale=a.scale, b_scale=b.scale, out=d)
    expected = reference.grouped_gemm(a.values, b.values, offsets, a_scale=a.scale, b_scale=b.scale)
    check(out[: sum(rows)], expected[: sum(rows)], f"{recipe} groups {rows} n {n} k {k}")
    assert out[sum(rows) :].isnan().all(), "rows of no group were written"
    assert torch.equal(out[: sum(rows)], again[: sum(rows)]), "two runs differ"


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("seed", range(20))
def test_masked(recipe: str, seed: int) -> None:
    g = torch.Generator().manual_seed(2000 + seed)
    groups, most = int(torch.randint(1, 13, (1,), generator=g)), [16, 70, 260, 513][seed % 4]
    counts = torch.randint(0, most + 1, (groups,), generator=g).int()
    counts[torch.rand(groups, generator=g) < 0.2] = 0
    n, k = 8 * int(torch.randint(4, 120, (1,), generator=g)), 16 * int(torch.randint(1, 80, (1,), generator=g))
    a, b = left(groups * most, k, recipe, g, device="cuda"), right(groups, n, k, recipe, g, device="cuda")
    values = a.values.view(groups, most, k)
    a_scale = a.scale.view(groups, most) if a.scale is not None and recipe == "fp8_row" else a.scale
    out = poisoned(groups, most, n, dtype=torch.bfloat16)
    guess = int(counts.float().mean()) + 1
    api.masked_gemm(values, b.values, counts.cuda(), a_scale=a_scale, b_scale=b.scale, out=out, expected_rows=guess)
    scale = a.scale.reshape(groups, most, *a.scale.shape[1:]) if a.scale is not None else None
    expected = reference.masked_gemm(values, b.values, counts, a_scale=scale, b_scale=b.scale)
    for i, rows in enumerate(counts.tolist()):
        check(out[i, :rows], expected[i, :rows], f"{recipe} group {i} of {counts.tolist()} n {n} k {k}")
        assert out[i, rows:].isnan().all(), "rows beyond the count were written"


def test_every_candidate_gives_the_same_product() -> None:
    """Not only the chosen ones: each configuration the heuristics may return, on one ragged shape a size."""
    g = torch.Generator().manual_seed(7)
    for recipe, scaling in zip(RECIPES, (Scaling.NONE, Scaling.BLOCK, Scaling.ROW), strict=True):
        for m in (48, 100, 700):
            n, k = 1064, 1040
            a, b = left(m, k, recipe, g, device="cuda"), right(0, n, k, recipe, g, device="cuda")
            expected = reference.gemm(a.values, b.values, a_scale=a.scale, b_scale=b.scale)
            desc = GemmDesc(scaling=scaling, grouping="dense", m=m, n=n, k=k)
            for config in candidates(desc):
                out = poisoned(m, n, dtype=torch.bfloat16)
                operands = Operands(a=a.values, b=b.values, d=out, a_scale=a.scale, b_scale=b.scale, table=None)
                run(operands, desc, config)
                check(out, expected, config.name)


def test_strided_operands_and_limits_on_sms() -> None:
    g = torch.Generator().manual_seed(8)
    wide = torch.randn(300, 512, generator=g).bfloat16().cuda()
    b = torch.randn(256, 256, generator=g).bfloat16().cuda()
    out = poisoned(300, 512, dtype=torch.bfloat16)
    with knobs(num_sms=7, pdl=True):
        api.gemm(wide[:, :256], b, out=out[:, 128:384])
    check(out[:, 128:384], reference.gemm(wide[:, :256], b), "strided")
    assert out[:, :128].isnan().all() and out[:, 384:].isnan().all(), "columns beside the slice were written"


def test_in_a_graph_and_on_a_stream_of_its_own() -> None:
    g = torch.Generator().manual_seed(9)
    a, b = left(200, 512, "fp8_block", g, device="cuda"), right(4, 384, 512, "fp8_block", g, device="cuda")
    offsets = torch.tensor([0, 10, 10, 150, 200], dtype=torch.int32, device="cuda")
    out = poisoned(200, 384, dtype=torch.bfloat16)

    def call() -> None:
        api.grouped_gemm(a.values, b.values, offsets, a_scale=a.scale, b_scale=b.scale, out=out)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for bounds in ([0, 60, 61, 61, 200], [0, 0, 0, 200, 200]):
        offsets.copy_(torch.tensor(bounds, dtype=torch.int32))
        out.fill_(POISON)
        graph.replay()
        expected = reference.grouped_gemm(a.values, b.values, offsets, a_scale=a.scale, b_scale=b.scale)
        check(out, expected, f"replayed with offsets {bounds}")


def test_nan_stays_in_its_row() -> None:
    g = torch.Generator().manual_seed(10)
    a, b = left(130, 256, "bf16", g, device="cuda"), right(0, 136, 256, "bf16", g, device="cuda")
    a.values[77, 5] = float("nan")
    out = api.gemm(a.values, b.values)
    assert out[77].isnan().all() and int(out.isnan().any(dim=1).sum()) == 1
