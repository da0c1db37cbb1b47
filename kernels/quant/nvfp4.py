"""NVFP4: E2M1 elements, two to a byte, one E4M3 scale per 16 along the row, one fp32 scale per matrix.

A weight is e2m1 * scale * global_scale. Source: NVIDIA, "Introducing NVFP4 for Efficient and Accurate Low-Precision
Inference" (developer blog, 2025); the global scale amax / (6 * 448) is ModelOpt's ``weight_scale_2``. Byte order as in
``mxfp4.py``: the low nibble is the even k.
"""

from __future__ import annotations

import torch

from megamoe.kernels.quant.formats import (
    E2M1_MAX,
    E4M3_MAX,
    NV_BLOCK,
    SCALE_MIN,
    num_blocks,
    split_blocks,
    to_e4m3,
)
from megamoe.kernels.quant.mxfp4 import e2m1_decode, e2m1_encode, pack_e2m1, unpack_e2m1


def nvfp4_global_scale(amax: torch.Tensor) -> torch.Tensor:
    """fp32 global scale of a matrix whose largest magnitude is ``amax`` (fp32, scalar): amax / 2688; 1 for zeros."""
    scale = (amax / torch.full_like(amax, E2M1_MAX * E4M3_MAX)).clamp(min=SCALE_MIN)
    return torch.where(amax == 0, 1.0, scale)


def cast_nvfp4(
    w: torch.Tensor, *, global_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """w [N, K] -> (packed E2M1 uint8 [N, K / 2], e4m3 scale [N, ceil(K / 16)], fp32 global scale, scalar).

    A block's scale is amax / 6 / global_scale rounded to the nearest E4M3; a block too small for any is zeros.

    Args:
        global_scale: one that several matrices share; ``nvfp4_global_scale`` of w's largest magnitude if None.
    """
    K = w.shape[-1]
    blocks = split_blocks(w.float(), NV_BLOCK)
    amax = blocks.abs().amax(-1)
    if not amax.isfinite().all():
        raise ValueError("NVFP4 weights must be finite, got NaN or infinity")
    overall = nvfp4_global_scale(amax.amax()) if global_scale is None else global_scale
    scale = to_e4m3(amax / (overall * E2M1_MAX))
    step = (scale.float() * overall).unsqueeze(-1)
    codes = e2m1_encode(torch.where(step > 0, blocks / step, 0.0))
    return pack_e2m1(codes.flatten(-2)[..., :K]), scale, overall


def dequantise_nvfp4(packed: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """Inverse of ``cast_nvfp4`` up to rounding: fp32 [N, K]. ``global_scale``: scalar, fp32 or fp64."""
    K = packed.shape[-1] * 2
    expected = (*packed.shape[:-1], num_blocks(K, NV_BLOCK))
    if packed.dtype != torch.uint8 or scale.dtype != torch.float8_e4m3fn or tuple(scale.shape) != expected:
        raise ValueError(
            f"packed E2M1 must be uint8 with e4m3 scales {expected}, got {packed.dtype} {tuple(packed.shape)} with "
            f"{scale.dtype} {tuple(scale.shape)}"
        )
    # e2m1 * e4m3 has at most 6 significant bits: exact in fp32.
    values = e2m1_decode(unpack_e2m1(packed)) * scale.float().repeat_interleave(NV_BLOCK, -1)[..., :K]
    return (values.double() * global_scale.double()).float()
