"""GEMMs on Hopper in BF16 or FP8, dense and grouped, checked at the door, launched on the current stream.

The recipe follows from the scales: none for bf16 operands; for e4m3 operands one scale per 1x128 of A (in the layout
``sm90`` of ``kernels.quant``) and per 128x128 of B, or per 1x128 of both, or one per row of A and of B. Sums are fp32,
FP8 promoted every 128 of K; the same inputs give the same bits. CPU tensors run on the twins in ``reference.py``.

``layout`` says how the operands are stored, as in BLAS and DeepGEMM: "nt" A [M, K] and B [N, K], "nn" B [K, N], "tn"
and "tt" A [K, M]. bf16 runs in all four without a copy, from transposed views too; e4m3 must be contiguous along K.

docs/gemm.md says which of these have run on a GPU.
"""

from __future__ import annotations

import torch

from megamoe.kernels.gemm import reference
from megamoe.kernels.gemm.checks import (
    Layout,
    as_nt,
    check_grouped,
    check_grouped_majors,
    check_inner,
    check_majors,
    check_table,
    launch,
    prepare_out,
    scaling_of,
)
from megamoe.kernels.gemm.launch import Operands


def gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    layout: Layout = "nt",
    a_scale: torch.Tensor | None = None,
    b_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    accumulate: bool = False,
) -> torch.Tensor:
    """D [M, N] = A [M, K] @ B [N, K]^T.

    Args:
        a, b: bf16, or e4m3 with scales; addresses and row strides multiples of 16 bytes.
        layout: how a and b are stored, see above.
        a_scale: e4m3 only: fp32 [M, ceil(K / 128)] with adjacent rows (``cast_1x128(..., layout="sm90")``), or [M].
        b_scale: e4m3 only: fp32 [ceil(N / 128), ceil(K / 128)] row-major, or like a_scale [N, ceil(K / 128)] with
            adjacent rows (weight gradients), or [N].
        out: where D goes, [M, N] bf16 or fp32; N a multiple of 8.
        out_dtype: bf16 or fp32, if ``out`` is None.
        accumulate: D += instead of D =; needs ``out`` in fp32.

    Raises:
        ValueError: shapes, dtypes, devices, strides or scale formats that do not fit, with got and expected.
        EngineUnavailableError: a CUDA device that is not compute capability 9.0.
    """
    if a.dim() != 2 or b.dim() != 2:
        raise ValueError(f"a and b must be [M, K] and [N, K], got {tuple(a.shape)} and {tuple(b.shape)}")
    a, b = as_nt(a, b, layout)
    check_inner(a, b)
    out = prepare_out((a.shape[0], b.shape[0]), a.device, out, out_dtype, accumulate=accumulate)
    scaling = scaling_of(a, b, a_scale, b_scale, vectors=True)
    majors = check_majors(a, b)
    if not a.is_cuda:
        return reference.gemm(a, b, a_scale=a_scale, b_scale=b_scale, out=out, accumulate=accumulate)
    if out.numel():
        operands = Operands(a=a, b=b, d=out, a_scale=a_scale, b_scale=b_scale, table=None)
        launch(operands, scaling, "dense", majors, rows=a.shape[0], accumulate=accumulate)
    return out


def grouped_gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    offsets: torch.Tensor,
    *,
    layout: Layout = "nt",
    a_scale: torch.Tensor | None = None,
    b_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    accumulate: bool = False,
) -> torch.Tensor:
    """Rows offsets[g] .. offsets[g + 1] of D [M, N] = the same rows of A [M, K] @ B[g]^T, for B [G, N, K].

    ``offsets`` [G + 1] int32 on the same device, ascending, within [0, M], of any alignment; groups may be empty. Only
    the kernel reads them: no host synchronisation, and a value out of order is not detected. Rows of no group are not
    written. ``layout`` "nn": B [G, K, N] (gradients of rows); A is never transposed. Everything else as in ``gemm``,
    with b_scale [G, ...].
    """
    groups = check_grouped(a, b, 2)
    a, b = as_nt(a, b, layout)
    check_table(offsets, groups + 1, a.device, "offsets")
    check_inner(a, b)
    out = prepare_out((a.shape[0], b.shape[1]), a.device, out, out_dtype, accumulate=accumulate)
    scaling = scaling_of(a, b, a_scale, b_scale)
    majors = check_grouped_majors(a, b)
    if not a.is_cuda:
        return reference.grouped_gemm(a, b, offsets, a_scale=a_scale, b_scale=b_scale, out=out, accumulate=accumulate)
    if out.numel():
        operands = Operands(a=a, b=b, d=out, a_scale=a_scale, b_scale=b_scale, table=offsets.contiguous())
        launch(operands, scaling, "contiguous", majors, rows=a.shape[0], accumulate=accumulate)
    return out


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
    groups = check_grouped(a, b, 3)
    if a.shape[0] != groups:
        raise ValueError(f"a must be [{groups}, M, K] like b, got {tuple(a.shape)}")
    check_table(counts, groups, a.device, "counts")
    if not a.is_contiguous() or (out is not None and not out.is_contiguous()):
        raise ValueError("a and out of a masked GEMM must be contiguous: group g starts at row g * M")
    check_inner(a, b)
    most, columns = a.shape[1], b.shape[1]
    out = prepare_out((groups, most, columns), a.device, out, out_dtype, accumulate=accumulate)
    rows = a.view(groups * most, a.shape[2])
    by_row = a_scale is not None and tuple(a_scale.shape) == (groups, most)
    flat_scale = a_scale.reshape(-1) if a_scale is not None and by_row else a_scale
    scaling = scaling_of(rows, b, flat_scale, b_scale)
    majors = check_grouped_majors(rows, b)
    if not a.is_cuda:
        grouped = flat_scale if flat_scale is None else flat_scale.reshape(groups, most, *flat_scale.shape[1:])
        return reference.masked_gemm(a, b, counts, a_scale=grouped, b_scale=b_scale, out=out, accumulate=accumulate)
    if out.numel():
        operands = Operands(
            a=rows,
            b=b,
            d=out.view(groups * most, columns),
            a_scale=flat_scale,
            b_scale=b_scale,
            table=counts.contiguous(),
            max_m=most,
        )
        guess = groups * (most if expected_rows is None else expected_rows)
        launch(operands, scaling, "masked", majors, rows=guess, accumulate=accumulate)
    return out


def k_grouped_gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    offsets: torch.Tensor,
    *,
    layout: Layout = "tn",
    a_scale: torch.Tensor | None = None,
    b_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    accumulate: bool = False,
) -> torch.Tensor:
    """D[g] [M, N] = rows offsets[g] .. offsets[g + 1] of A [T, M], transposed, @ the same rows of B [T, N].

    Weight gradients: T tokens ordered by expert. An empty group's D is zeros, or unchanged if accumulating. What stands
    in rows of no group does not matter, not even NaN.

    Args:
        a, b: bf16 rows as above; or e4m3, which Hopper multiplies only where K, here T, is contiguous: with
            ``layout="nt"`` the transposed quantised copies a [M, T] and b [N, T] (``cast_1x128_both``), in which each
            group is padded with zeros to a multiple of 128.
        offsets: [G + 1] int32 on the same device, ascending, within [0, T], read by the kernel alone. bf16: of any
            alignment. e4m3: multiples of 128, ``transposed_blocks(row offsets) * 128``; another value is refused at
            once on a CPU, and on a GPU by the next call there (the host does not wait to see it).
        a_scale, b_scale: e4m3 only: fp32 [M, T / 128] and [N, T / 128] with adjacent rows (sm90 layout).
        out: [G, M, N] contiguous, bf16 or fp32; fp32 to accumulate. N a multiple of 8.

    Raises:
        ValueError, EngineUnavailableError: as in ``gemm``.
    """
    if a.dim() != 2 or b.dim() != 2:
        raise ValueError(f"a and b must be matrices, got {tuple(a.shape)} and {tuple(b.shape)}")
    if offsets.dim() != 1 or len(offsets) < 2:
        raise ValueError(f"offsets must be [G + 1] for at least one group, got {tuple(offsets.shape)}")
    a, b = as_nt(a, b, layout)
    groups, k = len(offsets) - 1, a.shape[1]
    check_table(offsets, groups + 1, a.device, "offsets")
    check_inner(a, b)
    out = prepare_out((groups, a.shape[0], b.shape[0]), a.device, out, out_dtype, accumulate=accumulate)
    if not out.is_contiguous():
        raise ValueError(f"out of a k-grouped GEMM must be contiguous, got strides {out.stride()}")
    scaling = scaling_of(a, b, a_scale, b_scale, vectors=True)
    if scaling.name not in ("NONE", "VECTOR"):
        raise ValueError(
            "a k-grouped GEMM of float8_e4m3fn needs one scale per 1x128 of both operands: a_scale [M, T / 128] and "
            f"b_scale [N, T / 128], got {tuple(a_scale.shape)} and {tuple(b_scale.shape)}"  # type: ignore[union-attr]
        )
    if a.element_size() == 1 and k % 128:
        raise ValueError(f"a k-grouped GEMM of float8_e4m3fn needs groups padded to multiples of 128, got T = {k}")
    majors = check_majors(a, b)
    if a.element_size() == 2 and a.numel() and b.numel() and majors != ("mn", "mn"):
        raise ValueError(
            "a k-grouped GEMM of bfloat16 takes rows a [T, M] and b [T, N] with adjacent columns, "
            f"got strides {a.stride()[::-1]} and {b.stride()[::-1]}"
        )
    if not a.is_cuda:
        return reference.k_grouped_gemm(
            a, b, offsets, layout="nt", a_scale=a_scale, b_scale=b_scale, out=out, accumulate=accumulate
        )
    if out.numel() and k == 0 and not accumulate:
        return out.zero_()
    if out.numel() and k:
        operands = Operands(a=a, b=b, d=out, a_scale=a_scale, b_scale=b_scale, table=offsets.contiguous())
        launch(operands, scaling, "k", majors, rows=a.shape[0], accumulate=accumulate)
    return out
