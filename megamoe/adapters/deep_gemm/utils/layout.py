"""``deep_gemm.utils.layout``: where scales lie, in DeepGEMM's words, over ``megamoe.kernels.quant``.

"MN-major, TMA-aligned" fp32 is the layout sm90 there, packed UE8M0 the layout sm100 (four codes an int32).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megamoe.kernels.quant.formats import BLOCK, num_blocks
from megamoe.kernels.quant.layouts import TMA_ALIGNMENT, check_scales
from megamoe.kernels.quant.scales import to_sm90, to_sm100


def get_tma_aligned_size(mn: int, element_size: int) -> int:
    """``mn`` elements rounded up to 16 bytes."""
    if TMA_ALIGNMENT % element_size:
        raise ValueError(f"element_size must divide {TMA_ALIGNMENT}, got {element_size}")
    return num_blocks(mn, TMA_ALIGNMENT // element_size) * (TMA_ALIGNMENT // element_size)


def get_mk_alignment_for_contiguous_layout() -> int:
    """Rows that DeepGEMM's clients round each group up to: 128. These GEMMs take groups of any size."""
    return BLOCK


get_m_alignment_for_contiguous_layout = get_mk_alignment_for_contiguous_layout


def get_mn_major_tma_aligned_tensor(sf: torch.Tensor) -> torch.Tensor:
    """fp32 [..., M, B] -> the same numbers with adjacent rows, 16-byte aligned."""
    return to_sm90(sf)


def get_mn_major_tma_aligned_packed_ue8m0_tensor(sf: torch.Tensor) -> torch.Tensor:
    """fp32 powers of two [..., M, B] -> int32 [..., M, ceil(B / 4)]; for SM100, whose consumer has never run here."""
    return to_sm100(sf)


def transform_sf_into_required_layout(  # noqa: PLR0917 - DeepGEMM's order
    sf: torch.Tensor,
    mn: int,
    k: int,
    recipe: Sequence[int],
    num_groups: int | None = None,
    is_sfa: bool | None = None,
    disable_ue8m0_cast: bool = False,
) -> torch.Tensor:
    """Scales as these (SM90) GEMMs take them: 1x128 with adjacent rows, 128x128 as they are.

    Args:
        sf: fp32 [..., mn, k / 128] or [..., ceil(mn / 128), ceil(k / 128)], with ``num_groups`` in front if given.
        recipe: (1, 128) or (128, 128) for this operand, or (A's rows, B's rows, k) with ``is_sfa`` saying which it is.
        disable_ue8m0_cast: no effect; nothing is cast on SM90.

    Raises:
        ValueError: another granularity, or scales that do not fit a [mn, k] matrix.
    """
    if len(recipe) == 3 and is_sfa is None:
        raise ValueError(f"recipe {tuple(recipe)} of both operands needs is_sfa")
    rows, depth = (recipe[0 if is_sfa else 1], recipe[2]) if len(recipe) == 3 else (recipe[0], recipe[1])
    if (rows, depth) not in ((1, BLOCK), (BLOCK, BLOCK)):
        raise ValueError(f"scales must be per 1x{BLOCK} or {BLOCK}x{BLOCK}, got {rows}x{depth}")
    if num_groups is not None and (sf.dim() != 3 or sf.shape[0] != num_groups):
        raise ValueError(f"sf must be [{num_groups}, ...] for {num_groups} groups, got {tuple(sf.shape)}")
    if rows == BLOCK:
        check_scales(sf, rows=mn, columns=k, granularity="128x128", name="sf")
        return sf
    expected = (mn, num_blocks(k))
    if tuple(sf.shape[-2:]) != expected or sf.dtype != torch.float32:
        raise ValueError(f"sf must be fp32 (..., {mn}, {expected[1]}), got {sf.dtype} {tuple(sf.shape)}")
    return to_sm90(sf)
