"""``QuantisedTokens``: x as the first GEMM of an fp8 recipe reads it, where the caller has cast it already."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megamoe.kernels.quant import casts
from megamoe.kernels.quant import reference as twins
from megamoe.kernels.quant.formats import num_blocks
from megamoe.kernels.quant.layouts import TMA_ALIGNMENT, empty_e4m3
from megamoe.problem import Recipe


@dataclass(frozen=True)
class QuantisedTokens:
    """T tokens in e4m3; a number is value * scale.

    Args:
        values: e4m3 [T, H], rows 16 bytes apart or a multiple of that, and starting on 16 bytes.
        scales: fp32 [T, ceil(H / 128)] for fp8_block, [T, 1] for fp8_row; any strides, so that the layout ``sm90`` of
            ``kernels.quant.layouts`` (a token's scales apart, a block's together) is taken as it is.
    """

    values: torch.Tensor
    scales: torch.Tensor

    @staticmethod
    def cast(x: torch.Tensor, recipe: Recipe) -> QuantisedTokens:
        """x [T, H] fp32 or bf16 as ``recipe`` casts it: what the kernel makes of bf16 x itself.

        Raises:
            ValueError: a recipe that is not fp8_block or fp8_row.
        """
        if recipe == "fp8_block":
            q, scales = casts.cast_1x128(x)
        elif recipe == "fp8_row":
            q, scales = casts.cast_row(x)
            scales = scales[:, None]
        else:
            raise ValueError(f"tokens are quantised for fp8_block or fp8_row, got recipe {recipe!r}")
        if q.stride(0) % TMA_ALIGNMENT:  # from a twin, whose rows follow one another
            packed, q = q, empty_e4m3(tuple(q.shape), q.device)
            q.view(torch.uint8).copy_(packed.view(torch.uint8))
        return QuantisedTokens(q, scales)

    def dequantise(self) -> torch.Tensor:
        """fp32 [T, H]."""
        if self.scales.shape[1] == 1:
            return twins.dequantise_row(self.values, self.scales[:, 0])
        return twins.dequantise_1x128(self.values, self.scales)

    def check(self, hidden: int, recipe: Recipe) -> None:
        """Raise ValueError with got and expected unless these are rows of ``hidden`` columns for ``recipe``."""
        if recipe not in ("fp8_block", "fp8_row"):
            raise ValueError(f"quantised tokens are for the recipes fp8_block and fp8_row, not {recipe}")
        v = self.values
        T = v.shape[0] if v.dim() else 0
        if v.dim() != 2 or v.shape[1] != hidden or v.dtype != torch.float8_e4m3fn or (T and v.stride(1) != 1):
            raise ValueError(
                f"values of x must be e4m3 [tokens, {hidden}] with unit inner stride, got {v.dtype} {tuple(v.shape)} "
                f"with strides {v.stride()}"
            )
        if v.data_ptr() % 16 or (T > 1 and v.stride(0) % 16):
            raise ValueError(f"rows of x must start on 16 bytes, got address {v.data_ptr():#x}, strides {v.stride()}")
        shape = (T, 1 if recipe == "fp8_row" else num_blocks(hidden))
        if tuple(self.scales.shape) != shape or self.scales.dtype != torch.float32 or self.scales.device != v.device:
            raise ValueError(
                f"scales of x must be fp32 {shape} on {v.device} for the recipe {recipe}, "
                f"got {self.scales.dtype} {tuple(self.scales.shape)} on {self.scales.device}"
            )
