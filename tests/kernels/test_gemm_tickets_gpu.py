"""Masked GEMMs, which draw their units from a counter, on a GPU: the bits of strides, and the counter is 0 again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megamoe.kernels.gemm import api, reference, tickets
from megamoe.kernels.gemm.config import Scaling
from megamoe.kernels.gemm.heuristics import GemmDesc, choose
from megamoe.kernels.gemm.knobs import knobs
from megamoe.kernels.quant.scales import to_sm90
from tests.kernels.gemm_problems import RECIPES, Operand, check, left, poisoned, right

pytestmark = pytest.mark.gpu
SIZES = {
    "one group": [1],
    "none": [0, 0, 0],
    "tails of 64 rows and less": [130, 192, 64, 0, 129, 256, 320, 1, 63, 65],
    "few rows": [1, 16, 17, 0, 3, 32, 8, 5] * 8,
    "many": [700, 0, 1300, 64, 2050],
}
SCALING = {"bf16": Scaling.NONE, "fp8_block": Scaling.BLOCK, "fp8_row": Scaling.ROW}


def packed(a: Operand, sizes: list[int]) -> Operand:
    """The rows that groups of ``sizes`` have of room for ``max(sizes)`` each, without those between."""
    most = max(*sizes, 1)
    keep = torch.cat([torch.arange(rows) + group * most for group, rows in enumerate(sizes)]).to(a.values.device)
    values = a.values.view(torch.uint8)[keep].view(a.values.dtype) if a.scale is not None else a.values[keep]
    if a.scale is None:
        return Operand(values, None)
    scale = a.scale[keep]
    return Operand(values, to_sm90(scale.contiguous()) if scale.dim() == 2 else scale)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_tickets_and_strides_give_the_same_bits(recipe: str, sizes: list[int]) -> None:
    g = torch.Generator().manual_seed(len(sizes))
    most, groups, n, k = max(*sizes, 1), len(sizes), 776, 528
    a, b = left(groups * most, k, recipe, g, device="cuda"), right(groups, n, k, recipe, g, device="cuda")
    values = a.values.view(groups, most, k)
    scale = None if a.scale is None else a.scale.reshape(groups, most, *a.scale.shape[1:])
    counts = torch.tensor(sizes).int()
    expected = reference.masked_gemm(values, b.values, counts, a_scale=scale, b_scale=b.scale)
    mean = max(1, sum(sizes) // groups)
    config = choose(GemmDesc(scaling=SCALING[recipe], grouping="masked", m=groups * mean, n=n, k=k, groups=groups))
    assert config.tickets
    results = []
    for sms in (None, 3):
        out = poisoned(groups, most, n, dtype=torch.bfloat16)
        with knobs(num_sms=sms, config=config):
            given = scale if recipe == "fp8_row" else a.scale
            api.masked_gemm(values, b.values, counts.cuda(), a_scale=given, b_scale=b.scale, out=out)
        assert tickets.of_launch(0).tolist() == [0, 0], "the counter was not given back"
        results.append(torch.cat([out[i, :rows] for i, rows in enumerate(sizes)]))
        for i, rows in enumerate(sizes):
            check(out[i, :rows], expected[i, :rows], f"{recipe} group {i} of {sizes} SMs {sms}")
            assert out[i, rows:].isnan().all(), "rows beyond the count were written"
    if sum(sizes):
        rows, offsets = packed(a, sizes), torch.tensor([0, *sizes], device="cuda").cumsum(0).int()
        with knobs(config=replace(config, grouping="contiguous")):
            strides = api.grouped_gemm(rows.values, b.values, offsets, a_scale=rows.scale, b_scale=b.scale)
        results.append(strides)
    assert all(torch.equal(result, results[0]) for result in results)


def test_graphs_beside_each_other_and_beside_a_stream() -> None:
    """Two graphs replayed at one time, and eager launches on the stream on which they were captured."""
    g = torch.Generator().manual_seed(11)
    sizes, most = [300, 40, 0, 129, 500, 64, 200], 500
    a, b = left(7 * most, 2048, "fp8_block", g, device="cuda"), right(7, 1024, 2048, "fp8_block", g, device="cuda")
    values, counts = a.values.view(7, most, 2048), torch.tensor(sizes, device="cuda").int()
    assert a.scale is not None
    scale = a.scale.reshape(7, most, -1)
    expected = reference.masked_gemm(values, b.values, counts, a_scale=scale, b_scale=b.scale)
    outs = [poisoned(7, most, 1024, dtype=torch.bfloat16) for _ in range(3)]

    def call(out: torch.Tensor) -> None:
        api.masked_gemm(values, b.values, counts, a_scale=a.scale, b_scale=b.scale, out=out)

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
        for i, rows in enumerate(sizes):
            check(out[i, :rows], expected[i, :rows], f"result {which} group {i}")
            assert torch.equal(out[i, :rows], outs[0][i, :rows])
