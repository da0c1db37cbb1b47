"""Dense and grouped GEMMs on Hopper: D = A @ B^T in BF16 or FP8, checked at the door, launched on the current stream.

The recipe follows from the scales: none for bf16 operands; for e4m3 operands one scale per 1x128 of A (in the layout
``sm90`` of ``kernels.quant``) and per 128x128 of B, or one per row of A and per row of B. Sums are fp32, FP8 promoted
every 128 of K; the same inputs give the same bits. CPU tensors run on the twins in ``reference.py``.

Never run on a GPU in their present form: the grouped and masked kernels with 1x128 scales (docs/gemm.md says what was).
"""

from __future__ import annotations

import torch

from megamoe.errors import EngineUnavailableError
from megamoe.kernels.gemm import reference
from megamoe.kernels.gemm.config import Grouping, Scaling
from megamoe.kernels.gemm.heuristics import GemmDesc
from megamoe.kernels.gemm.knobs import current
from megamoe.kernels.gemm.launch import Operands, num_sms, run
from megamoe.kernels.quant.layouts import check_scales


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
    """D [M, N] = A [M, K] @ B [N, K]^T.

    Args:
        a, b: bf16, or e4m3 with scales; inner stride 1, addresses and row strides multiples of 16 bytes.
        a_scale: e4m3 only: fp32 [M, ceil(K / 128)] with adjacent rows (``cast_1x128(..., layout="sm90")``), or [M].
        b_scale: e4m3 only: fp32 [ceil(N / 128), ceil(K / 128)] row-major, or [N].
        out: where D goes, [M, N] bf16 or fp32; N a multiple of 8.
        out_dtype: bf16 or fp32, if ``out`` is None.
        accumulate: D += instead of D =; needs ``out`` in fp32.

    Raises:
        ValueError: shapes, dtypes, devices, strides or scale formats that do not fit, with got and expected.
        EngineUnavailableError: a CUDA device that is not compute capability 9.0.
    """
    if a.dim() != 2 or b.dim() != 2:
        raise ValueError(f"a and b must be [M, K] and [N, K], got {tuple(a.shape)} and {tuple(b.shape)}")
    out = _prepare(a, b, (a.shape[0], b.shape[0]), out, out_dtype, accumulate=accumulate)
    scaling = _check(a, b, a_scale, b_scale)
    if not a.is_cuda:
        return reference.gemm(a, b, a_scale=a_scale, b_scale=b_scale, out=out, accumulate=accumulate)
    operands = Operands(a=a, b=b, d=out, a_scale=a_scale, b_scale=b_scale, table=None)
    return _run(operands, scaling, "dense", accumulate, rows=a.shape[0])


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
    """Rows offsets[g] .. offsets[g + 1] of D [M, N] = the same rows of A [M, K] @ B[g]^T, for B [G, N, K].

    ``offsets`` [G + 1] int32 on the same device, ascending, within [0, M], of any alignment; groups may be empty. Only
    the kernel reads them: no host synchronisation, and a value out of order is not detected. Rows of no group are not
    written. Everything else as in ``gemm``, with b_scale [G, ...].
    """
    groups = _check_grouped(a, b, 2)
    if offsets.shape != (groups + 1,) or offsets.dtype != torch.int32 or offsets.device != a.device:
        raise ValueError(
            f"offsets must be int32 [{groups + 1}] on {a.device}, "
            f"got {offsets.dtype} {tuple(offsets.shape)} on {offsets.device}"
        )
    out = _prepare(a, b, (a.shape[0], b.shape[1]), out, out_dtype, accumulate=accumulate)
    scaling = _check(a, b, a_scale, b_scale)
    if not a.is_cuda:
        return reference.grouped_gemm(a, b, offsets, a_scale=a_scale, b_scale=b_scale, out=out, accumulate=accumulate)
    operands = Operands(a=a, b=b, d=out, a_scale=a_scale, b_scale=b_scale, table=offsets.contiguous())
    return _run(operands, scaling, "contiguous", accumulate, rows=a.shape[0])


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
    """The first counts[g] rows of D[g] = those of A[g] @ B[g]^T; A [G, M, K], B [G, N, K], D [G, M, N].

    ``counts`` [G] int32 on the same device, each within [0, M], read by the kernel alone: no host synchronisation.
    Rows beyond are not written. ``expected_rows``: a guess at counts' mean, to choose tiles by; M if None. a_scale is
    that of ``a.view(G * M, K)``: [G * M, ceil(K / 128)] in the sm90 layout, or [G, M]. Else as in ``gemm``.
    """
    groups = _check_grouped(a, b, 3)
    if a.shape[0] != groups:
        raise ValueError(f"a must be [{groups}, M, K] like b, got {tuple(a.shape)}")
    if counts.shape != (groups,) or counts.dtype != torch.int32 or counts.device != a.device:
        raise ValueError(
            f"counts must be int32 [{groups}] on {a.device}, "
            f"got {counts.dtype} {tuple(counts.shape)} on {counts.device}"
        )
    if not a.is_contiguous() or (out is not None and not out.is_contiguous()):
        raise ValueError("a and out of a masked GEMM must be contiguous: group g starts at row g * M")
    most, columns = a.shape[1], b.shape[1]
    out = _prepare(a, b, (groups, most, columns), out, out_dtype, accumulate=accumulate)
    rows = a.view(groups * most, a.shape[2])
    by_row = a_scale is not None and tuple(a_scale.shape) == (groups, most)
    flat_scale = a_scale.reshape(-1) if a_scale is not None and by_row else a_scale
    scaling = _check(rows, b, flat_scale, b_scale)
    if not a.is_cuda:
        grouped = flat_scale if flat_scale is None else flat_scale.reshape(groups, most, *flat_scale.shape[1:])
        return reference.masked_gemm(a, b, counts, a_scale=grouped, b_scale=b_scale, out=out, accumulate=accumulate)
    operands = Operands(
        a=rows,
        b=b,
        d=out.view(groups * most, columns),
        a_scale=flat_scale,
        b_scale=b_scale,
        table=counts.contiguous(),
        max_m=most,
    )
    _run(operands, scaling, "masked", accumulate, rows=groups * (most if expected_rows is None else expected_rows))
    return out


def _check_grouped(a: torch.Tensor, b: torch.Tensor, dims: int) -> int:
    if a.dim() != dims or b.dim() != 3:
        shape = "[M, K]" if dims == 2 else "[G, M, K]"
        raise ValueError(f"a and b must be {shape} and [G, N, K], got {tuple(a.shape)} and {tuple(b.shape)}")
    if b.shape[0] < 1:
        raise ValueError(f"b must hold at least one group, got {tuple(b.shape)}")
    return int(b.shape[0])


def _prepare(
    a: torch.Tensor,
    b: torch.Tensor,
    shape: tuple[int, ...],
    out: torch.Tensor | None,
    out_dtype: torch.dtype,
    *,
    accumulate: bool,
) -> torch.Tensor:
    """``out``, checked or made."""
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(f"a and b must agree in K, got {tuple(a.shape)} and {tuple(b.shape)}")
    if out is None:
        if accumulate:
            raise ValueError("accumulate=True needs out, the tensor to add to")
        out = torch.empty(shape, dtype=out_dtype, device=a.device)
    if tuple(out.shape) != shape or out.device != a.device:
        raise ValueError(f"out must be {shape} on {a.device}, got {tuple(out.shape)} on {out.device}")
    if out.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"out must be bfloat16 or float32, got {out.dtype}")
    if accumulate and out.dtype != torch.float32:
        raise ValueError(f"accumulate=True needs out in float32, got {out.dtype}")
    if shape[-1] % 8:
        raise ValueError(f"N must be a multiple of 8 (16 bytes of bf16), got {shape[-1]}")
    _check_rows(out, "out")
    return out


def _check(a: torch.Tensor, b: torch.Tensor, a_scale: torch.Tensor | None, b_scale: torch.Tensor | None) -> Scaling:
    """The recipe that operands and scales make; a is [M, K]."""
    if b.device != a.device:
        raise ValueError(f"b must be on {a.device} like a, got {b.device}")
    _check_rows(a, "a")
    _check_rows(b, "b")
    if b.is_cuda and b.dim() == 3 and b.stride(0) != b.shape[1] * b.stride(1):
        raise ValueError(f"groups of b must follow each other without gaps, got strides {b.stride()}")
    if a.dtype == torch.bfloat16 and b.dtype == torch.bfloat16:
        if a_scale is not None or b_scale is not None:
            raise ValueError("scales were given for bfloat16 operands; they go with float8_e4m3fn")
        return Scaling.NONE
    if a.dtype != torch.float8_e4m3fn or b.dtype != torch.float8_e4m3fn:
        raise ValueError(f"a and b must both be bfloat16 or both float8_e4m3fn, got {a.dtype} and {b.dtype}")
    if a_scale is None or b_scale is None:
        missing = "a_scale" if a_scale is None else "b_scale"
        raise ValueError(f"float8_e4m3fn operands need a_scale and b_scale, {missing} is missing")
    for name, scale in (("a_scale", a_scale), ("b_scale", b_scale)):
        if scale.device != a.device:
            raise ValueError(f"{name} must be on {a.device} like a, got {scale.device}")
    (m, k), n = a.shape, b.shape[-2]
    by_row = a_scale.dim() == 1
    if by_row:
        check_scales(a_scale, rows=m, columns=k, granularity="row", name="a_scale")
        check_scales(b_scale, rows=n, columns=k, granularity="row", name="b_scale")
    else:
        check_scales(a_scale, rows=m, columns=k, granularity="1x128", layout="sm90", name="a_scale")
        check_scales(b_scale, rows=n, columns=k, granularity="128x128", name="b_scale")
    if b_scale.shape[: -1 if by_row else -2] != b.shape[:-2]:
        raise ValueError(f"b_scale must have the {tuple(b.shape[:-2])} groups of b, got {tuple(b_scale.shape)}")
    return Scaling.ROW if by_row else Scaling.BLOCK


def _check_rows(x: torch.Tensor, name: str) -> None:
    item = x.element_size()
    if x.numel() and (x.stride(-1) != 1 and x.shape[-1] > 1):
        raise ValueError(f"{name} must have adjacent columns (inner stride 1), got strides {x.stride()}")
    if x.is_cuda and x.numel() and (x.data_ptr() % 16 or x.stride(-2) * item % 16):
        raise ValueError(
            f"{name} must start at, and step from row to row by, a multiple of 16 bytes, "
            f"got address {x.data_ptr():#x} and a row stride of {x.stride(-2) * item} bytes"
        )


def _run(operands: Operands, scaling: Scaling, grouping: Grouping, accumulate: bool, *, rows: int) -> torch.Tensor:
    device = operands.a.device
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        raise EngineUnavailableError(f"these GEMMs need compute capability 9.0 (Hopper), {device} has {capability}")
    groups = operands.b.shape[0] if operands.b.dim() == 3 else 1
    (m, k), n = operands.a.shape, operands.b.shape[-2]
    if m == 0 or n == 0:
        return operands.d
    if k == 0:
        # No TMA map describes an empty tensor. Nothing to add either; what belongs to no group is not to be written.
        raise ValueError("K must be at least 1, got 0")
    limit = current().num_sms
    desc = GemmDesc(
        scaling=scaling,
        grouping=grouping,
        m=m if grouping != "masked" else max(rows, 1),
        n=n,
        k=k,
        groups=groups,
        out_bf16=operands.d.dtype == torch.bfloat16,
        accumulate=accumulate,
        num_sms=min(limit or num_sms(device.index), num_sms(device.index)),
    )
    run(operands, desc)
    return operands.d
