"""Twins in plain torch of ``scales.py``: packing of UE8M0 and the layouts of SM90 and SM100, with their inverses.

Sources: UE8M0 (E8M0), OCP Microscaling Formats (MX) v1.0, section 5.4.1; four codes to an int32, the order of the
scale operand of PTX's ``tcgen05.mma.block_scale``; rows adjacent for tensor copies, CUDA driver API
``cuTensorMapEncodeTiled``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megamoe.kernels.quant.formats import num_blocks, ue8m0_from_scale, ue8m0_to_scale
from megamoe.kernels.quant.layouts import empty_scales


def pack_ue8m0(scale: torch.Tensor, *, check: bool = True) -> torch.Tensor:
    """fp32 powers of two [..., M, B] -> int32 [..., M, ceil(B / 4)], row-major; missing blocks are 0.

    Example: 1, 2, 4, 8 -> 0x8281807F.

    Args:
        check: read the result once (on a GPU the host waits) and refuse scales that are not powers of two. Without it
            they become code 255, NaN: never a wrong number.
    """
    _check_fp32(scale)
    if check:
        check_powers_of_two(scale)
    code = ue8m0_from_scale(scale)
    blocks = scale.shape[-1]
    num_words = num_blocks(blocks, 4)
    codes = F.pad(code, (0, num_words * 4 - blocks)).to(torch.int32).reshape(*scale.shape[:-1], num_words, 4)
    return codes[..., 0] | codes[..., 1] << 8 | codes[..., 2] << 16 | codes[..., 3] << 24


def unpack_ue8m0(packed: torch.Tensor, blocks: int) -> torch.Tensor:
    """Inverse of ``pack_ue8m0``: int32 [..., M, ceil(blocks / 4)] -> fp32 [..., M, blocks], row-major."""
    _check_packed(packed, blocks)
    shifts = torch.tensor([0, 8, 16, 24], dtype=torch.int32, device=packed.device)
    code = (packed.unsqueeze(-1) >> shifts) & 0xFF
    return ue8m0_to_scale(code.flatten(-2)[..., :blocks].to(torch.uint8)).contiguous()


def to_sm90(scale: torch.Tensor) -> torch.Tensor:
    """fp32 [..., M, B] -> the same in the sm90 layout: rows adjacent, 16-byte aligned."""
    _check_fp32(scale)
    out = empty_scales(tuple(scale.shape), "sm90", scale.device)
    return out.copy_(scale)


def from_sm90(scale: torch.Tensor) -> torch.Tensor:
    """Inverse of ``to_sm90``: fp32 [..., M, B], row-major."""
    _check_fp32(scale)
    return scale.contiguous()


def to_sm100(scale: torch.Tensor, *, check: bool = True) -> torch.Tensor:
    """fp32 powers of two [..., M, B] -> int32 [..., M, ceil(B / 4)] in the sm100 layout; ``check`` as above."""
    packed = pack_ue8m0(scale, check=check)
    return empty_scales(tuple(scale.shape), "sm100", scale.device).copy_(packed)


def from_sm100(packed: torch.Tensor, blocks: int) -> torch.Tensor:
    """Inverse of ``to_sm100``: fp32 [..., M, blocks], row-major."""
    return unpack_ue8m0(packed, blocks)


def rows_of_128x128(scale: torch.Tensor, rows: int, *, parts: int = 1) -> torch.Tensor:
    """128x128 scales [..., parts * ceil(rows / parts / 128), B] -> one for each row, [..., rows, B].

    SM100 takes weights' scales per row too: ``to_sm100(rows_of_128x128(scale, N))``.
    """
    per_part = scale.reshape(*scale.shape[:-2], parts, num_blocks(rows // parts), scale.shape[-1])
    return per_part.repeat_interleave(128, -2)[..., : rows // parts, :].flatten(-3, -2)


def check_powers_of_two(scale: torch.Tensor) -> None:
    """ValueError with the first scale that UE8M0 cannot hold; the host waits for the answer."""
    bad = ue8m0_from_scale(scale) == 255
    if bad.any():
        at = [int(i) for i in bad.nonzero()[0]]
        raise ValueError(
            f"UE8M0 holds powers of two only, got {float(scale[tuple(at)])} at {at}: cast with power_of_two=True"
        )


def _check_fp32(scale: torch.Tensor) -> None:
    if scale.dtype != torch.float32 or scale.dim() < 2:
        raise ValueError(f"scales must be fp32 [..., M, B], got {scale.dtype} {tuple(scale.shape)}")


def _check_packed(packed: torch.Tensor, blocks: int) -> None:
    if packed.dtype != torch.int32 or packed.dim() < 2 or packed.shape[-1] != num_blocks(blocks, 4):
        raise ValueError(
            f"packed scales of {blocks} blocks must be int32 [..., M, {num_blocks(blocks, 4)}], got {packed.dtype} "
            f"{tuple(packed.shape)}"
        )
