"""bf16 GEMMs in the four layouts, dense and grouped, against their twins on a GPU."""

from __future__ import annotations

import pytest
import torch

from megamoe.kernels.gemm import api, reference
from megamoe.kernels.gemm.checks import Layout, as_nt, check_majors
from megamoe.kernels.gemm.config import Scaling
from megamoe.kernels.gemm.heuristics import GemmDesc, candidates
from megamoe.kernels.gemm.launch import Operands, run
from tests.kernels.gemm_problems import check, group_rows, left, poisoned, right

pytestmark = pytest.mark.gpu
LAYOUTS: tuple[Layout, ...] = ("nt", "nn", "tn", "tt")


def stored(a: torch.Tensor, b: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """a [M, K] and b [N, K] as ``layout`` stores them."""
    turned = as_nt(a, b, layout)
    return turned[0].contiguous(), turned[1].contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(24))
def test_dense(layout: Layout, seed: int) -> None:
    g = torch.Generator().manual_seed(3000 + seed)
    m = int(torch.randint(1, [65, 129, 400, 1500][seed % 4], (1,), generator=g))
    m = m if layout[0] == "n" else -(-m // 8) * 8  # rows of A^T start 16 bytes apart
    n, k = 8 * int(torch.randint(1, 200, (1,), generator=g)), int(torch.randint(1, 2000, (1,), generator=g))
    k = k if layout == "tn" else -(-k // 8) * 8
    a, b = left(m, k, "bf16", g, device="cuda").values, right(0, n, k, "bf16", g, device="cuda").values
    dtype = (torch.bfloat16, torch.float32)[seed % 2]
    expected = reference.gemm(a, b, out_dtype=dtype)
    operands = stored(a, b, layout)
    outs = [poisoned(m, n, dtype=dtype) for _ in range(3)]
    api.gemm(*operands, layout=layout, out=outs[0])
    api.gemm(*operands, layout=layout, out=outs[1])
    api.gemm(*as_nt(*operands, layout), out=outs[2])
    check(outs[0], expected, f"{layout} {m}x{n}x{k}")
    assert torch.equal(outs[0], outs[1]), "two runs differ"
    assert torch.equal(outs[0], outs[2]), "transposed views give another result than the layout they are"
    if dtype == torch.float32:
        twice = api.gemm(*operands, layout=layout, out=outs[0], accumulate=True)
        check(twice, 2 * expected, f"accumulate {layout} {m}x{n}x{k}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("m", [48, 96, 704])
def test_every_candidate_gives_the_same_product(layout: Layout, m: int) -> None:
    g = torch.Generator().manual_seed(m)
    n, k = 1064, 1048
    a, b = left(m, k, "bf16", g, device="cuda").values, right(0, n, k, "bf16", g, device="cuda").values
    expected = reference.gemm(a, b)
    a, b = as_nt(*stored(a, b, layout), layout)
    a_major, b_major = check_majors(a, b)
    desc = GemmDesc(scaling=Scaling.NONE, grouping="dense", m=m, n=n, k=k, a_major=a_major, b_major=b_major)
    for config in candidates(desc):
        out = poisoned(m, n, dtype=torch.bfloat16)
        run(Operands(a=a, b=b, d=out, a_scale=None, b_scale=None, table=None), desc, config)
        check(out, expected, config.name)


@pytest.mark.parametrize("seed", range(24))
def test_grouped_rows_times_weights_that_are_not_transposed(seed: int) -> None:
    """Gradients of rows. K ends inside a k-block in half of the cases, where the next group's weights are NaN."""
    g = torch.Generator().manual_seed(4000 + seed)
    groups = int(torch.randint(1, 17, (1,), generator=g))
    rows = group_rows(groups, [40, 300, 2500, 6000][seed % 4], g)
    total = max(1, sum(rows) + seed % 3)
    n, k = 8 * int(torch.randint(4, 120, (1,), generator=g)), 8 * int(torch.randint(1, 160, (1,), generator=g))
    a = left(total, k, "bf16", g, device="cuda").values
    b = right(groups, k, n, "bf16", g, device="cuda").values  # [G, K, N]
    empty = [i for i, count in enumerate(rows) if count == 0]
    b[empty] = float("nan")
    offsets = torch.tensor([0, *rows], device="cuda").cumsum(0).int()
    dtype = (torch.bfloat16, torch.float32)[seed // 4 % 2]
    out, again = (poisoned(total, n, dtype=dtype) for _ in range(2))
    api.grouped_gemm(a, b, offsets, layout="nn", out=out)
    api.grouped_gemm(a, b.transpose(1, 2), offsets, out=again)
    expected = reference.grouped_gemm(a, b, offsets, layout="nn", out_dtype=dtype)
    check(out[: sum(rows)], expected[: sum(rows)], f"groups {rows} n {n} k {k}")
    assert out[sum(rows) :].isnan().all(), "rows of no group were written"
    assert torch.equal(out[: sum(rows)], again[: sum(rows)]), "two runs differ"


def test_slices_of_wider_matrices() -> None:
    g = torch.Generator().manual_seed(5)
    wide = torch.randn(320, 640, generator=g).bfloat16().cuda()
    a, b = wide[:, 64:264], wide[:, 320:576]  # A^T [K, M], B [K, N]
    out = poisoned(200, 512, dtype=torch.float32)
    api.gemm(a, b, layout="tn", out=out[:, 128:384])
    check(out[:, 128:384], reference.gemm(a, b, layout="tn", out_dtype=torch.float32), "strided")
    assert out[:, :128].isnan().all() and out[:, 384:].isnan().all(), "columns beside the slice were written"


def test_nan_stays_in_its_row_and_column() -> None:
    g = torch.Generator().manual_seed(6)
    a, b = left(136, 200, "bf16", g, device="cuda").values, right(0, 136, 200, "bf16", g, device="cuda").values
    a[77, 5], b[20, 199] = float("nan"), float("inf")
    out = api.gemm(*stored(a, b, "tn"), layout="tn")
    bad = ~out.isfinite()
    assert bad[77].all() and bad[:, 20].all() and int(bad.sum()) == 136 + 136 - 1
