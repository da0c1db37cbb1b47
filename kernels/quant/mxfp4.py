"""MXFP4: E2M1 elements, two to a byte, with one UE8M0 scale per 32 along the row; and its form for E4M3 tensor cores.

Sources: OCP Microscaling Formats (MX) v1.0, sections 5.3 (MXFP4) and 6.3 (conversion). Byte order of the checkpoints of
gpt-oss (``*_blocks``, ``*_scales``) and DeepSeek-V4: the low nibble is the even k.

Folded form: GPUs without FP4 tensor cores multiply E4M3. A block with scale 2^(c + r), c the same for the whole row, is
2^c times the elements' e2m1 * 2^r, which E4M3 holds exactly for -8 <= r <= 6: from 0.5 * 2^-8 = 2^-9, its smallest
number, to 6 * 2^6 = 384. So 2^c becomes one fp32 scale a row, constant along k, and r (int8) one exponent a block. Rows
whose blocks spread over more than 14 octaves do not fit.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch

from megamoe.kernels.quant.formats import (
    E2M1_MAX,
    MX_BLOCK,
    num_blocks,
    split_blocks,
    ue8m0_from_amax,
    ue8m0_to_scale,
)

R_MIN, R_MAX = -8, 6
"""Exponents r for which every E2M1 number times 2^r is an E4M3 number."""
ScaleChoice = Literal["ceil", "floor", "least_error"]
"""How ``cast_mxfp4`` chooses the scale of a block."""
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class FoldedMxfp4(NamedTuple):
    """Packed E2M1 with a scale 2^r per block and an fp32 scale per row.

    - ``packed``: uint8 [..., N, K / 2], low nibble = even k.
    - ``exponent``: r, int8 [..., N, ceil(K / 32)], -8 <= r <= 6; 0 where a block is all zeros.
    - ``row_scale``: fp32 [..., N], a power of two.
    - ``num_rounded_rows``: rows that spread too far and lost bits; 0 unless ``on_spread="round"``.
    """

    packed: torch.Tensor
    exponent: torch.Tensor
    row_scale: torch.Tensor
    num_rounded_rows: int


def e2m1_encode(values: torch.Tensor) -> torch.Tensor:
    """fp32 -> uint8 codes 0 to 15 (bit 3 is the sign), nearest even, beyond +-6 -> +-6. NaN has no code: ValueError.

    Example: 2.5 -> 4 (2.0, the even mantissa), -0.75 -> 0b1010 (-1.0), 5 -> 6 (4.0).
    """
    if values.isnan().any():
        raise ValueError("E2M1 has no NaN, got one: MXFP4 weights must be finite")
    magnitude = values.abs()
    code = torch.zeros_like(values, dtype=torch.uint8)
    for k in range(7):  # a tie goes to the even code: upward from odd k, not upward from even k
        middle = (_MAGNITUDES[k] + _MAGNITUDES[k + 1]) / 2
        code += (magnitude >= middle) if k % 2 else (magnitude > middle)
    return code | (values.signbit().to(torch.uint8) << 3)


def e2m1_decode(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes 0 to 15 -> fp32."""
    table = torch.tensor([*_MAGNITUDES, *(-m for m in _MAGNITUDES)], device=codes.device)
    return table[codes.long()]


def pack_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes [..., K] -> uint8 [..., K / 2], low nibble = even k."""
    if codes.shape[-1] % 2:
        raise ValueError(f"MXFP4 packs two elements to a byte: K must be even, got {codes.shape[-1]}")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_e2m1(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of ``pack_e2m1``: uint8 [..., K / 2] -> codes [..., K]."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def cast_mxfp4(w: torch.Tensor, *, rounding: ScaleChoice = "ceil") -> tuple[torch.Tensor, torch.Tensor]:
    """w [..., N, K] -> (packed E2M1 uint8 [..., N, K / 2], UE8M0 scale uint8 [..., N, ceil(K / 32)]).

    ``rounding`` of the scale: "ceil" takes the least power of two that clips nothing (amax <= 6 * scale), "floor" the
    MX specification's 2^(floor(log2(amax)) - 2), which clips magnitudes from 6 to 8 scales down to 6, "least_error" the
    one with the least sum of squared errors of the block, of two equal ones the larger. Elements round to nearest.
    """
    if rounding not in get_args(ScaleChoice):
        raise ValueError(f"rounding must be one of {', '.join(get_args(ScaleChoice))}, got {rounding!r}")
    K = w.shape[-1]
    blocks = split_blocks(w.float(), MX_BLOCK)
    amax = blocks.abs().amax(-1)
    if not amax.isfinite().all():
        raise ValueError("MXFP4 weights must be finite, got NaN or infinity")
    if rounding == "floor":
        scale = torch.where(amax == 0, 127, ((amax.view(torch.int32) >> 23) - 2).clamp(1, 254)).to(torch.uint8)
    else:
        scale = ue8m0_from_amax(amax, largest=E2M1_MAX)
    codes = _encode(blocks, scale)
    if rounding == "least_error":
        # Twice ceil's scale only has fewer of its numbers. A quarter loses at least 1.5 scales at the largest element,
        # squared 2.25, more than the other 31 can win: 1/16 each, and only where they lie below 1.75 scales.
        half = torch.where(amax == 0, scale, (scale - 1).clamp(min=1))
        finer = _encode(blocks, half)
        better = _squared_error(blocks, finer, half) < _squared_error(blocks, codes, scale)
        scale = torch.where(better, half, scale)
        codes = torch.where(better.unsqueeze(-1), finer, codes)
    return pack_e2m1(codes.flatten(-2)[..., :K]), scale


def dequantise_mxfp4(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Inverse of ``cast_mxfp4`` up to rounding: fp32 [..., N, K]."""
    _check_scale(packed, scale)
    return e2m1_decode(unpack_e2m1(packed)) * _spread(ue8m0_to_scale(scale), packed)


def fold_mxfp4(
    packed: torch.Tensor, scale: torch.Tensor, *, on_spread: Literal["refuse", "round"] = "refuse"
) -> FoldedMxfp4:
    """Packed E2M1 and UE8M0 scales -> the same numbers with an exponent r per block and an fp32 scale per row.

    The row scale puts the row's largest block at r = 6. Blocks of zeros ask for nothing. A row whose other blocks reach
    below r = -8 is refused (ValueError with the count), or, with ``on_spread="round"``, its smallest blocks are
    rounded to r = -8: an error of at most 2^-17 of the largest element such a row can hold.
    """
    if on_spread not in ("refuse", "round"):
        raise ValueError(f"on_spread must be refuse or round, got {on_spread!r}")
    _check_scale(packed, scale)
    if (scale == 255).any():
        raise ValueError("UE8M0 scale 255 is NaN: MXFP4 weights must be finite")
    codes = split_blocks(unpack_e2m1(packed), MX_BLOCK)
    empty = (codes & 7 == 0).all(-1)
    code = torch.where(empty, -1, scale.to(torch.int32))
    top = code.amax(-1, keepdim=True)
    r = torch.where(empty, 0, code - top + R_MAX)
    row_scale = _exp2(torch.where(top < 0, 0, top - 127 - R_MAX)).squeeze(-1)
    low = r < R_MIN
    rows = low.any(-1)
    if num := int(rows.sum()):
        if on_spread == "refuse":
            at = [int(i) for i in rows.nonzero()[0]]
            raise ValueError(
                f"{num} of {rows.numel()} rows have UE8M0 scales that spread over more than {R_MAX - R_MIN} octaves "
                f'(first row {at}: {int(-(r[tuple(at)].min() - R_MAX))}); pass on_spread="round" to round their '
                "smallest blocks"
            )
        shifted = e2m1_encode(e2m1_decode(codes) * _exp2((r - R_MIN).clamp(max=0)).unsqueeze(-1))
        codes = torch.where(low.unsqueeze(-1), shifted, codes)
        packed = pack_e2m1(codes.flatten(-2)[..., : packed.shape[-1] * 2])
    return FoldedMxfp4(packed, r.clamp(min=R_MIN).to(torch.int8), row_scale, num)


def folded_to_e4m3(packed: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """e4m3 [..., N, K] = e2m1 * 2^r, exact: what the tensor cores multiply; times ``row_scale`` it is the weight."""
    _check_scale(packed, exponent)
    scale = _spread(_exp2(exponent.to(torch.int32)), packed)
    return (e2m1_decode(unpack_e2m1(packed)) * scale).to(torch.float8_e4m3fn)


def dequantise_folded(folded: FoldedMxfp4) -> torch.Tensor:
    """fp32 [..., N, K]; equal to ``dequantise_mxfp4`` of what was folded unless rows were rounded."""
    return folded_to_e4m3(folded.packed, folded.exponent).float() * folded.row_scale.unsqueeze(-1)


def _encode(blocks: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return e2m1_encode(blocks / ue8m0_to_scale(scale).unsqueeze(-1))


def _squared_error(blocks: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Sum over each block in units of its largest element, so that squares neither overflow nor vanish."""
    unit = blocks.abs().amax(-1, keepdim=True).double().clamp(min=2.0**-149)
    error = blocks.double() - e2m1_decode(codes).double() * ue8m0_to_scale(scale).double().unsqueeze(-1)
    return (error / unit).square().sum(-1)


def _spread(scale: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    return scale.repeat_interleave(MX_BLOCK, -1)[..., : packed.shape[-1] * 2]


def _exp2(exponent: torch.Tensor) -> torch.Tensor:
    """2^exponent in fp32 for integers up to 127, by bits (exp2, pow and ldexp need not be exact); 0 below -149."""
    e = exponent.to(torch.int32)
    subnormal = torch.where(e < -149, 0, 1 << (e + 149).clamp(0, 22))
    return torch.where(e < -126, subnormal, (e + 127).clamp(min=1) << 23).to(torch.int32).view(torch.float32)


def _check_scale(packed: torch.Tensor, scale: torch.Tensor) -> None:
    expected = (*packed.shape[:-1], num_blocks(packed.shape[-1] * 2, MX_BLOCK))
    if packed.dtype != torch.uint8 or tuple(scale.shape) != expected:
        raise ValueError(
            f"packed E2M1 must be uint8 with one scale per {MX_BLOCK} elements, {expected} in all, "
            f"got {packed.dtype} {tuple(packed.shape)} with scales {tuple(scale.shape)}"
        )
