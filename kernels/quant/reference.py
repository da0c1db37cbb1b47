"""Twins in plain torch of the casts in ``casts.py``: same names, same signatures, same bits, on any device.

One rule everywhere: scale = amax / 448 over the finite elements of the block (1 for a block of zeros), and
q = e4m3(clamp(x * (1 / scale))), both in fp32; NaN and infinities become NaN and leave the rest of their block alone.
So x is about q * scale. ``power_of_two`` rounds the scale up to a power of two; ``layout`` says how 1x128 scales lie
(see layouts.py). Given an ``activation``, a cast takes the pre-activation h13 [..., 2K] (gate columns first; [..., K]
if it is not gated) and casts row_weight * activation(h13), computed in fp32; ``row_weight`` is fp32 [..., M].

Sources of the scale blocks: 1x128 for activations and 128x128 for weights, DeepSeek-V3 (arXiv:2412.19437, section
3.3.2; its ``weight_scale_inv`` is our scale); per row, torch._scaled_mm's row-wise scaling.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

from megamoe.kernels.quant.formats import BLOCK, num_blocks, scale_from_amax, to_e4m3
from megamoe.kernels.quant.layouts import Layout, check_layout
from megamoe.kernels.quant.reference_scales import to_sm90, to_sm100


class ActivationLike(Protocol):
    """What a cast needs of ``megamoe.Activation``."""

    @property
    def name(self) -> str: ...
    @property
    def limit(self) -> float: ...
    @property
    def alpha(self) -> float: ...
    @property
    def gated(self) -> bool: ...
    def __call__(self, h13: torch.Tensor) -> torch.Tensor: ...


class CastWithTranspose(NamedTuple):
    """A cast matrix and its transposed copy, each with its scales."""

    q: torch.Tensor
    scale: torch.Tensor
    q_t: torch.Tensor
    scale_t: torch.Tensor


def cast_1x128(
    x: torch.Tensor,
    *,
    activation: ActivationLike | None = None,
    row_weight: torch.Tensor | None = None,
    power_of_two: bool = False,
    layout: Layout = "row",
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., M, K] -> (e4m3 [..., M, K], fp32 scale [..., M, ceil(K / 128)] in ``layout``)."""
    check_cast(x, activation, row_weight, power_of_two, layout)
    return _cast_1x128(_values(x, activation, row_weight), power_of_two, layout)


def cast_1x128_both(
    x: torch.Tensor,
    *,
    offsets: torch.Tensor | None = None,
    activation: ActivationLike | None = None,
    row_weight: torch.Tensor | None = None,
    power_of_two: bool = False,
    layout: Layout = "row",
) -> CastWithTranspose:
    """``cast_1x128`` of x [M, K] and of its transpose: q_t e4m3 [K, M], scale_t [K, ceil(M / 128)] in ``layout``.

    Args:
        offsets: int32 [G + 1], from 0 up, on x's device: rows offsets[g] to offsets[g + 1] are group g, and rows from
            offsets[G] on are nobody's (unspecified in q and scale). Scales along the rows must not span groups, so each
            group starts a block of the transposed copy: q_t is [K, 128 * B], scale_t [K, B] with B = M // 128 + G, and
            group g's columns begin at block ``transposed_blocks(offsets)[g]``, zeros to the end of its last block. No
            sizes are read on the host by the kernel. Blocks of no group are zeros with scale 1.
    """
    check_cast(x, activation, row_weight, power_of_two, layout)
    check_both(x, offsets)
    values = _values(x, activation, row_weight)
    q, scale = _cast_1x128(values, power_of_two, layout)
    if offsets is None:
        return CastWithTranspose(q, scale, *_cast_1x128(values.t(), power_of_two, layout))
    spread = values.new_zeros(values.shape[1], (len(values) // BLOCK + len(offsets) - 1) * BLOCK)
    bounds = offsets.tolist()
    for begin, end, block in zip(bounds, bounds[1:], transposed_blocks(offsets).tolist(), strict=False):
        spread[:, block * BLOCK : block * BLOCK + end - begin] = values[begin:end].t()
    return CastWithTranspose(q, scale, *_cast_1x128(spread, power_of_two, layout))


def transposed_blocks(offsets: torch.Tensor) -> torch.Tensor:
    """First 128-column block of each group in the transposed copy: int32 [G + 1], offsets // 128 + index."""
    index = torch.arange(len(offsets), dtype=offsets.dtype, device=offsets.device)
    return torch.div(offsets, BLOCK, rounding_mode="floor") + index


def cast_128x128(w: torch.Tensor, *, parts: int = 1, power_of_two: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """w [..., N, K] -> (e4m3 [..., N, K], fp32 scale [..., parts * ceil(N / parts / 128), ceil(K / 128)]).

    ``parts``: N is this many stacked matrices, each starting new blocks. w13 has 2, gate and up: with I = 2880 they
    have 23 scale rows each, 46 in all, and row n of the up half belongs to scale row 23 + n // 128.
    """
    check_weight(w, parts)
    rows, K = part_rows(w.shape[-2], parts), w.shape[-1]
    split = w.float().reshape(*w.shape[:-2], parts, rows, K)
    blocks = _pad(_pad(split, rows, -2), K, -1)
    blocks = blocks.reshape(*split.shape[:-2], num_blocks(rows), BLOCK, num_blocks(K), BLOCK)
    q, scale = _quantise(blocks, (-3, -1), power_of_two)  # [..., parts, row blocks, 128, column blocks, 128]
    q = q.flatten(-2).flatten(-3, -2).view(torch.uint8)[..., :rows, :K].flatten(-3, -2)
    return q.view(torch.float8_e4m3fn), scale.squeeze(-1).squeeze(-2).flatten(-3, -2)


def cast_128x128_both(w: torch.Tensor, *, parts: int = 1, power_of_two: bool = False) -> CastWithTranspose:
    """``cast_128x128`` and the same numbers transposed: q_t [..., K, N], scale_t [..., ceil(K / 128), row blocks].

    With more than one part the parts' rows must be a multiple of 16: each part's columns of q_t start aligned.
    """
    check_weight(w, parts, transposed=True)
    q, scale = cast_128x128(w, parts=parts, power_of_two=power_of_two)
    q_t = q.view(torch.uint8).transpose(-1, -2).contiguous().view(torch.float8_e4m3fn)
    return CastWithTranspose(q, scale, q_t, scale.transpose(-1, -2).contiguous())


def cast_row(
    x: torch.Tensor,
    *,
    activation: ActivationLike | None = None,
    row_weight: torch.Tensor | None = None,
    power_of_two: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., M, K] -> (e4m3 [..., M, K], fp32 scale [..., M]): one scale a token, or an output row of a weight."""
    check_cast(x, activation, row_weight, power_of_two, "row")
    q, scale = _quantise(_values(x, activation, row_weight), (-1,), power_of_two)
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


def check_cast(
    x: torch.Tensor,
    activation: ActivationLike | None,
    row_weight: torch.Tensor | None,
    power_of_two: bool,
    layout: Layout,
) -> None:
    """ValueError with got and expected unless a cast of a matrix can take these arguments."""
    _check(x)
    check_layout(layout)
    if layout == "sm100" and not power_of_two:
        raise ValueError("the sm100 layout holds UE8M0 scales: it needs power_of_two=True")
    if activation is not None and activation.gated and x.shape[-1] % 2:
        raise ValueError(f"{activation.name} takes gate and up columns, an even number, got {x.shape[-1]}")
    if row_weight is not None:
        if activation is None:
            raise ValueError("row_weight multiplies an activation, and none was given")
        if row_weight.dtype != torch.float32 or row_weight.shape != x.shape[:-1] or row_weight.device != x.device:
            raise ValueError(
                f"row_weight must be fp32 {tuple(x.shape[:-1])} on {x.device}, got {row_weight.dtype} "
                f"{tuple(row_weight.shape)} on {row_weight.device}"
            )


def check_both(x: torch.Tensor, offsets: torch.Tensor | None) -> None:
    """ValueError with got and expected unless x is a matrix and offsets fit it; their values are not read."""
    if x.dim() != 2:
        raise ValueError(f"a cast with a transposed copy takes a matrix [M, K], got shape {tuple(x.shape)}")
    if offsets is None:
        return
    fits = offsets.dtype == torch.int32 and offsets.dim() == 1 and len(offsets) >= 1 and offsets.is_contiguous()
    if not fits or offsets.device != x.device:
        raise ValueError(
            f"offsets must be int32 [groups + 1], dense, on {x.device}, got {offsets.dtype} {tuple(offsets.shape)} "
            f"on {offsets.device}"
        )


def check_weight(w: torch.Tensor, parts: int, *, transposed: bool = False) -> None:
    """ValueError with got and expected unless a 128x128 cast can take these arguments."""
    _check(w)
    rows = part_rows(w.shape[-2], parts)
    if transposed and parts > 1 and rows % 16:
        raise ValueError(f"a transposed copy of {parts} parts needs a multiple of 16 rows in each, got {rows}")


def _values(x: torch.Tensor, activation: ActivationLike | None, row_weight: torch.Tensor | None) -> torch.Tensor:
    values = x.float() if activation is None else activation(x.float())
    return values if row_weight is None else values * row_weight.unsqueeze(-1)


def _lay_out(scale: torch.Tensor, layout: Layout) -> torch.Tensor:
    if layout == "sm90":
        return to_sm90(scale)
    return to_sm100(scale, check=False) if layout == "sm100" else scale


def _cast_1x128(values: torch.Tensor, power_of_two: bool, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    K = values.shape[-1]
    blocks = _pad(values, K, -1).reshape(*values.shape[:-1], num_blocks(K), BLOCK)
    q, scale = _quantise(blocks, (-1,), power_of_two)
    return _crop(q.flatten(-2), K), _lay_out(scale.squeeze(-1), layout)


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


def _check(x: torch.Tensor) -> None:
    if x.dim() < 2 or x.shape[-1] == 0 or x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"a cast takes fp32 or bf16 of at least 2 dimensions and 1 column, got {x.dtype} of shape {tuple(x.shape)}"
        )
