"""``deep_gemm.utils.math``: rounding of sizes, and casts to E4M3.

The casts follow this package's rule (kernels/quant/reference.py), not DeepGEMM's floor of 1e-4 under a block's largest
magnitude: blocks below it keep their precision here.
"""

from __future__ import annotations

import torch

from megamoe.kernels.quant import casts
from megamoe.kernels.quant.formats import BLOCK, num_blocks


def ceil_div(x: int, y: int) -> int:
    """x / y rounded up."""
    return num_blocks(x, y)


def align(x: int, y: int) -> int:
    """x rounded up to a multiple of y."""
    return num_blocks(x, y) * y


def per_token_cast_to_fp8(
    x: torch.Tensor, use_ue8m0: bool = False, gran_k: int = BLOCK
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] -> (e4m3 [M, K], fp32 scale [M, ceil(K / 128)])."""
    _check_granularity(gran_k)
    return casts.cast_1x128(x, power_of_two=use_ue8m0)


def per_block_cast_to_fp8(
    x: torch.Tensor, use_ue8m0: bool = False, gran_k: int = BLOCK
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [N, K] -> (e4m3 [N, K], fp32 scale [ceil(N / 128), ceil(K / 128)])."""
    _check_granularity(gran_k)
    return casts.cast_128x128(x, power_of_two=use_ue8m0)


def _check_granularity(gran_k: int) -> None:
    if gran_k != BLOCK:
        raise ValueError(f"gran_k must be {BLOCK}, got {gran_k}")
