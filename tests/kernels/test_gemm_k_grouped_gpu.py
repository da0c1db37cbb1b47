"""K-grouped GEMMs (weight gradients) in bf16 and FP8 against their twins on a GPU."""

from __future__ import annotations

import pytest
import torch

from megamoe.kernels.gemm import api, reference
from megamoe.kernels.gemm.config import Scaling
from megamoe.kernels.gemm.heuristics import GemmDesc, candidates
from megamoe.kernels.gemm.launch import Operands, run
from megamoe.kernels.quant.reference import CastWithTranspose, cast_1x128, cast_1x128_both, transposed_blocks
from tests.kernels.gemm_problems import check, group_rows, left, poisoned

pytestmark = pytest.mark.gpu


def problem(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]:
    """a [T, M], b [T, N], offsets, rows: groups of any size, often none; NaN and infinity in rows of no group."""
    g = torch.Generator().manual_seed(seed)
    groups = int(torch.randint(1, 17, (1,), generator=g))
    rows = group_rows(groups, [40, 300, 2500, 6000][seed % 4], g)
    total = max(1, sum(rows) + seed % 3)
    m, n = (8 * int(torch.randint(1, [20, 100][seed % 2], (1,), generator=g)) for _ in range(2))
    a, b = left(total, m, "bf16", g, device="cuda").values, left(total, n, "bf16", g, device="cuda").values
    a[sum(rows) :], b[sum(rows) :] = float("nan"), float("inf")
    return a, b, torch.tensor([0, *rows], device="cuda").cumsum(0).int(), rows


@pytest.mark.parametrize("seed", range(40))
def test_bf16(seed: int) -> None:
    a, b, offsets, rows = problem(5000 + seed)
    dtype = (torch.float32, torch.bfloat16)[seed // 4 % 2]
    shape = (len(rows), a.shape[1], b.shape[1])
    out, again = (poisoned(*shape, dtype=dtype) for _ in range(2))
    for d in (out, again):
        api.k_grouped_gemm(a, b, offsets, out=d)
    expected = reference.k_grouped_gemm(a, b, offsets, out_dtype=dtype)
    what = f"groups {rows} m {shape[1]} n {shape[2]}"
    check(out, expected, what)
    assert torch.equal(out, again), "two runs differ"
    assert all((out[i] == 0).all() for i, count in enumerate(rows) if count == 0), "an empty group is not zeros"
    if dtype == torch.float32:
        before = out.clone()
        api.k_grouped_gemm(a, b, offsets, out=out, accumulate=True)
        check(out, 2 * expected, f"accumulate {what}")
        assert all(torch.equal(out[i], before[i]) for i, count in enumerate(rows) if count == 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_neighbour_group_never_leaks(bad: float) -> None:
    """Groups end inside k-blocks at every place; every second group holds nothing finite."""
    g = torch.Generator().manual_seed(1)
    sizes = [*range(1, 66), 127, 128, 129, 0, 191]
    offsets = torch.tensor([0, *sizes], device="cuda").cumsum(0).int()
    a, b = (left(sum(sizes), width, "bf16", g, device="cuda").values for width in (136, 264))
    expected = reference.k_grouped_gemm(a, b, offsets)
    group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).cuda()
    for parity in (0, 1):
        x, y = a.clone(), b.clone()
        x[group % 2 == parity], y[group % 2 == parity] = bad, bad
        out = api.k_grouped_gemm(x, y, offsets, out=poisoned(len(sizes), 136, 264, dtype=torch.float32))
        check(out[1 - parity :: 2], expected[1 - parity :: 2], f"beside groups of {bad}")


def test_every_candidate() -> None:
    a, b, offsets, rows = problem(5003)
    expected = reference.k_grouped_gemm(a, b, offsets)
    for m, n in (expected.shape[1:], (64, 64), (128, 64)):
        desc = GemmDesc(
            scaling=Scaling.NONE, grouping="k", m=m, n=n, k=400, groups=len(rows), out="f32", a_major="mn", b_major="mn"
        )
        for config in candidates(desc):
            out = poisoned(*expected.shape, dtype=torch.float32)
            operands = Operands(a=a.t(), b=b.t(), d=out, a_scale=None, b_scale=None, table=offsets)
            # Tiles of any size give the whole product; the grid follows the true one.
            true = GemmDesc(
                scaling=Scaling.NONE, grouping="k", m=expected.shape[1], n=expected.shape[2], k=400, groups=len(rows),
                out="f32", a_major="mn", b_major="mn",
            )  # fmt: skip
            run(operands, true, config)
            check(out, expected, config.name)


def copies(x: torch.Tensor, offsets: torch.Tensor) -> CastWithTranspose:
    """By the twin: what is tested here is the product."""
    x = torch.where(x.isfinite(), x, 0)
    return cast_1x128_both(x, offsets=offsets, layout="sm90")


@pytest.mark.parametrize("seed", range(24))
def test_fp8(seed: int) -> None:
    x, y, offsets, rows = problem(6000 + seed)
    a, b = copies(x, offsets), copies(y, offsets)
    bounds = (transposed_blocks(offsets) * 128).int()
    outs = [poisoned(len(rows), x.shape[1], y.shape[1], dtype=torch.float32) for _ in range(2)]
    for d in outs:
        api.k_grouped_gemm(a.q_t, b.q_t, bounds, layout="nt", a_scale=a.scale_t, b_scale=b.scale_t, out=d)
    expected = reference.k_grouped_gemm(a.q_t, b.q_t, bounds, layout="nt", a_scale=a.scale_t, b_scale=b.scale_t)
    check(outs[0], expected, f"groups {rows}")
    assert torch.equal(outs[0], outs[1]), "two runs differ"
    api.k_grouped_gemm(
        a.q_t, b.q_t, bounds, layout="nt", a_scale=a.scale_t, b_scale=b.scale_t, out=outs[0], accumulate=True
    )
    check(outs[0], 2 * expected, f"accumulate, groups {rows}")


@pytest.mark.parametrize("seed", range(16))
def test_dense_fp8_with_scales_of_1x128_for_both(seed: int) -> None:
    g = torch.Generator().manual_seed(7000 + seed)
    m, n = (
        int(torch.randint(1, [70, 1500][seed % 2], (1,), generator=g)),
        8 * int(torch.randint(1, 150, (1,), generator=g)),
    )
    k = 16 * int(torch.randint(1, 130, (1,), generator=g))
    (a, sa), (b, sb) = (cast_1x128(left(r, k, "bf16", g, device="cuda").values, layout="sm90") for r in (m, n))
    out, again = (poisoned(m, n, dtype=torch.float32) for _ in range(2))
    for d in (out, again):
        api.gemm(a, b, a_scale=sa, b_scale=sb, out=d)
    expected = reference.gemm(a, b, a_scale=sa, b_scale=sb, out_dtype=torch.float32)
    check(out, expected, f"{m}x{n}x{k}")
    assert torch.equal(out, again), "two runs differ"
    check(api.gemm(a, b, a_scale=sa, b_scale=sb, out=out, accumulate=True), 2 * expected, "accumulate")


@pytest.mark.parametrize("step", [1, 8, 64, 127])
def test_an_offset_off_128_is_refused_by_the_next_call(step: int) -> None:
    """Also one off 16, where a copy must not begin."""
    x, y, offsets, _ = problem(6001)
    a, b = copies(x, offsets), copies(y, offsets)
    bounds = (transposed_blocks(offsets) * 128).int()
    wrong = bounds.clone()
    wrong[1:] += step
    wrong = wrong.clamp(max=a.q_t.shape[1])
    first = int((wrong % 128 != 0).nonzero()[0])

    def call(table: torch.Tensor) -> torch.Tensor:
        return api.k_grouped_gemm(a.q_t, b.q_t, table, layout="nt", a_scale=a.scale_t, b_scale=b.scale_t)

    right_one = call(bounds)
    call(wrong)
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match=f"must be multiples of 128, got {int(wrong[first])} at index {first};"):
        call(bounds)
    assert torch.equal(call(bounds), right_one), "the next correct call must work"


def test_in_a_graph() -> None:
    a, b, offsets, rows = problem(5007)
    out = poisoned(len(rows), a.shape[1], b.shape[1], dtype=torch.float32)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        api.k_grouped_gemm(a, b, offsets, out=out)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        api.k_grouped_gemm(a, b, offsets, out=out)
    first = torch.tensor([0] + [sum(rows)] * len(rows), dtype=torch.int32, device="cuda")
    for bounds in (first, first.flip(0).mul(0)):
        offsets.copy_(bounds)
        out.fill_(float("nan"))
        graph.replay()
        check(out, reference.k_grouped_gemm(a, b, offsets), f"replayed with {bounds.tolist()}")
