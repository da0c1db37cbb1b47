"""The torch twins of the casts against the formats' definitions, written out by hand or in float64."""

from __future__ import annotations

import math

import pytest
import torch

from megamoe.kernels.quant import formats, reference

E4M3 = torch.float8_e4m3fn


def dense(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    magnitude = torch.exp2(torch.rand(shape, generator=generator) * 12 - 6)
    return (torch.randn(shape, generator=generator) * magnitude).to(dtype)


def e4m3_grid() -> torch.Tensor:
    """All finite E4M3 numbers from the definition: 4 exponent bits of bias 7, 3 of mantissa."""
    values = [math.ldexp(m, -9) for m in range(8)]
    values += [math.ldexp(8 + m, e - 10) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
    return torch.tensor(values, dtype=torch.float64)


def nearest_even(x: torch.Tensor) -> torch.Tensor:
    grid = e4m3_grid()
    high = torch.searchsorted(grid, x.double().abs().clamp(max=448)).clamp(1, len(grid) - 1)
    low_gap = x.double().abs().clamp(max=448) - grid[high - 1]
    high_gap = grid[high] - x.double().abs().clamp(max=448)
    up = (high_gap < low_gap) | ((high_gap == low_gap) & (high % 2 == 0))
    return torch.where(up, grid[high], grid[high - 1]) * x.double().sign()


def test_to_e4m3_rounds_to_nearest_even_and_saturates() -> None:
    x = torch.cat([dense(20000, dtype=torch.float32), torch.tensor([0.0, 448.0, 464.0, 465.0, 1e30, -1e30, 2.0**-10])])
    assert torch.equal(formats.to_e4m3(x).double(), nearest_even(x))
    grid = e4m3_grid()
    ties = (grid[1:] + grid[:-1]) / 2
    assert torch.equal(formats.to_e4m3(ties.float()).double(), nearest_even(ties))
    odd = formats.to_e4m3(torch.tensor([torch.inf, -torch.inf, torch.nan]))
    assert odd.float().isnan().all()


def test_power_of_two_scales_round_up_exactly() -> None:
    amax = torch.cat(
        [dense(5000, dtype=torch.float32).abs(), torch.exp2(torch.arange(-149.0, 128)), torch.tensor([448.0])]
    )
    amax = torch.cat([amax, torch.nextafter(torch.tensor([448.0, 448.0]), torch.tensor([0.0, 1e9]))])
    code = formats.ue8m0_from_amax(amax)
    scale = formats.ue8m0_to_scale(code).double()
    assert (amax.double() <= 448 * scale).all()
    shrinkable = scale > 2.0**-126
    assert (amax.double() > 448 * scale / 2)[shrinkable].all()
    assert formats.ue8m0_from_amax(torch.tensor([448.0, 449.0, 3.0, 0.0])).tolist() == [127, 128, 120, 127]


def test_ue8m0_codes_and_scales_are_inverse() -> None:
    codes = torch.arange(256).to(torch.uint8)
    scales = formats.ue8m0_to_scale(codes)
    assert [float(s) for s in scales[:255]] == [2.0 ** (c - 127) for c in range(255)]
    assert scales[255].isnan()
    assert torch.equal(formats.ue8m0_from_scale(scales), codes)
    assert (formats.ue8m0_from_scale(torch.tensor([1.5, 0.0, -1.0, torch.inf, 3.0])) == 255).all()


def test_scales_of_zero_and_of_the_smallest_and_largest_numbers_stay_finite() -> None:
    amax = torch.tensor([0.0, 2.0**-149, 2.0**-133, torch.finfo(torch.float32).max])
    for power_of_two in (False, True):
        scale = formats.scale_from_amax(amax, power_of_two=power_of_two)
        assert scale[0] == 1
        assert scale.isfinite().all() and scale.reciprocal().isfinite().all()
        assert (scale >= formats.SCALE_MIN).all()


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("K", [8, 128, 136, 512])
def test_cast_1x128_blockwise(K: int, power_of_two: bool) -> None:
    x = dense(5, 3, K)
    q, scale = reference.cast_1x128(x, power_of_two=power_of_two)
    assert q.dtype is E4M3 and q.shape == x.shape and scale.shape == (5, 3, -(-K // 128))
    for b in range(scale.shape[-1]):
        block = x[..., b * 128 : (b + 1) * 128].float()
        exact = block.abs().amax(-1).double() / 448
        expected = torch.exp2(exact.log2().ceil()) if power_of_two else exact
        assert torch.allclose(scale[..., b].double(), expected, rtol=0 if power_of_two else 2.0**-24, atol=0)
        expected_q = nearest_even(block * (1 / scale[..., b : b + 1]))
        assert torch.equal(q[..., b * 128 : (b + 1) * 128].double(), expected_q)


@pytest.mark.parametrize(("N", "parts"), [(128, 1), (200, 1), (288, 2), (256, 2), (16, 2)])
def test_cast_128x128_restarts_blocks_at_each_part(N: int, parts: int) -> None:
    w = dense(2, N, 264, dtype=torch.float32)
    q, scale = reference.cast_128x128(w, parts=parts)
    rows = N // parts
    per_part = -(-rows // 128)
    assert scale.shape == (2, parts * per_part, 3)
    for e, n, k in [(0, 0, 0), (1, N - 1, 263), (1, N // 2, 129), (0, rows - 1, 127)]:
        at = (e, n // rows * per_part + n % rows // 128, k // 128)
        first = n // rows * rows + n % rows // 128 * 128
        block = w[e, first : min(first + 128, (n // rows + 1) * rows), k // 128 * 128 : k // 128 * 128 + 128]
        assert scale[at] == block.abs().amax() / 448
        assert q[e, n, k].double() == nearest_even((w[e, n, k] * (1 / scale[at])).reshape(1))
    error = (reference.dequantise_128x128(q, scale, parts=parts) - w).abs()
    assert float(error.max()) <= float(scale.max()) * 16.01  # half a step of 32 just below 448


def test_round_trips_stay_within_half_a_step() -> None:
    x = dense(37, 264)
    for cast, dequantise in (
        (reference.cast_1x128, reference.dequantise_1x128),
        (reference.cast_row, reference.dequantise_row),
    ):
        q, scale = cast(x)
        back = dequantise(q, scale)
        spread = scale.unsqueeze(-1) if cast is reference.cast_row else scale.repeat_interleave(128, -1)[:, :264]
        assert ((back - x.float()).abs() <= x.float().abs() * 2.0**-4 * 1.001 + spread * 2.0**-10).all()
        again, scale_again = cast(back)
        assert torch.equal(dequantise(again, scale_again), back)


def test_nan_and_infinity_stay_where_they_are() -> None:
    x = dense(4, 256)
    clean_q, clean_scale = reference.cast_1x128(x.index_fill(1, torch.tensor([3, 200]), 0))
    x[:, 3], x[:, 200] = torch.nan, -torch.inf
    q, scale = reference.cast_1x128(x)
    assert torch.equal(scale, clean_scale)
    bad = torch.zeros(4, 256, dtype=torch.bool).index_fill(1, torch.tensor([3, 200]), True)
    assert torch.equal(q.float().isnan(), bad)
    assert torch.equal(q.float()[~bad], clean_q.float()[~bad])
    q, scale = reference.cast_row(torch.full((1, 8), torch.nan))
    assert q.float().isnan().all() and scale.tolist() == [1.0]


def test_no_rows_and_zero_rows() -> None:
    q, scale = reference.cast_1x128(torch.empty(0, 256, dtype=torch.bfloat16))
    assert q.shape == (0, 256) and scale.shape == (0, 2)
    q, scale = reference.cast_1x128(torch.zeros(3, 256))
    assert (q.float() == 0).all() and (scale == 1).all()


def test_bad_input_is_refused_with_what_was_got() -> None:
    with pytest.raises(ValueError, match="int64"):
        reference.cast_1x128(torch.zeros(2, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\(2, 0\)"):
        reference.cast_row(torch.zeros(2, 0))
    with pytest.raises(ValueError, match=r"number of rows \(9\), got 2"):
        reference.cast_128x128(torch.zeros(9, 8), parts=2)
