"""The slow twins of the GEMMs: same names and signatures, any device, fp32 products of the dequantised operands."""

from __future__ import annotations

from itertools import pairwise

import torch

from megamoe.kernels.quant.reference import dequantise_1x128, dequantise_128x128, dequantise_row


def gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    a_scale: torch.Tensor | None = None,
    b_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    accumulate: bool = False,
) -> torch.Tensor:
    """D = A @ B^T; see ``api.gemm``."""
    product = _values(a, a_scale, weight=False) @ _values(b, b_scale, weight=True).t()
    return _deliver(product, out, out_dtype, accumulate, torch.ones(a.shape[0], dtype=torch.bool, device=a.device))


def grouped_gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    offsets: torch.Tensor,
    *,
    a_scale: torch.Tensor | None = None,
    b_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    accumulate: bool = False,
) -> torch.Tensor:
    """Rows offsets[g] .. offsets[g + 1] of A times B[g]^T; rows of no group stay. See ``api.grouped_gemm``."""
    values, weights = _values(a, a_scale, weight=False), _values(b, b_scale, weight=True)
    product = torch.zeros(a.shape[0], b.shape[1], dtype=torch.float32, device=a.device)
    written = torch.zeros(a.shape[0], dtype=torch.bool, device=a.device)
    bounds = offsets.tolist()
    for g, (start, end) in enumerate(pairwise(bounds)):
        product[start:end] = values[start:end] @ weights[g].t()
        written[start:end] = True
    return _deliver(product, out, out_dtype, accumulate, written)


def masked_gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    counts: torch.Tensor,
    *,
    a_scale: torch.Tensor | None = None,
    b_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    accumulate: bool = False,
    expected_rows: int | None = None,
) -> torch.Tensor:
    """The first counts[g] rows of A[g] times B[g]^T; see ``api.masked_gemm``. Rows beyond stay as they were."""
    groups, most, _ = a.shape
    product = _values(a, a_scale, weight=False).view(groups, most, -1) @ _values(b, b_scale, weight=True).transpose(
        1, 2
    )
    written = torch.arange(most, device=a.device) < counts.to(a.device)[:, None]
    return _deliver(product, out, out_dtype, accumulate, written)


def _values(x: torch.Tensor, scale: torch.Tensor | None, *, weight: bool) -> torch.Tensor:
    """x as fp32, multiplied by its scales."""
    if scale is None:
        return x.float()
    if scale.dim() == x.dim() - 1:
        return dequantise_row(x, scale)
    return dequantise_128x128(x, scale) if weight else dequantise_1x128(x, scale)


def _deliver(
    product: torch.Tensor, out: torch.Tensor | None, out_dtype: torch.dtype, accumulate: bool, written: torch.Tensor
) -> torch.Tensor:
    if out is None:
        assert not accumulate
        out = torch.zeros(product.shape, dtype=out_dtype, device=product.device)
    result = (product + out.float() if accumulate else product).to(out.dtype)
    out.copy_(torch.where(written[..., None], result, out))
    return out
