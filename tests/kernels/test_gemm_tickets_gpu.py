"""Grouped GEMMs that draw their units from a counter, on a GPU: the bits of strides, and the counter is 0 again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megamoe.kernels.gemm import api, reference, tickets
from megamoe.kernels.gemm.config import Scaling
from megamoe.kernels.gemm.heuristics import GemmDesc, choose
from megamoe.kernels.gemm.knobs import knobs
from tests.kernels.gemm_problems import RECIPES, check, left, poisoned, right

pytestmark = pytest.mark.gpu
SIZES = {
    "one group": [1],
    "none": [0, 0, 0],
    "tails of 64 rows and less": [130, 192, 64, 0, 129, 256, 320, 1, 63, 65],
    "few rows": [1, 16, 17, 0, 3, 32, 8, 5] * 8,
    "many": [700, 0, 1300, 64, 2050],
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_tickets_and_strides_give_the_same_bits(recipe: str, sizes: list[int]) -> None:
    g = torch.Generator().manual_seed(len(sizes))
    total, groups, n, k = max(sum(sizes), 1), len(sizes), 776, 528
    a, b = left(total, k, recipe, g, device="cuda"), right(groups, n, k, recipe, g, device="cuda")
    offsets = torch.tensor([0, *sizes], device="cuda").cumsum(0).int()
    expected = reference.grouped_gemm(a.values, b.values, offsets, a_scale=a.scale, b_scale=b.scale)
    scaling = {"bf16": Scaling.NONE, "fp8_block": Scaling.BLOCK, "fp8_row": Scaling.ROW}[recipe]
    config = choose(GemmDesc(scaling=scaling, grouping="contiguous", m=total, n=n, k=k, groups=groups))
    results = []
    for sms in (None, 3):
        for drawn in (True, False):
            out = poisoned(total, n, dtype=torch.bfloat16)
            with knobs(num_sms=sms, config=replace(config, tickets=drawn)):
                api.grouped_gemm(a.values, b.values, offsets, a_scale=a.scale, b_scale=b.scale, out=out)
            check(out[: sum(sizes)], expected[: sum(sizes)], f"{recipe} {sizes} drawn {drawn} SMs {sms}")
            assert out[sum(sizes) :].isnan().all(), "rows of no group were written"
            results.append(out[: sum(sizes)])
            assert tickets.of_launch(0).tolist() == [0, 0], "the counter was not given back"
    assert all(torch.equal(result, results[0]) for result in results)


def test_graphs_beside_each_other_and_beside_a_stream() -> None:
    """Two graphs replayed at one time, and eager launches on the stream on which they were captured."""
    g = torch.Generator().manual_seed(11)
    sizes = [300, 40, 0, 129, 500, 64, 200]
    a, b = left(sum(sizes), 2048, "fp8_block", g, device="cuda"), right(7, 1024, 2048, "fp8_block", g, device="cuda")
    offsets = torch.tensor([0, *sizes], device="cuda").cumsum(0).int()
    expected = reference.grouped_gemm(a.values, b.values, offsets, a_scale=a.scale, b_scale=b.scale)
    outs = [poisoned(sum(sizes), 1024, dtype=torch.bfloat16) for _ in range(3)]

    def call(out: torch.Tensor) -> None:
        api.grouped_gemm(a.values, b.values, offsets, a_scale=a.scale, b_scale=b.scale, out=out)

    streams = [torch.cuda.Stream() for _ in range(3)]
    with torch.cuda.stream(streams[2]):
        call(outs[2])
    torch.cuda.synchronize()
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    for graph, out in zip(graphs, outs, strict=False):
        with torch.cuda.graph(graph, stream=streams[2]):
            for _ in range(4):
                call(out)
    for out in outs:
        out.fill_(float("nan"))
    torch.cuda.synchronize()
    for _ in range(20):
        for graph, stream in zip(graphs, streams, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(streams[2]):
            call(outs[2])
    torch.cuda.synchronize()
    for which, out in enumerate(outs):
        check(out, expected, f"result {which}")
        assert torch.equal(out, outs[0])
