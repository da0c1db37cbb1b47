"""``deep_gemm.utils``: helpers for sizes, layouts and casts."""

from megamoe.adapters.deep_gemm.utils import layout, math
from megamoe.adapters.deep_gemm.utils.layout import (
    get_m_alignment_for_contiguous_layout,
    get_mk_alignment_for_contiguous_layout,
    get_mn_major_tma_aligned_packed_ue8m0_tensor,
    get_mn_major_tma_aligned_tensor,
    get_tma_aligned_size,
)
from megamoe.adapters.deep_gemm.utils.math import align, ceil_div, per_block_cast_to_fp8, per_token_cast_to_fp8

__all__ = [
    "align",
    "ceil_div",
    "get_m_alignment_for_contiguous_layout",
    "get_mk_alignment_for_contiguous_layout",
    "get_mn_major_tma_aligned_packed_ue8m0_tensor",
    "get_mn_major_tma_aligned_tensor",
    "get_tma_aligned_size",
    "layout",
    "math",
    "per_block_cast_to_fp8",
    "per_token_cast_to_fp8",
]
