"""NVFP4: scales, byte order and rounding, against the definition."""

from __future__ import annotations

import pytest
import torch

from megamoe.kernels.quant import nvfp4


def test_a_block_by_hand() -> None:
    """Largest magnitude 2688 = 6 * 448: global scale 1, so block scales are amax / 6 as they stand in E4M3."""
    w = torch.zeros(1, 32)
    w[0, :4] = torch.tensor([2688.0, 448.0, -224.0, 100.0])
    w[0, 16:19] = torch.tensor([12.0, -3.0, 5.0])
    packed, scale, overall = nvfp4.cast_nvfp4(w)
    assert float(overall) == 1.0 and scale.float().tolist() == [[448.0, 2.0]]
    assert packed[0, :2].tolist() == [0x27, 0x09]  # 6 and 1; -0.5 and 100 / 448 < 0.25, 0: the low nibble comes first
    assert packed[0, 8:10].tolist() == [0xB7, 0x04]  # 6, -1.5; 2.5 ties to 2, whose code is even
    assert nvfp4.dequantise_nvfp4(packed, scale, overall)[0, 16:19].tolist() == [12.0, -3.0, 4.0]


@pytest.mark.parametrize("K", [32, 40])
def test_every_element_is_within_half_a_step(K: int) -> None:
    w = torch.randn(9, K, generator=torch.Generator().manual_seed(0)) * 0.02
    packed, scale, overall = nvfp4.cast_nvfp4(w)
    assert packed.shape == (9, K // 2) and scale.shape == (9, -(-K // 16))
    back = nvfp4.dequantise_nvfp4(packed, scale, overall)
    step = (scale.float() * overall).repeat_interleave(16, -1)[:, :K]
    # Half of 6 - 4 is one step; a scale rounded down by up to 1/16 clips at most 6/16 of a step.
    assert ((back - w).abs() <= 1.001 * step).all()
    # As numbers, not codes: a cast of what was cast has nothing left to round but the scales.
    again = nvfp4.dequantise_nvfp4(*nvfp4.cast_nvfp4(back, global_scale=overall))
    assert ((again - back).norm() / back.norm()) < 0.05


def test_small_blocks_and_zeros() -> None:
    w = torch.zeros(2, 32)
    w[0, 0], w[0, 16] = 1.0, 1e-9
    packed, scale, overall = nvfp4.cast_nvfp4(w)
    assert scale[0, 1].float() == 0, "below E4M3's least scale"
    back = nvfp4.dequantise_nvfp4(packed, scale, overall)
    assert back[0, 16] == 0 and back[1].abs().sum() == 0 and back.isfinite().all()
    assert float(nvfp4.cast_nvfp4(torch.zeros(1, 16))[2]) == 1.0


def test_refusals() -> None:
    with pytest.raises(ValueError, match="NVFP4 weights must be finite"):
        nvfp4.cast_nvfp4(torch.full((1, 16), torch.inf))
    packed, scale, overall = nvfp4.cast_nvfp4(torch.ones(2, 32))
    with pytest.raises(ValueError, match=r"e4m3 scales \(2, 2\), got .* \(2, 1\)"):
        nvfp4.dequantise_nvfp4(packed, scale[:, :1], overall)
