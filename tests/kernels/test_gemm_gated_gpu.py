"""GEMMs with an activation and a cast in the epilogue, against their twins on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megamoe.activation import Activation, ActivationName
from megamoe.kernels.gemm.gated import gated_gemm, interleave
from megamoe.kernels.gemm.reference import gated_gemm as twin
from megamoe.kernels.quant.reference import cast_128x128, dequantise_1x128
from megamoe.testing.mega_activations import FLIPS
from megamoe.testing.numerics import assert_close
from tests.kernels.gemm_problems import check, group_rows, left

pytestmark = pytest.mark.gpu
ACTIVATIONS: tuple[ActivationName, ...] = ("swiglu", "swiglu_clamped", "geglu")
# For these problems, which are always the same; ``Twin.slack`` of the mega-kernel's twin holds for any.
_LEEWAY = 2.0**-9


def weights(groups: int, width: int, k: int, recipe: str, g: torch.Generator) -> tuple[torch.Tensor, Any]:
    """Interleaved w13 [groups, 2 width, k] and its scales, small enough that activations keep both their branches."""
    w13 = (torch.randn(groups, 2 * width, k, generator=g) * k**-0.5 * 2).bfloat16().cuda()
    if recipe == "bf16":
        return interleave(w13), None
    q, scale = cast_128x128(w13, parts=2)
    return interleave(q), scale


def same_cast(
    q: torch.Tensor, scale: torch.Tensor, expected: tuple[torch.Tensor, torch.Tensor], what: str, *, fp8: bool
) -> None:
    """Scales to the last digits of the exponentials, and every q within one step of e4m3 of the twin's.

    FP8 tensor cores keep about 13 bits of the sum of each 128: pre-activations, so scales and roundings, differ as much
    as they do in the mega-kernel (megamoe/testing/mega_activations.py): besides the step, ``_LEEWAY`` of the block's
    largest value, which is many steps of a small one.
    """
    torch.testing.assert_close(scale, expected[1], rtol=_LEEWAY if fp8 else 1e-4, atol=0)
    assert_close(dequantise_1x128(q, scale), dequantise_1x128(*expected), whole=1e-4, row=1e-3, what=what)
    apart = (q.float() - expected[0].float()).abs()
    step = (expected[0].float().abs() / 8).clamp(min=2.0**-9)
    worst = float((apart - step * 1.001).max()) / 448
    most = _LEEWAY if fp8 else 0
    assert worst <= most, f"{what}: an element is one step and {worst:.1e} of its block's largest off"
    flips, most = int((apart > 0).sum()), (FLIPS if fp8 else 0.02) * apart.numel() + 4
    assert flips <= most, f"{what}: {flips} of {apart.numel()} roundings differ (bound {most:.0f})"


@pytest.mark.parametrize("out", ["bf16", "e4m3"])
@pytest.mark.parametrize("recipe", ["bf16", "fp8_block"])
@pytest.mark.parametrize("seed", range(24))
def test_grouped_and_dense(recipe: str, out: str, seed: int) -> None:
    g = torch.Generator().manual_seed(8000 + seed)
    groups = int(torch.randint(1, 9, (1,), generator=g)) if seed % 3 else 0
    rows = group_rows(max(groups, 1), [40, 300, 2500, 200][seed % 4], g)
    rows = rows if groups else [max(1, sum(rows))]
    total = max(1, sum(rows) + (seed % 3 if groups else 0))
    width, k = 8 * int(torch.randint(1, 100, (1,), generator=g)), 16 * int(torch.randint(1, 80, (1,), generator=g))
    activation = Activation(ACTIVATIONS[seed % 3])
    a = left(total, k, recipe, g, device="cuda")
    b, b_scale = weights(max(groups, 1), width, k, recipe, g)
    offsets = torch.tensor([0, *rows], device="cuda").cumsum(0).int() if groups else None
    if not groups:
        b, b_scale = b[0], None if b_scale is None else b_scale[0]
    row_weight = torch.rand(total, generator=g).cuda() if seed % 2 else None
    options: dict[str, Any] = {"activation": activation, "a_scale": a.scale, "b_scale": b_scale}
    options |= {"row_weight": row_weight, "out_dtype": torch.bfloat16 if out == "bf16" else torch.float8_e4m3fn}
    d, scale = gated_gemm(a.values, b, offsets, **options)
    again, scale_again = gated_gemm(a.values, b, offsets, **options)
    expected, expected_scale = twin(a.values, b, offsets, **options)
    n, what = sum(rows), f"{recipe} {activation.name} groups {rows} width {width} k {k}"
    assert torch.equal(d[:n].view(torch.uint8), again[:n].view(torch.uint8)), "two runs differ"
    if scale is None or scale_again is None or expected_scale is None:
        assert out == "bf16"
        check(d[:n], expected[:n], what)
        return
    assert torch.equal(scale[:n], scale_again[:n]), "two runs differ"
    same_cast(d[:n], scale[:n], (expected[:n], expected_scale[:n]), what, fp8=recipe != "bf16")
    padding = d.as_strided((n, -(-width // 16) * 16 - width), (d.stride(0), 1), width)
    assert not padding.view(torch.uint8).any(), "padding of rows must be zeros"


def test_nan_and_infinity_leave_the_rest_of_their_block_alone() -> None:
    g = torch.Generator().manual_seed(9)
    a, (b, _) = left(64, 256, "bf16", g, device="cuda"), weights(1, 256, 256, "bf16", g)
    b[0, 16 * 3 + 2, 0] = float("inf")  # gate row 26
    b[0, 16 * 20 + 8, 1] = float("nan")  # up row 160
    options: dict[str, Any] = {"activation": Activation(), "out_dtype": torch.float8_e4m3fn}
    q, scale = gated_gemm(a.values, b[0], **options)
    expected, expected_scale = twin(a.values, b[0], **options)
    assert scale is not None and expected_scale is not None
    wrong = expected.float().isnan()
    assert torch.equal(q.float().isnan(), wrong) and wrong[:, 160].all() and scale.isfinite().all()
    torch.testing.assert_close(scale, expected_scale, rtol=1e-4, atol=0)
    assert ((q.float() - expected.float()).abs()[~wrong] <= expected.float().abs()[~wrong] / 8 * 1.001 + 2.0**-9).all()
