"""The GEMMs without a GPU: twins, refusals, knobs."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from megamoe.activation import Activation, ActivationName
from megamoe.kernels.gemm import api, checks, gated, reference
from megamoe.kernels.gemm.config import Scaling
from megamoe.kernels.gemm.heuristics import GemmDesc, choose
from megamoe.kernels.gemm.knobs import current, knobs
from megamoe.kernels.quant.reference import (
    cast_1x128_both,
    cast_128x128,
    dequantise_1x128,
    dequantise_128x128,
    transposed_blocks,
)
from megamoe.kernels.quant.reference_scales import to_sm90
from megamoe.testing.numerics import assert_close, difference
from tests.kernels.gemm_problems import RECIPES, group_rows, left, right


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


@pytest.mark.parametrize("layout", ["nt", "nn", "tn", "tt"])
def test_layouts_of_the_twin_are_views_of_one_product(layout: checks.Layout) -> None:
    g = generator(3)
    a, b = left(24, 40, "bf16", g).values, right(0, 16, 40, "bf16", g).values
    stored_a = a.t().contiguous() if layout[0] == "t" else a
    stored_b = b.t().contiguous() if layout[1] == "n" else b
    expected = a.float() @ b.float().t()
    assert torch.equal(api.gemm(stored_a, stored_b, layout=layout, out_dtype=torch.float32), expected)
    views = checks.as_nt(stored_a, stored_b, layout)
    assert torch.equal(api.gemm(*views, out_dtype=torch.float32), expected), "views must do without a layout"
    assert checks.check_majors(*views) == ("mn" if layout[0] == "t" else "k", "mn" if layout[1] == "n" else "k")


def test_grouped_twin_takes_weights_that_are_not_transposed() -> None:
    g = generator(4)
    a, b = left(9, 16, "bf16", g).values, right(3, 24, 16, "bf16", g).values
    offsets = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    stored = b.transpose(1, 2).contiguous()
    assert torch.equal(api.grouped_gemm(a, stored, offsets, layout="nn"), api.grouped_gemm(a, b, offsets))
    assert torch.equal(api.grouped_gemm(a, stored.transpose(1, 2), offsets), api.grouped_gemm(a, b, offsets))


def test_k_grouped_twin() -> None:
    g = generator(5)
    rows = [5, 0, 17, 1]
    offsets = torch.tensor([0, *rows]).cumsum(0).int()
    a, b = left(25, 24, "bf16", g).values, left(25, 16, "bf16", g).values
    a[23:], b[23:] = float("nan"), float("inf")  # of no group
    d = api.k_grouped_gemm(a, b, offsets)
    for i, (start, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        assert_close(d[i], a[start:end].float().t() @ b[start:end].float(), whole=1e-12, row=1e-12, what=f"group {i}")
    assert (d[1] == 0).all() and d.shape == (4, 24, 16) and d.dtype == torch.float32
    before = torch.full_like(d, 3.0)
    added = api.k_grouped_gemm(a, b, offsets, out=before.clone(), accumulate=True)
    assert torch.equal(added, before + d)


def test_k_grouped_twin_in_fp8_takes_padded_transposed_copies() -> None:
    g = generator(6)
    offsets = torch.tensor([0, 70, 70, 200], dtype=torch.int32)
    x, y = left(200, 48, "bf16", g).values, left(200, 32, "bf16", g).values
    a, b = (cast_1x128_both(t, offsets=offsets, layout="sm90") for t in (x, y))
    bounds = (transposed_blocks(offsets) * 128).int()
    assert a.q_t.shape[1] == 4 * 128
    scales: dict[str, Any] = {"layout": "nt", "a_scale": a.scale_t, "b_scale": b.scale_t}
    d = api.k_grouped_gemm(a.q_t, b.q_t, bounds, **scales)
    exact = api.k_grouped_gemm(x, y, offsets)
    assert difference(d[[0, 2]], exact[[0, 2]]) < 2e-3 and (d[1] == 0).all()
    with pytest.raises(ValueError, match="multiples of 128, got 70"):
        api.k_grouped_gemm(a.q_t, b.q_t, offsets, **scales)
    whole = api.gemm(a.q_t, b.q_t, a_scale=a.scale_t, b_scale=b.scale_t, out_dtype=torch.float32)
    assert_close(whole, d.sum(0), whole=1e-10, row=1e-9, what="dense with 1x128 scales of both")


@pytest.mark.parametrize("name", ["swiglu", "swiglu_clamped", "geglu"])
@pytest.mark.parametrize("recipe", ["bf16", "fp8_block"])
def test_gated_twin_is_the_product_then_the_activation(name: ActivationName, recipe: str) -> None:
    g = generator(7)
    activation, width = Activation(name), 72
    w13 = torch.randn(3, 2 * width, 160, generator=g).bfloat16()
    a, row_weight = left(23, 160, recipe, g), torch.rand(23, generator=g)
    offsets = torch.tensor([0, 9, 9, 23], dtype=torch.int32)
    b, b_scale = cast_128x128(w13, parts=2) if recipe == "fp8_block" else (w13, None)
    plain = w13.float() if b_scale is None else dequantise_128x128(b, b_scale, parts=2)
    values = a.values.float() if a.scale is None else dequantise_1x128(a.values, a.scale)
    h13 = reference.grouped_gemm(values, plain, offsets, out_dtype=torch.float32)
    expected = activation(h13) * row_weight[:, None]
    scales: dict[str, Any] = {"a_scale": a.scale, "b_scale": b_scale, "activation": activation}
    mixed = gated.interleave(b)
    d, none = gated.gated_gemm(a.values, mixed, offsets, row_weight=row_weight, **scales)
    assert none is None and difference(d, expected) < 5e-6
    q, scale = gated.gated_gemm(
        a.values, mixed, offsets, row_weight=row_weight, out_dtype=torch.float8_e4m3fn, **scales
    )
    assert scale is not None and scale.shape == (23, 1) and q.shape == (23, width)
    assert difference(dequantise_1x128(q, scale), expected) < 2e-3


def test_interleaving_by_eight() -> None:
    w13 = torch.arange(2 * 2 * 32 * 3).view(2, 64, 3)
    mixed = gated.interleave(w13)
    assert torch.equal(mixed[:, :8], w13[:, :8]) and torch.equal(mixed[:, 8:16], w13[:, 32:40])
    assert torch.equal(mixed[:, 56:], w13[:, 56:]) and torch.equal(gated.deinterleave(mixed), w13)
    with pytest.raises(ValueError, match="multiple of 16 rows"):
        gated.interleave(w13[:, :40])


def test_bad_gated_input_is_refused_in_a_sentence() -> None:
    g = generator(8)
    x, w = left(8, 64, "bf16", g).values, right(0, 32, 64, "bf16", g).values
    a, b = left(8, 64, "fp8_row", g), right(0, 32, 64, "fp8_row", g)
    swiglu = Activation()
    cases = [
        (lambda: gated.gated_gemm(x, w, activation=Activation("relu2")), "must join gate and up"),
        (lambda: gated.gated_gemm(x, w[:24], activation=swiglu), "multiple of 16 rows, got 24"),
        (lambda: gated.gated_gemm(x, w, activation=swiglu, out_dtype=torch.float32), "bfloat16 or float8_e4m3fn"),
        (lambda: gated.gated_gemm(x, w, activation=swiglu, row_weight=torch.ones(7)), r"row_weight must be fp32 \[8\]"),
        (lambda: gated.gated_gemm(x, w[None], activation=swiglu), "with offsets"),
        (lambda: gated.gated_gemm(x, w, x, activation=swiglu), "with offsets"),
        (
            lambda: gated.gated_gemm(a.values, b.values, a_scale=a.scale, b_scale=b.scale, activation=swiglu),
            "got one scale per row",
        ),
    ]
    for call, sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            call()


def test_bad_input_is_refused_in_a_sentence() -> None:
    g = generator(2)
    a, b = left(8, 256, "fp8_block", g), right(0, 16, 256, "fp8_block", g)
    x, w = left(8, 256, "bf16", g).values, right(0, 16, 256, "bf16", g).values
    assert a.scale is not None and b.scale is not None
    row_major = a.scale.contiguous()
    turned = a.values.view(torch.uint8).t().contiguous().view(a.values.dtype)
    zero = torch.zeros(2, dtype=torch.int32)
    scales: dict[str, Any] = {"a_scale": a.scale, "b_scale": b.scale}
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
        (lambda: api.gemm(x.repeat(2, 2)[::2, ::2], w), "stride 1 in one of its last two dimensions"),
        (lambda: checks.as_nt(x, w, cast(Any, "xy")), "layout must be one of nt, nn, tn, tt, got 'xy'"),
        (lambda: api.gemm(x, w, layout="nn"), "agree in K"),
        (lambda: api.gemm(turned, b.values, layout="tt", a_scale=a.scale, b_scale=b.scale), "K-major only"),
        (lambda: api.k_grouped_gemm(x, x, torch.tensor([0, 8])), r"offsets must be int32 \[2\]"),
        (lambda: api.k_grouped_gemm(x, w[:, :8].contiguous(), zero), "agree in K"),
        (lambda: api.k_grouped_gemm(x, w, zero, layout="nt"), "adjacent columns"),
        (lambda: api.k_grouped_gemm(a.values, b.values, zero, layout="nt", **scales), "one scale per 1x128 of both"),
        (lambda: api.grouped_gemm(x, w[None], torch.tensor([0, 8])), r"offsets must be int32 \[2\]"),
        (lambda: api.grouped_gemm(x.t().contiguous(), w[None], zero, layout="tt"), "groups may start at any row of a"),
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
    one = choose(GemmDesc(scaling=Scaling.BLOCK, grouping="dense", m=64, n=512, k=512))
    with knobs(config=one), knobs(num_sms=4):
        assert current().config is one
    assert current().config is None
