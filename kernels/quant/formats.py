"""Numbers and bit patterns of the formats: E4M3, UE8M0 scales, E2M1, and how a scale follows from a largest magnitude.

Everything here is plain torch, runs on any device and is exact: the CUDA kernels compute the same bits.

Sources:
    E4M3: Micikevicius et al., "FP8 Formats for Deep Learning", arXiv:2209.05433 (the "fn" variant: no infinity,
    0x7F and 0xFF are NaN, largest 448). E2M1 and UE8M0 (there E8M0): OCP Microscaling Formats (MX) v1.0, section 5.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

E4M3_MAX = 448.0
E2M1_MAX = 6.0
BLOCK = 128
"""Elements that share one scale along a row (1x128), and the side of a weight block (128x128)."""
MX_BLOCK = 32
"""Elements of an MXFP4 row that share one UE8M0 scale."""
NV_BLOCK = 16
"""Elements of an NVFP4 row that share one E4M3 scale."""
SCALE_MIN = 2.0**-126
"""Smallest scale of a block that is not all zeros: its reciprocal, 2^126, is finite, so that no 0 * inf arises."""


def num_blocks(size: int, block: int = BLOCK) -> int:
    """Blocks that cover ``size`` elements; the last may be short."""
    return -(-size // block)


def split_blocks(x: torch.Tensor, block: int) -> torch.Tensor:
    """[..., K] -> [..., ceil(K / block), block], the last block filled with zeros."""
    K = x.shape[-1]
    blocks = num_blocks(K, block)
    return F.pad(x, (0, blocks * block - K)).reshape(*x.shape[:-1], blocks, block)


def scale_from_amax(amax: torch.Tensor, *, power_of_two: bool = False, largest: float = E4M3_MAX) -> torch.Tensor:
    """fp32 scale s >= SCALE_MIN with amax / s <= ``largest`` (up to one rounding); 1 where amax is 0.

    Args:
        amax: fp32, finite and not negative.
        power_of_two: round s UP to a power of two, exactly (torch's casts to e8m0 round to nearest).

    Example: 448 -> 1, 450 -> 1.0044643 (2 as a power of two), 0 -> 1.
    """
    if power_of_two:
        return ue8m0_to_scale(ue8m0_from_amax(amax, largest=largest))
    # A tensor, not a Python number: CUDA divides by a number by multiplying with its reciprocal, another rounding.
    scale = (amax / torch.full_like(amax, largest)).clamp(min=SCALE_MIN)
    return torch.where(amax == 0, 1.0, scale)


def ue8m0_from_amax(amax: torch.Tensor, *, largest: float = E4M3_MAX) -> torch.Tensor:
    """uint8 code of the least power of two s >= 2^-126 with amax <= s * ``largest``; 127 (s = 1) where amax is 0.

    ``largest`` is 448 or 6. By bits: with amax = m * 2^k and largest = f * 2^j (1 <= m, f < 2) the exponent is k - j,
    one more if m > f. Example for 448: amax 448 -> 127, 449 -> 128, 3 -> 120.
    """
    fraction, exponent = _split(largest)
    bits = amax.contiguous().view(torch.int32)
    code = ((bits + (0x7FFFFF - fraction)) >> 23) - exponent
    return torch.where(amax == 0, 127, code.clamp(1, 254)).to(torch.uint8)


def ue8m0_to_scale(code: torch.Tensor) -> torch.Tensor:
    """uint8 codes -> fp32 scales 2^(code - 127); code 255 is NaN, as in the MX specification."""
    bits = code.to(torch.int32) << 23
    bits = torch.where(code == 0, 0x00400000, bits)  # 2^-127 is subnormal in fp32
    return torch.where(code == 255, 0x7FC00000, bits).view(torch.float32)


def ue8m0_from_scale(scale: torch.Tensor) -> torch.Tensor:
    """fp32 powers of two from 2^-127 to 2^127 -> uint8 codes; everything else -> 255, NaN, so that it is never used."""
    bits = scale.contiguous().view(torch.int32)
    code = bits >> 23
    exact = (bits & 0x7FFFFF == 0) & (code > 0) & (code < 255)
    code = torch.where(exact, code, 255)
    return torch.where(bits == 0x00400000, 0, code).to(torch.uint8)


def to_e4m3(values: torch.Tensor) -> torch.Tensor:
    """fp32 -> e4m3, nearest even, beyond +-448 -> +-448, NaN and infinities -> NaN.

    The clamp comes first because torch versions differ on overflow (2.11 gives NaN, 2.13 saturates).
    """
    return torch.where(values.isfinite(), values.clamp(-E4M3_MAX, E4M3_MAX), torch.nan).to(torch.float8_e4m3fn)


def _split(number: float) -> tuple[int, int]:
    """Fraction bits and unbiased exponent of a positive fp32 number."""
    bits = int(torch.tensor(number).view(torch.int32))
    return bits & 0x7FFFFF, (bits >> 23) - 127
