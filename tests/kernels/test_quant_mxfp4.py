"""MXFP4: codes, byte order, scales, and the folded form, against the MX definition."""

from __future__ import annotations

import pytest
import torch

from megamoe.kernels.quant import mxfp4

GRID = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def weights(*shape: int, octaves: float = 3.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randn((*shape[:-1], -(-shape[-1] // 32), 1), generator=generator) * octaves
    return (torch.randn((*shape[:-1], blocks.shape[-2], 32), generator=generator) * torch.exp2(blocks)).flatten(-2)[
        ..., : shape[-1]
    ]


def test_e2m1_codes() -> None:
    codes = torch.arange(16).to(torch.uint8)
    assert mxfp4.e2m1_decode(codes).tolist() == GRID + [-g for g in GRID]
    assert torch.equal(mxfp4.e2m1_encode(mxfp4.e2m1_decode(codes)), codes)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, -0.25, -5.0])
    expected = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, -0.0, -4.0]
    assert mxfp4.e2m1_decode(mxfp4.e2m1_encode(ties)).tolist() == expected
    with pytest.raises(ValueError, match="NaN"):
        mxfp4.e2m1_encode(torch.tensor([torch.nan]))


def test_low_nibble_is_the_even_k() -> None:
    codes = torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)
    packed = mxfp4.pack_e2m1(codes)
    assert packed.tolist() == [[0x21, 0x0F]]
    assert torch.equal(mxfp4.unpack_e2m1(packed), codes)
    with pytest.raises(ValueError, match="even, got 3"):
        mxfp4.pack_e2m1(codes[:, :3])


@pytest.mark.parametrize("K", [32, 96, 40])
def test_cast_keeps_each_element_within_half_a_step(K: int) -> None:
    w = weights(3, 7, K)
    packed, scale = mxfp4.cast_mxfp4(w)
    assert packed.shape == (3, 7, K // 2) and scale.shape == (3, 7, -(-K // 32))
    back = mxfp4.dequantise_mxfp4(packed, scale)
    for b in range(scale.shape[-1]):
        part = slice(b * 32, min(b * 32 + 32, K))
        s = 2.0 ** (scale[..., b].double() - 127)
        amax = w[..., part].abs().amax(-1).double()
        assert ((amax <= 6 * s) & (amax > 3 * s)).all()
        assert ((back - w)[..., part].abs().double() <= s.unsqueeze(-1)).all()
    again = mxfp4.cast_mxfp4(back)
    assert torch.equal(mxfp4.dequantise_mxfp4(*again), back)


def test_least_error_is_the_best_of_all_scales() -> None:
    """Against every power of two from 2^-40 to 2^40, also for blocks with one large element, where clipping tempts."""
    plain, spiked = weights(200, 32), weights(200, 32, seed=1)
    generator = torch.Generator().manual_seed(2)
    spiked = spiked / spiked.abs().amax(-1, keepdim=True)
    spiked[:, 3] = 1 + 8 * torch.rand(200, generator=generator)
    for w in (plain, spiked):
        chosen = mxfp4.dequantise_mxfp4(*mxfp4.cast_mxfp4(w, rounding="least_error"))
        error = (chosen - w).double().square().sum(-1)
        tried = []
        for exponent in range(-40, 41):
            s = 2.0**exponent
            values = mxfp4.e2m1_decode(mxfp4.e2m1_encode(w / s)) * s
            tried.append((values - w).double().square().sum(-1))
        best = torch.stack(tried).amin(0)
        torch.testing.assert_close(error, best, rtol=1e-12, atol=0)
        ceil = mxfp4.dequantise_mxfp4(*mxfp4.cast_mxfp4(w))
        assert ((ceil - w).double().square().sum(-1) > error).float().mean() > 0.1, "some blocks gain"
    zeros = mxfp4.cast_mxfp4(torch.zeros(1, 32), rounding="least_error")
    assert zeros[1].item() == 127


def test_floor_is_the_rule_of_the_mx_specification() -> None:
    w = torch.tensor([[7.9] + [0.1] * 31, [6.0] + [0.0] * 31, [0.0] * 32])
    packed, scale = mxfp4.cast_mxfp4(w, rounding="floor")
    assert scale.flatten().tolist() == [127, 127, 127]
    assert mxfp4.dequantise_mxfp4(packed, scale)[:, 0].tolist() == [6.0, 6.0, 0.0]
    assert mxfp4.cast_mxfp4(w)[1].flatten().tolist() == [128, 127, 127]


def test_every_code_and_exponent_folds_exactly_and_seven_would_not() -> None:
    codes = torch.arange(16).to(torch.uint8).repeat(2).expand(15, 32)
    exponent = torch.arange(-8, 7).to(torch.int8).unsqueeze(1)
    e4m3 = mxfp4.folded_to_e4m3(mxfp4.pack_e2m1(codes), exponent).double()
    assert torch.equal(e4m3, mxfp4.e2m1_decode(codes).double() * torch.exp2(exponent.double()))
    for r in (-9, 7):
        beyond = torch.tensor(GRID) * 2.0**r
        assert not torch.equal(beyond.clamp(max=448).to(torch.float8_e4m3fn).float(), beyond)


def test_folding_keeps_the_numbers() -> None:
    w = weights(4, 33, 160)
    w[0, 0, :32] = 0  # a block of zeros asks for nothing
    w[1, 1] = 0
    packed, scale = mxfp4.cast_mxfp4(w)
    scale[0, 0, 0] = 1
    folded = mxfp4.fold_mxfp4(packed, scale, on_spread="round")
    kept = (folded.exponent > mxfp4.R_MIN).all(-1)
    assert kept.sum() > 100
    expected = mxfp4.dequantise_mxfp4(packed, scale)
    assert torch.equal(mxfp4.dequantise_folded(folded)[kept], expected[kept])
    assert folded.row_scale[1, 1] == 1


@pytest.mark.parametrize("top", [254, 60, 21, 15])
def test_a_spread_of_14_octaves_fits_and_15_is_refused_or_rounded_and_counted(top: int) -> None:
    packed = mxfp4.pack_e2m1(torch.arange(16).to(torch.uint8).repeat(4, 4))  # [4, 64]
    scale = torch.tensor([[top, top - 14]] * 4, dtype=torch.uint8)
    folded = mxfp4.fold_mxfp4(packed, scale)
    assert folded.num_rounded_rows == 0 and torch.equal(folded.packed, packed)
    assert torch.equal(mxfp4.dequantise_folded(folded), mxfp4.dequantise_mxfp4(packed, scale))
    scale[1:3, 1] = top - 15
    with pytest.raises(ValueError, match=r"2 of 4 rows .* 14 octaves \(first row \[1\]: 15\)"):
        mxfp4.fold_mxfp4(packed, scale)
    folded = mxfp4.fold_mxfp4(packed, scale, on_spread="round")
    assert folded.num_rounded_rows == 2
    exact, got = mxfp4.dequantise_mxfp4(packed, scale), mxfp4.dequantise_folded(folded)
    assert torch.equal(got[[0, 3]], exact[[0, 3]]) and torch.equal(got[:, :32], exact[:, :32])
    largest = 6 * 2.0 ** (top - 127.0)
    error = (got - exact)[1:3, 32:].abs().double()
    assert 0 < float(error.max()) <= largest * 2.0**-17


def test_bad_input_is_refused_with_what_was_got() -> None:
    packed, scale = mxfp4.cast_mxfp4(weights(2, 64))
    with pytest.raises(ValueError, match=r"\(2, 2\) in all, got torch.uint8 \(2, 32\) with scales \(2, 1\)"):
        mxfp4.dequantise_mxfp4(packed, scale[:, :1])
    with pytest.raises(ValueError, match="255"):
        mxfp4.fold_mxfp4(packed, torch.full_like(scale, 255))
    with pytest.raises(ValueError, match="finite"):
        mxfp4.cast_mxfp4(torch.full((1, 32), torch.inf))
    with pytest.raises(ValueError, match="got 'up'"):
        mxfp4.cast_mxfp4(torch.zeros(1, 32), rounding="up")  # type: ignore[arg-type]
