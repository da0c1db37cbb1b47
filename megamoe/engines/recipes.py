"""Where each precision recipe rounds, as functions that pass gradients straight through; used by ``reference``.

The places are those of the fused kernels: x when it is dispatched, the activation after the first GEMM (times the
top-k weight if that is applied there), the weights once, each route's result, and each rank's partial sum of a token.
Products and sums between them are fp32 over the dequantised numbers. Backward rounds to bf16 what a GEMM or the wire
takes: the gradient of the pre-activation, weight * activation, and each rank's partial sum of dx.

| recipe | x, activation | weights | results |
|---|---|---|---|
| fp32 | exact | exact | exact |
| bf16 | bf16 | bf16 | bf16 |
| fp8_block | e4m3, scale per 1x128 | e4m3, scale per 128x128 (w13: gate and up apart) | bf16 |
| fp8_row | bf16, then e4m3, scale per row | e4m3, scale per row | bf16 |
| mxfp4 | e4m3, scale per 1x128 | e2m1, UE8M0 scale per 1x32 | bf16 |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megamoe.kernels.quant import mxfp4
from megamoe.kernels.quant import reference as casts
from megamoe.problem import Problem, Recipe


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


class _RoundGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return _bf16(grads[0])


def _through(x: torch.Tensor, rounding: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        rounded = rounding(x.detach())
    return _StraightThrough.apply(x, rounded)  # type: ignore[no-any-return, no-untyped-call]


def _bf16(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().float()


def _block(x: torch.Tensor) -> torch.Tensor:
    return casts.dequantise_1x128(*casts.cast_1x128(x))


def _row(x: torch.Tensor) -> torch.Tensor:
    return casts.dequantise_row(*casts.cast_row(x))


def _bf16_row(x: torch.Tensor) -> torch.Tensor:
    return _row(_bf16(x))


def round_activation(x: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """fp32 [..., C] -> fp32, as a GEMM of ``recipe`` sees x or the activation."""
    rounding = {"bf16": _bf16, "fp8_block": _block, "mxfp4": _block, "fp8_row": _bf16_row}.get(recipe)
    return x if rounding is None else _through(x, rounding)


def round_weight(w: torch.Tensor, problem: Problem, *, stacked: bool) -> torch.Tensor:
    """fp32 [..., N, C] -> fp32, as a GEMM sees it; ``stacked``: w13, whose rows are gate then up if it is gated."""
    parts = 2 if stacked and problem.activation.gated else 1

    def block(w: torch.Tensor) -> torch.Tensor:
        return casts.dequantise_128x128(*casts.cast_128x128(w, parts=parts), parts=parts)

    def e2m1(w: torch.Tensor) -> torch.Tensor:
        return mxfp4.dequantise_mxfp4(*mxfp4.cast_mxfp4(w))

    rounding = {"bf16": _bf16, "fp8_block": block, "fp8_row": _row, "mxfp4": e2m1}.get(problem.recipe)
    return w if rounding is None else _through(w, rounding)


def round_result(y: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """fp32 rows -> fp32, as they lie in memory between the second GEMM and the sums, and as partial sums cross."""
    return y if recipe == "fp32" else _through(y, _bf16)


def round_gradient(x: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """x itself; its gradient is rounded to bf16 on the way back, except for the recipe fp32."""
    return x if recipe == "fp32" else _RoundGradient.apply(x)  # type: ignore[no-untyped-call]
