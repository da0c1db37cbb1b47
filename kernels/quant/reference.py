"""Twins in plain torch of the casts in ``casts.py``: same names, same signatures, same bits, on any device.

One rule everywhere: scale = amax / 448 over the finite elements of the block (1 for a block of zeros), and
q = e4m3(clamp(x * (1 / scale))), both in fp32; NaN and infinities become NaN and leave the rest of their block alone.
So x is about q * scale.

Sources of the scale blocks: 1x128 for activations and 128x128 for weights, DeepSeek-V3 (arXiv:2412.19437, section
3.3.2; its ``weight_scale_inv`` is our scale); per row, torch._scaled_mm's row-wise scaling.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megamoe.kernels.quant.formats import BLOCK, num_blocks, scale_from_amax, to_e4m3


def cast_1x128(x: torch.Tensor, *, power_of_two: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., M, K] -> (e4m3 [..., M, K], fp32 scale [..., M, ceil(K / 128)])."""
    _check(x, 1)
    K = x.shape[-1]
    blocks = _pad(x.float(), K, -1).reshape(*x.shape[:-1], num_blocks(K), BLOCK)
    q, scale = _quantise(blocks, (-1,), power_of_two)
    return _crop(q.flatten(-2), K), scale.squeeze(-1)


def cast_128x128(w: torch.Tensor, *, parts: int = 1, power_of_two: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """w [..., N, K] -> (e4m3 [..., N, K], fp32 scale [..., parts * ceil(N / parts / 128), ceil(K / 128)]).

    ``parts``: N is this many stacked matrices, each starting new blocks. w13 has 2, gate and up: with I = 2880 they
    have 23 scale rows each, 46 in all, and row n of the up half belongs to scale row 23 + n // 128.
    """
    _check(w, 2)
    rows, K = part_rows(w.shape[-2], parts), w.shape[-1]
    split = w.float().reshape(*w.shape[:-2], parts, rows, K)
    blocks = _pad(_pad(split, rows, -2), K, -1)
    blocks = blocks.reshape(*split.shape[:-2], num_blocks(rows), BLOCK, num_blocks(K), BLOCK)
    q, scale = _quantise(blocks, (-3, -1), power_of_two)  # [..., parts, row blocks, 128, column blocks, 128]
    q = q.flatten(-2).flatten(-3, -2).view(torch.uint8)[..., :rows, :K].flatten(-3, -2)
    return q.view(torch.float8_e4m3fn), scale.squeeze(-1).squeeze(-2).flatten(-3, -2)


def cast_row(x: torch.Tensor, *, power_of_two: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., M, K] -> (e4m3 [..., M, K], fp32 scale [..., M]): one scale a token, or an output row of a weight."""
    _check(x, 1)
    q, scale = _quantise(x.float(), (-1,), power_of_two)
    return q, scale.squeeze(-1)


def dequantise_1x128(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Inverse of ``cast_1x128`` up to rounding: fp32 [..., M, K]."""
    return q.float() * _spread(scale, BLOCK, q.shape[-1], -1)


def dequantise_128x128(q: torch.Tensor, scale: torch.Tensor, *, parts: int = 1) -> torch.Tensor:
    """Inverse of ``cast_128x128`` up to rounding: fp32 [..., N, K]."""
    rows = part_rows(q.shape[-2], parts)
    per_part = scale.reshape(*scale.shape[:-2], parts, num_blocks(rows), scale.shape[-1])
    full = _spread(_spread(per_part, BLOCK, rows, -2), BLOCK, q.shape[-1], -1)
    return q.float() * full.flatten(-3, -2)


def dequantise_row(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Inverse of ``cast_row`` up to rounding: fp32 [..., M, K]."""
    return q.float() * scale.unsqueeze(-1)


def part_rows(rows: int, parts: int) -> int:
    """Rows of each of ``parts`` equal stacked matrices; ValueError if they do not come out even."""
    if parts < 1 or rows % parts:
        raise ValueError(f"parts must divide the number of rows ({rows}), got {parts}")
    return rows // parts


def _quantise(blocks: torch.Tensor, dims: tuple[int, ...], power_of_two: bool) -> tuple[torch.Tensor, torch.Tensor]:
    amax = torch.where(blocks.isfinite(), blocks.abs(), 0.0).amax(dim=dims, keepdim=True)
    scale = scale_from_amax(amax, power_of_two=power_of_two)
    return to_e4m3(blocks * scale.reciprocal()), scale


def _pad(x: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    extra = num_blocks(size) * BLOCK - size
    return F.pad(x, (0, 0) * (-dim - 1) + (0, extra)) if extra else x


def _crop(q: torch.Tensor, K: int) -> torch.Tensor:
    return q if q.shape[-1] == K else q.view(torch.uint8)[..., :K].contiguous().view(torch.float8_e4m3fn)


def _spread(scale: torch.Tensor, block: int, size: int, dim: int) -> torch.Tensor:
    return scale.repeat_interleave(block, dim).narrow(dim, 0, size)


def _check(x: torch.Tensor, dims: int) -> None:
    if x.dim() < dims or x.shape[-1] == 0 or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"a cast takes fp32, bf16 or fp16 of at least {dims} dimensions and 1 column, "
            f"got {x.dtype} of shape {tuple(x.shape)}"
        )
