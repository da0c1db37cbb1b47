"""Grouped products over rows ordered by expert: the one place where ``staged`` multiplies matrices.

| on | all three products |
|---|---|
| bf16, compute capability 9.0 | ``kernels.gemm``, fp32 results |
| bf16, CUDA | ``torch._grouped_mm``, bf16 results |
| CPU, and fp32 anywhere | a loop over experts, fp32 results |

The first two never wait for the device, the loop reads the offsets on the host. fp32 results matter where rounding
would decide something: which side of a clamp a pre-activation falls on. ``MEGAMOE_GROUPED_GEMM=torch`` asks for
torch's.

``offsets`` [S + 1] int32: expert s has rows offsets[s] to offsets[s + 1]; it may have none.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from megamoe import env


def backend(device: torch.device, dtype: torch.dtype) -> str:
    """Who multiplies: "megamoe", "torch" or "loop"."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return "loop"
    if env.get("MEGAMOE_GROUPED_GEMM") == "torch" or not torch.cuda.is_available():
        return "torch"
    return "megamoe" if torch.cuda.get_device_capability(device) == (9, 0) else "torch"


def mm_nt(a: torch.Tensor, w: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """a [M, C], w [S, N, C] -> [M, N]: row m times its expert's w transposed."""
    how = backend(a.device, a.dtype) if len(a) else "loop"
    if how == "megamoe":
        from megamoe.kernels.gemm.api import grouped_gemm

        return grouped_gemm(a, w.contiguous(), offsets, out_dtype=torch.float32)
    if how == "torch":
        return torch._grouped_mm(a, w.transpose(1, 2), offs=offsets[1:])
    return _loop(a, w.transpose(1, 2), offsets)


def mm_nn(a: torch.Tensor, w: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """a [M, N], w [S, N, C] -> [M, C]: row m times its expert's w."""
    how = backend(a.device, a.dtype) if len(a) else "loop"
    if how == "megamoe":
        from megamoe.kernels.gemm.api import grouped_gemm

        return grouped_gemm(a, w.contiguous(), offsets, layout="nn", out_dtype=torch.float32)
    if how == "torch":
        return torch._grouped_mm(a, w, offs=offsets[1:])
    return _loop(a, w, offsets)


def mm_tn(a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """a [M, N], b [M, C] -> [S, N, C]: for each expert the product of its rows of a, transposed, and of b."""
    how = backend(a.device, a.dtype) if len(a) else "loop"
    if how == "megamoe":
        from megamoe.kernels.gemm.api import k_grouped_gemm

        return k_grouped_gemm(a, b, offsets)
    if how == "torch":
        return torch._grouped_mm(a.T, b, offs=offsets[1:])
    out = torch.zeros(len(offsets) - 1, a.shape[1], b.shape[1], dtype=torch.float32, device=a.device)
    for s, rows in _slices(offsets):
        torch.mm(a[rows].T.float(), b[rows].float(), out=out[s])
    return out


def preact_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """dtype of ``mm_nt``'s result for operands of ``dtype``."""
    return torch.bfloat16 if backend(device, dtype) == "torch" else torch.float32


def segment_sum(a: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """a [M, C] fp32 in S segments of ``counts`` [S] rows -> [S, C], each sum in row order; 0 for an empty segment."""
    return torch.segment_reduce(a, "sum", lengths=counts, axis=0, unsafe=True, initial=0)


def _loop(a: torch.Tensor, w: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """a [M, C], w [S, C, N] -> fp32 [M, N]."""
    out = torch.empty(len(a), w.shape[2], dtype=torch.float32, device=a.device)
    for s, rows in _slices(offsets):
        torch.mm(a[rows].float(), w[s].float(), out=out[rows])
    return out


def _slices(offsets: torch.Tensor) -> Iterator[tuple[int, slice]]:
    for s, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        if end > begin:
            yield s, slice(begin, end)
