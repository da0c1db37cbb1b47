"""Grouped products over rows ordered by expert: the one place where ``staged`` multiplies matrices.

bf16 on a GPU goes to ``torch._grouped_mm``: no host sync, bf16 results from fp32 accumulators. Everything else (CPU,
fp32) is a loop over the experts in fp32 with fp32 results; it reads the offsets on the host.

``ends`` [S] int32: where each expert's rows end; expert s has rows ends[s - 1] to ends[s]. An expert may have none.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch


def fused(a: torch.Tensor) -> bool:
    """Whether products of ``a`` go to ``torch._grouped_mm``."""
    return a.is_cuda and a.dtype == torch.bfloat16


def mm_nt(a: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """a [M, C], w [S, N, C] -> [M, N]: row m times its expert's w transposed."""
    if fused(a) and len(a):
        return torch._grouped_mm(a, w.transpose(1, 2), offs=ends)
    return _loop(a, w.transpose(1, 2), ends)


def mm_nn(a: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """a [M, N], w [S, N, C] -> [M, C]: row m times its expert's w."""
    if fused(a) and len(a):
        return torch._grouped_mm(a, w, offs=ends)
    return _loop(a, w, ends)


def mm_tn(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """a [M, N], b [M, C] -> [S, N, C]: for each expert the product of its rows of a, transposed, and of b."""
    if fused(a) and len(a):
        return torch._grouped_mm(a.T, b, offs=ends)
    out = torch.zeros(len(ends), a.shape[1], b.shape[1], dtype=result_dtype(a), device=a.device)
    for s, rows in _slices(ends):
        torch.mm(a[rows].T.to(out.dtype), b[rows].to(out.dtype), out=out[s])
    return out


def result_dtype(a: torch.Tensor) -> torch.dtype:
    """dtype of a product of ``a``."""
    return a.dtype if fused(a) else torch.float32


def segment_sum(a: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """a [M, C] fp32 in S segments of ``counts`` [S] rows -> [S, C], each sum in row order; 0 for an empty segment."""
    return torch.segment_reduce(a, "sum", lengths=counts, axis=0, unsafe=True, initial=0)


def _loop(a: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """a [M, C], w [S, C, N] -> [M, N]."""
    out = torch.empty(len(a), w.shape[2], dtype=result_dtype(a), device=a.device)
    for s, rows in _slices(ends):
        torch.mm(a[rows].to(out.dtype), w[s].to(out.dtype), out=out[rows])
    return out


def _slices(ends: torch.Tensor) -> Iterator[tuple[int, slice]]:
    begin = 0
    for s, end in enumerate(ends.tolist()):
        if end > begin:
            yield s, slice(begin, end)
        begin = end
