"""The slow twins of the GEMMs: same names and signatures, any device, fp32 products of the dequantised operands."""

from __future__ import annotations

from itertools import pairwise

import torch

from megamoe.kernels.quant.reference import (
    ActivationLike,
    cast_1x128,
    dequantise_1x128,
    dequantise_128x128,
    dequantise_row,
)


def gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    layout: str = "nt",
    a_scale: torch.Tensor | None = None,
    b_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    accumulate: bool = False,
) -> torch.Tensor:
    """D = A @ B^T; see ``api.gemm``."""
    a, b = _as_nt(a, b, layout)
    product = _values(a, a_scale, weight=False) @ _values(b, b_scale, weight=True).t()
    return _deliver(product, out, out_dtype, accumulate, torch.ones(a.shape[0], dtype=torch.bool, device=a.device))


def grouped_gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    offsets: torch.Tensor,
    *,
    layout: str = "nt",
    a_scale: torch.Tensor | None = None,
    b_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    accumulate: bool = False,
) -> torch.Tensor:
    """Rows offsets[g] .. offsets[g + 1] of A times B[g]^T; rows of no group stay. See ``api.grouped_gemm``."""
    a, b = _as_nt(a, b, layout)
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


def k_grouped_gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    offsets: torch.Tensor,
    *,
    layout: str = "tn",
    a_scale: torch.Tensor | None = None,
    b_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    accumulate: bool = False,
) -> torch.Tensor:
    """D[g] = A^T @ B over rows offsets[g] .. offsets[g + 1] of both; see ``api.k_grouped_gemm``."""
    a, b = _as_nt(a, b, layout)
    bounds = offsets.tolist()
    if a_scale is not None and (odd := [bound for bound in bounds if bound % 128]):
        raise ValueError(
            f"offsets of a k-grouped GEMM with 1x128 scales must be multiples of 128, got {odd[0]}: pad each group of "
            "the transposed copies (cast_1x128_both does)"
        )
    left, right = _values(a, a_scale, weight=False), _values(b, b_scale, weight=False)
    product = torch.zeros(len(bounds) - 1, a.shape[0], b.shape[0], dtype=torch.float32, device=a.device)
    for g, (start, end) in enumerate(pairwise(bounds)):
        torch.mm(left[:, start:end], right[:, start:end].t(), out=product[g])
    filled = torch.tensor([end > start for start, end in pairwise(bounds)], device=a.device)
    written = (filled | (not accumulate))[:, None].expand(-1, a.shape[0])
    return _deliver(product, out, out_dtype, accumulate, written)


def interleave(w13: torch.Tensor) -> torch.Tensor:
    """w13 [.., 2I, K], gate rows first -> the same rows, eight of gate and eight of up in turn; I a multiple of 8."""
    rows = w13.shape[-2]
    if rows % 16:
        raise ValueError(f"w13 must have a multiple of 16 rows to interleave gate and up by 8, got {rows}")
    shape = w13.shape
    return w13.reshape(*shape[:-2], 2, rows // 16, 8, shape[-1]).transpose(-4, -3).reshape(shape)


def deinterleave(w13: torch.Tensor) -> torch.Tensor:
    """Inverse of ``interleave``."""
    shape = w13.shape
    return w13.reshape(*shape[:-2], shape[-2] // 16, 2, 8, shape[-1]).transpose(-4, -3).reshape(shape)


def gated_gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    offsets: torch.Tensor | None = None,
    *,
    activation: ActivationLike,
    a_scale: torch.Tensor | None = None,
    b_scale: torch.Tensor | None = None,
    row_weight: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """row_weight * activation(A @ W13^T), cast; see ``gated.gated_gemm``. Rows of no group are activation(0)."""
    w13 = deinterleave(b)
    weights = w13.float() if b_scale is None else dequantise_128x128(w13, b_scale, parts=2)
    values = _values(a, a_scale, weight=False)
    if offsets is None:
        offsets = torch.tensor([0, len(a)], dtype=torch.int32)
        weights = weights[None]
    h13 = grouped_gemm(values, weights, offsets, out_dtype=torch.float32)
    if out_dtype == torch.float8_e4m3fn:
        return cast_1x128(h13, activation=activation, row_weight=row_weight, layout="sm90")
    result = activation(h13) if row_weight is None else activation(h13) * row_weight[:, None]
    return result.to(out_dtype), None


def _as_nt(a: torch.Tensor, b: torch.Tensor, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    return a.transpose(-2, -1) if layout[0] == "t" else a, b.transpose(-2, -1) if layout[1] == "n" else b


def _values(x: torch.Tensor, scale: torch.Tensor | None, *, weight: bool) -> torch.Tensor:
    """x as fp32, multiplied by its scales."""
    if scale is None:
        return x.float()
    if scale.dim() == x.dim() - 1:
        return dequantise_row(x, scale)
    if weight and scale.shape[-2] != x.shape[-2]:
        return dequantise_128x128(x, scale)
    return dequantise_1x128(x, scale)


def _deliver(
    product: torch.Tensor, out: torch.Tensor | None, out_dtype: torch.dtype, accumulate: bool, written: torch.Tensor
) -> torch.Tensor:
    if out is None:
        assert not accumulate
        out = torch.zeros(product.shape, dtype=out_dtype, device=product.device)
    result = (product + out.float() if accumulate else product).to(out.dtype)
    out.copy_(torch.where(written[..., None], result, out))
    return out
