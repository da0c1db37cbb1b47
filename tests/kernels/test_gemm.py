"""The GEMMs without a GPU: twins, refusals, heuristics, and the machine code of what the heuristics choose."""

from __future__ import annotations

import re

import pytest
import torch

from megamoe.kernels.gemm import api
from megamoe.kernels.gemm.config import SMEM_LIMIT, GemmConfig, Scaling, Share
from megamoe.kernels.gemm.heuristics import GemmDesc, candidates, choose, microseconds
from megamoe.kernels.gemm.knobs import current, knobs
from megamoe.kernels.gemm.launch import grid
from megamoe.kernels.jit.cache import default_cache
from megamoe.kernels.jit.inspect import sass
from megamoe.kernels.jit.sweep import Case, sweep
from megamoe.kernels.quant.reference_scales import to_sm90
from megamoe.testing.numerics import assert_close
from tests.kernels.gemm_problems import RECIPES, group_rows, left, right

SHAPES = (
    (2112, 7168),
    (576, 7168),
    (24576, 1536),
    (32768, 512),
    (7168, 16384),
    (4096, 7168),
    (7168, 2048),
    (8192, 8192),
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("recipe", RECIPES)
def test_twins_multiply_group_by_group(recipe: str) -> None:
    g = generator()
    rows = group_rows(5, 40, g)
    a, b = left(sum(rows) + 2, 160, recipe, g), right(5, 48, 160, recipe, g)
    offsets = torch.tensor([0, *rows]).cumsum(0).int()
    out = torch.full((sum(rows) + 2, 48), 7.0)
    api.grouped_gemm(a.values, b.values, offsets, a_scale=a.scale, b_scale=b.scale, out=out)
    assert (out[sum(rows) :] == 7).all(), "rows of no group were written"
    for i, (start, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        a_scale = a.scale[start:end] if a.scale is not None else None
        if recipe == "fp8_block" and a_scale is not None:
            a_scale = to_sm90(a_scale.contiguous())  # a slice need not start at 16 bytes
        b_scale = b.scale[i] if b.scale is not None else None
        one = api.gemm(a.values[start:end], b.values[i], a_scale=a_scale, b_scale=b_scale, out_dtype=torch.float32)
        assert_close(out[start:end], one, whole=1e-12, row=1e-12, what=f"group {i}")


def test_masked_twin_leaves_other_rows_alone() -> None:
    g = generator(1)
    a, b = left(3 * 6, 64, "fp8_row", g), right(3, 16, 64, "fp8_row", g)
    assert a.scale is not None
    out = torch.full((3, 6, 16), 5.0)
    counts = torch.tensor([0, 4, 6], dtype=torch.int32)
    api.masked_gemm(a.values.view(3, 6, 64), b.values, counts, a_scale=a.scale.view(3, 6), b_scale=b.scale, out=out)
    assert (out[0] == 5).all() and (out[1, 4:] == 5).all() and not (out[2] == 5).any()


def test_bad_input_is_refused_in_a_sentence() -> None:
    g = generator(2)
    a, b = left(8, 256, "fp8_block", g), right(0, 16, 256, "fp8_block", g)
    x, w = left(8, 256, "bf16", g).values, right(0, 16, 256, "bf16", g).values
    assert a.scale is not None and b.scale is not None
    row_major = a.scale.contiguous()
    cases = [
        (lambda: api.gemm(x, w[:, :128]), "agree in K"),
        (lambda: api.gemm(x, w.float()), "both be bfloat16 or both float8_e4m3fn"),
        (lambda: api.gemm(x, w, a_scale=a.scale), "scales were given for bfloat16"),
        (lambda: api.gemm(a.values, b.values, a_scale=a.scale), "b_scale is missing"),
        (lambda: api.gemm(a.values, b.values, a_scale=row_major, b_scale=b.scale), "row-major"),
        (lambda: api.gemm(a.values, b.values, a_scale=a.scale.int(), b_scale=b.scale), "SM100"),
        (lambda: api.gemm(a.values, b.values, a_scale=a.scale, b_scale=b.scale[:, :1].contiguous()), "128x128"),
        (lambda: api.gemm(x, w[:10].clone()), "N must be a multiple of 8"),
        (lambda: api.gemm(x, w, accumulate=True), "accumulate=True needs out"),
        (lambda: api.gemm(x, w, out=torch.empty(8, 16, dtype=torch.bfloat16), accumulate=True), "float32, got"),
        (lambda: api.gemm(x, w, out=torch.empty(8, 24)), r"out must be \(8, 16\)"),
        (lambda: api.gemm(x.t().contiguous().t(), w), "inner stride 1"),
        (lambda: api.grouped_gemm(x, w[None], torch.tensor([0, 8])), r"offsets must be int32 \[2\]"),
        (lambda: api.masked_gemm(x[None], w[None], torch.tensor([8])), r"counts must be int32 \[1\]"),
    ]
    for call, sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            call()
    assert api.gemm(x, w).shape == (8, 16)


def test_knobs_nest_and_come_back() -> None:
    with knobs(num_sms=20):
        with knobs(pdl=True):
            assert (current().num_sms, current().pdl) == (20, True)
        assert (current().num_sms, current().pdl) == (20, False)
    assert current().num_sms is None
    with pytest.raises(ValueError, match="at least 1, got 0"), knobs(num_sms=0):
        pass


def descs() -> list[GemmDesc]:
    """What the tables of benchmarks ask for, and groups from few to many rows."""
    found = []
    for scaling in Scaling:
        for n, k in SHAPES:
            found += [GemmDesc(scaling=scaling, grouping="dense", m=m, n=n, k=k) for m in (1, 64, 128, 200, 1024, 8192)]
        for rows in (4, 64, 128, 256, 1500, 8192):
            for grouping in ("contiguous", "masked"):
                found.append(GemmDesc(scaling=scaling, grouping=grouping, m=32 * rows, n=4096, k=2048, groups=32))
    return found


def test_every_choice_fits_the_machine() -> None:
    for desc in descs():
        config = choose(desc)
        assert config in set(candidates(desc))
        assert config.smem_bytes <= SMEM_LIMIT and config.num_stages >= 3
        assert 0 < grid(desc, config) <= desc.num_sms and grid(desc, config) % config.cluster == 0
        assert microseconds(desc, config) == min(microseconds(desc, c) for c in candidates(desc))


def test_few_rows_stream_weights_and_many_share_them() -> None:
    few = choose(GemmDesc(scaling=Scaling.BLOCK, grouping="dense", m=16, n=4096, k=7168))
    many = choose(GemmDesc(scaling=Scaling.BLOCK, grouping="dense", m=8192, n=8192, k=8192))
    assert few.stream_b and few.block_m == 64
    assert many.cluster == 2 and many.share in (Share.A, Share.B) and many.async_store


def test_printing_candidates(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAMOE_PRINT_HEURISTICS", "1")
    choose.cache_clear()
    choose(GemmDesc(scaling=Scaling.NONE, grouping="dense", m=77, n=512, k=512))
    assert re.search(r"\d us +gemm_bf16_none_dense", capsys.readouterr().out)


def chosen(every: bool) -> list[GemmConfig]:
    """What the heuristics return for ``descs``, or a fixed sample of it."""
    return sorted({choose(desc) for desc in descs()}, key=lambda c: c.name)[:: 1 if every else 4]


def faults(configs: list[GemmConfig]) -> list[str]:
    """What is wrong with the machine code of ``configs``."""
    needs = {"e4m3": ("QGMMA", "UTMALDG"), "bf16": ("HGMMA", "UTMALDG")}
    verdicts = sweep([Case(config.source(), needs=needs[config.elem]) for config in configs])
    found = [f"{verdict.name}: {fault}" for verdict in verdicts for fault in verdict.faults]
    for verdict in verdicts:
        if verdict.report is not None and "C7517" in verdict.report.codes:
            found.append(f"{verdict.name}: the compiler waits for MMAs of its own accord (C7517)")
    return found


def test_machine_code_of_a_sample_is_fit() -> None:
    assert faults(chosen(every=False)) == []


def test_machine_code_of_every_choice_is_fit(pytestconfig: pytest.Config) -> None:
    if not pytestconfig.getoption("--every-kernel"):
        pytest.skip("compiles about 80 kernels: asked for with --every-kernel")
    assert faults(chosen(every=True)) == []


def test_promotion_does_not_read_one_register_bank_twice() -> None:
    """d += t * s with d and t in one bank stalls the tensor cores (docs/performance.md)."""
    config = choose(GemmDesc(scaling=Scaling.BLOCK, grouping="dense", m=8192, n=8192, k=8192))
    text = sass(default_cache().get(config.source()).cubin, config.source().entry)
    pairs = re.findall(r"FFMA R\d+, R(\d+)(?:\.reuse)?, R\d+(?:\.reuse)?, R(\d+)", text)
    clashes = sum(int(t) % 2 == int(d) % 2 for t, d in pairs)
    assert len(pairs) >= 128 and clashes <= len(pairs) // 20, f"{clashes} of {len(pairs)} promotions clash"
