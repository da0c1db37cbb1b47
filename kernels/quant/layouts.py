"""How scales lie in memory, what alignment callers need, and sentences for scales that do not fit.

For a matrix [M, K] with B = ceil(K / 128) blocks of columns:

- ``row``: fp32 [M, B], row-major.
- ``sm90``: fp32 [M, B] with strides (1, stride), stride = M rounded up to 16 bytes, so that one tensor copy brings the
  scales of a tile's rows: what Hopper's kernels take.
- ``sm100``: int32 [M, ceil(B / 4)] with strides (1, stride): four UE8M0 codes a word, the lowest k in the lowest byte;
  codes of blocks beyond the last are 0. What Blackwell's block-scaled tensor cores take.

A batch [..., M, K] is one such matrix after the other. What stands between M and stride is never read.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

from megamoe.kernels.quant.formats import num_blocks

Layout = Literal["row", "sm90", "sm100"]
Granularity = Literal["1x128", "128x128", "row"]
TMA_ALIGNMENT = 16
"""Bytes: address and strides of whatever a tensor copy reads."""


def aligned_rows(rows: int) -> int:
    """Stride between blocks in the sm90 and sm100 layouts: ``rows`` 4-byte words rounded up to 16 bytes."""
    return num_blocks(rows, TMA_ALIGNMENT // 4) * (TMA_ALIGNMENT // 4)


def aligned_columns(columns: int) -> int:
    """Row stride of an e4m3 matrix: ``columns`` bytes rounded up to 16."""
    return num_blocks(columns, TMA_ALIGNMENT) * TMA_ALIGNMENT


def empty_e4m3(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Uninitialised e4m3 [..., K] whose rows start 16-byte aligned: a view of [..., aligned_columns(K)]."""
    full = torch.empty(*shape[:-1], aligned_columns(shape[-1]), dtype=torch.float8_e4m3fn, device=device)
    return full[..., : shape[-1]]


def empty_scales(shape: tuple[int, ...], layout: Layout, device: torch.device) -> torch.Tensor:
    """Uninitialised scales [..., M, B] in ``layout``; for sm100 int32 [..., M, ceil(B / 4)]."""
    check_layout(layout)
    if layout == "row":
        return torch.empty(shape, dtype=torch.float32, device=device)
    *batch, rows, blocks = shape
    words = num_blocks(blocks, 4) if layout == "sm100" else blocks
    dtype = torch.int32 if layout == "sm100" else torch.float32
    full = torch.empty(*batch, words, aligned_rows(rows), dtype=dtype, device=device)
    return full[..., :rows].transpose(-1, -2)


def scale_shape(rows: int, columns: int, granularity: Granularity, *, parts: int = 1) -> tuple[int, ...]:
    """Shape of the fp32 scales of a [rows, columns] matrix; ``parts`` as in ``cast_128x128``."""
    if granularity == "1x128":
        return rows, num_blocks(columns)
    if granularity == "128x128":
        if parts < 1 or rows % parts:
            raise ValueError(f"parts must divide the number of rows ({rows}), got {parts}")
        return parts * num_blocks(rows // parts), num_blocks(columns)
    if granularity == "row":
        return (rows,)
    raise ValueError(f"granularity must be one of {', '.join(get_args(Granularity))}, got {granularity!r}")


def check_layout(layout: str) -> None:
    """ValueError unless ``layout`` is one of the three."""
    if layout not in get_args(Layout):
        raise ValueError(f"layout must be one of {', '.join(get_args(Layout))}, got {layout!r}")


def check_scales(
    scale: torch.Tensor,
    *,
    rows: int,
    columns: int,
    granularity: Granularity = "1x128",
    layout: Layout = "row",
    parts: int = 1,
    name: str = "scale",
) -> None:
    """Refuse ``scale`` unless it holds the scales of a [..., rows, columns] matrix in this granularity and layout.

    Only shape, dtype, strides and address are looked at: no value is read, no device waits.

    Raises:
        ValueError: says what was got, if it can be recognised, what was expected, and which function converts.
    """
    check_layout(layout)
    if granularity != "1x128" and layout != "row":
        raise ValueError(f"{granularity} scales are row-major fp32, there is no {layout} layout of them")
    _check_dtype(scale, layout, name)
    expected = scale_shape(rows, columns, granularity, parts=parts)
    if layout == "sm100":
        expected = (rows, num_blocks(num_blocks(columns), 4))
    trailing = tuple(scale.shape[-len(expected) :])
    if trailing != expected:
        looks = _recognise(trailing, rows=rows, columns=columns, granularity=granularity, layout=layout, parts=parts)
        raise ValueError(
            f"{name} of a {rows} x {columns} matrix must have shape (..., {', '.join(map(str, expected))}) in the "
            f"{layout} layout ({granularity}), got {tuple(scale.shape)}{looks}"
        )
    _check_strides(scale, rows, expected, layout, name)


def _check_dtype(scale: torch.Tensor, layout: Layout, name: str) -> None:
    if layout == "sm100" and scale.dtype != torch.int32:
        raise ValueError(
            f"{name} must be int32, four UE8M0 codes a word (SM100), got {scale.dtype}"
            + (", the format of SM90: convert with to_sm100" if scale.dtype == torch.float32 else "")
        )
    if layout != "sm100" and scale.dtype != torch.float32:
        packed = {
            torch.int32: ", packed UE8M0, the format of SM100: convert with from_sm100 or unpack_ue8m0",
            torch.uint8: ", UE8M0 codes: convert with formats.ue8m0_to_scale",
            torch.float8_e8m0fnu: ", UE8M0: convert with .float()",
        }
        raise ValueError(f"{name} must be fp32, got {scale.dtype}{packed.get(scale.dtype, '')}")


def _recognise(
    shape: tuple[int, ...], *, rows: int, columns: int, granularity: Granularity, layout: Layout, parts: int
) -> str:
    """What a wrong shape looks like, as the end of a sentence."""
    blocks = num_blocks(columns)
    known = {
        scale_shape(rows, columns, other, parts=parts): f": that is one scale per {other}"
        for other in get_args(Granularity)
        if other != granularity and (other != "128x128" or rows % parts == 0)
    }
    known |= {
        (rows, num_blocks(columns, 32)): ": that is one scale per 1x32, as in MXFP4 and MXFP8",
        (rows, 1): ": that is one scale per row",
        (blocks, rows): ": that is transposed",
    }
    if layout == "sm100":
        known[(rows, blocks)] = ": that is one word a scale, not packed four to a word"
    if parts > 1:
        known[(num_blocks(rows), blocks)] = f": blocks must start anew at each of the {parts} parts"
    return known.get(shape, "")


def _check_strides(scale: torch.Tensor, rows: int, expected: tuple[int, ...], layout: Layout, name: str) -> None:
    if scale.numel() == 0:
        return
    if layout == "row":
        if not scale.is_contiguous():
            looks = (
                ": rows are adjacent, as in the sm90 layout: convert with from_sm90" if scale.stride(-2) == 1 else ""
            )
            raise ValueError(f"{name} must be row-major and contiguous, got strides {scale.stride()}{looks}")
        return
    row_stride, block_stride = scale.stride(-2), scale.stride(-1)
    if expected[-1] == 1:
        block_stride = aligned_rows(rows)  # one block: torch may report any stride
    if (row_stride != 1 and rows > 1) or block_stride < rows:
        looks = ": that is row-major" if block_stride == 1 and expected[-1] > 1 else ""
        raise ValueError(
            f"{name} must have adjacent rows (strides (1, {aligned_rows(rows)})) in the {layout} layout, got strides "
            f"{scale.stride()}{looks}: convert with to_{layout}"
        )
    if block_stride % 4 or scale.data_ptr() % TMA_ALIGNMENT:
        raise ValueError(
            f"{name} must start at a multiple of {TMA_ALIGNMENT} bytes and have {TMA_ALIGNMENT}-byte strides between "
            f"blocks, got strides {scale.stride()} at address 0x{scale.data_ptr():x}: convert with to_{layout}"
        )
