"""Scale layouts: packing, SM90, SM100 and back; CUDA kernels for CUDA tensors, the twins of ``reference_scales.py``
for all others.

Shapes, meaning and errors are those of the twins. Inputs that are neither row-major nor exactly in their layout
(slices, say) are converted by the twin, on their device.
"""

from __future__ import annotations

import torch

from megamoe.kernels.quant import reference_scales
from megamoe.kernels.quant.formats import num_blocks
from megamoe.kernels.quant.launch import ConvertArgs, ConvertKernel, ScaleForm, arch_of, launch, runs_kernels
from megamoe.kernels.quant.layouts import aligned_rows, empty_scales


def pack_ue8m0(scale: torch.Tensor, *, check: bool = True) -> torch.Tensor:
    """fp32 powers of two [..., M, B] -> int32 [..., M, ceil(B / 4)]; see ``reference_scales.pack_ue8m0``."""
    if not _convertible(scale, "fp32_row", scale.shape[-1]):
        return reference_scales.pack_ue8m0(scale, check=check)
    if check:
        reference_scales.check_powers_of_two(scale)
    out = torch.empty(*scale.shape[:-1], num_blocks(scale.shape[-1], 4), dtype=torch.int32, device=scale.device)
    return _convert(scale, "fp32_row", out, "packed_row", scale.shape[-1])


def unpack_ue8m0(packed: torch.Tensor, blocks: int) -> torch.Tensor:
    """Inverse of ``pack_ue8m0``; see ``reference_scales.unpack_ue8m0``."""
    if not _convertible(packed, "packed_row", blocks):
        return reference_scales.unpack_ue8m0(packed, blocks)
    out = torch.empty(*packed.shape[:-1], blocks, dtype=torch.float32, device=packed.device)
    return _convert(packed, "packed_row", out, "fp32_row", blocks)


def to_sm90(scale: torch.Tensor) -> torch.Tensor:
    """fp32 [..., M, B] -> the same in the sm90 layout; see ``reference_scales.to_sm90``."""
    if not _convertible(scale, "fp32_row", scale.shape[-1]):
        return reference_scales.to_sm90(scale)
    out = empty_scales(tuple(scale.shape), "sm90", scale.device)
    return _convert(scale, "fp32_row", out, "fp32_adjacent", scale.shape[-1])


def from_sm90(scale: torch.Tensor) -> torch.Tensor:
    """Inverse of ``to_sm90``; see ``reference_scales.from_sm90``."""
    if not _convertible(scale, "fp32_adjacent", scale.shape[-1]):
        return reference_scales.from_sm90(scale)
    out = torch.empty(scale.shape, dtype=torch.float32, device=scale.device)
    return _convert(scale, "fp32_adjacent", out, "fp32_row", scale.shape[-1])


def to_sm100(scale: torch.Tensor, *, check: bool = True) -> torch.Tensor:
    """fp32 powers of two [..., M, B] -> int32 in the sm100 layout; see ``reference_scales.to_sm100``."""
    if not _convertible(scale, "fp32_row", scale.shape[-1]):
        return reference_scales.to_sm100(scale, check=check)
    if check:
        reference_scales.check_powers_of_two(scale)
    out = empty_scales(tuple(scale.shape), "sm100", scale.device)
    return _convert(scale, "fp32_row", out, "packed_adjacent", scale.shape[-1])


def from_sm100(packed: torch.Tensor, blocks: int) -> torch.Tensor:
    """Inverse of ``to_sm100``; see ``reference_scales.from_sm100``."""
    if not _convertible(packed, "packed_adjacent", blocks):
        return reference_scales.from_sm100(packed, blocks)
    out = torch.empty(*packed.shape[:-1], blocks, dtype=torch.float32, device=packed.device)
    return _convert(packed, "packed_adjacent", out, "fp32_row", blocks)


def _convertible(source: torch.Tensor, form: ScaleForm, blocks: int) -> bool:
    """Whether the kernel can read ``source``: on CUDA, and exactly in ``form``."""
    packed = form.startswith("packed")
    if not runs_kernels(source) or source.dim() < 2 or source.dtype != (torch.int32 if packed else torch.float32):
        return False
    words = num_blocks(blocks, 4) if packed else blocks
    if source.numel() == 0 or source.shape[-1] != words:
        return False
    if form.endswith("row"):
        return source.is_contiguous()
    *batch, rows, _ = source.shape
    strides = torch.empty(*batch, words, aligned_rows(rows), device="meta").transpose(-1, -2).stride()
    return source.stride() == strides


def _convert(
    source: torch.Tensor, source_form: ScaleForm, target: torch.Tensor, target_form: ScaleForm, blocks: int
) -> torch.Tensor:
    rows = source.shape[-2]
    args = ConvertArgs(
        source=source.data_ptr(), target=target.data_ptr(), rows=rows, ld=aligned_rows(rows), blocks=blocks
    )
    kernel = ConvertKernel(
        source_form=source_form,
        target_form=target_form,
        pieces=source_form == "fp32_row" and blocks % 4 == 0 and source.data_ptr() % 16 == 0,
        arch=arch_of(source.device),
    )
    grid = (num_blocks(blocks, kernel.tile_blocks), num_blocks(rows, kernel.tile_rows), source.shape[:-2].numel())
    launch(kernel, args, grid, source.device)
    return target
