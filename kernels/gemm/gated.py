"""GEMMs whose epilogue joins gate and up columns: activation, then bf16 or e4m3 with 1x128 scales, in one kernel.

Gate and up rows of the weight are interleaved by 8, so that a gate value and its up value meet in one thread: rows 16 i
to 16 i + 7 are gate rows 8 i to 8 i + 7, the next 8 the up rows of the same numbers (``interleave``).
"""

from __future__ import annotations

import torch

from megamoe.kernels.gemm import reference
from megamoe.kernels.gemm.checks import check_grouped, check_inner, check_majors, check_table, launch, scaling_of
from megamoe.kernels.gemm.config import Activation, Grouping, Scaling
from megamoe.kernels.gemm.launch import Operands
from megamoe.kernels.gemm.reference import deinterleave, interleave
from megamoe.kernels.quant.formats import num_blocks
from megamoe.kernels.quant.layouts import empty_e4m3, empty_scales
from megamoe.kernels.quant.reference import ActivationLike

__all__ = ["deinterleave", "gated_gemm", "interleave"]


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
    """row_weight * activation(A @ W13^T) as (D [M, I], scales or None); the product is never stored.

    Args:
        a: [M, K] bf16, or e4m3 with scales.
        b: ``interleave(w13)``: [2I, K], or [G, 2I, K] with ``offsets``; I a multiple of 8.
        offsets: as in ``api.grouped_gemm``; rows of no group are not written.
        activation: swiglu, swiglu_limited, swiglu_clamped or geglu (``megamoe.Activation``).
        a_scale: e4m3 only: fp32 [M, ceil(K / 128)] in the sm90 layout.
        b_scale: e4m3 only: fp32 [.., 2 * ceil(I / 128), ceil(K / 128)] of w13 before it was interleaved, gate blocks
            first (``cast_128x128(w13, parts=2)``).
        row_weight: fp32 [M], multiplied onto the activation; None for 1.
        out_dtype: bf16, or e4m3: then cast by the rule of ``cast_1x128``, with scales fp32 [M, ceil(I / 128)] in the
            sm90 layout; rows of q are padded to 16 bytes with zeros.

    Raises:
        ValueError, EngineUnavailableError: as in ``api.gemm``.
    """
    if a.dim() != 2 or b.dim() != (2 if offsets is None else 3):
        raise ValueError(
            f"a and b must be [M, K] and [2I, K], or [G, 2I, K] with offsets, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if offsets is not None:
        check_table(offsets, check_grouped(a, b, 2) + 1, a.device, "offsets")
    check_inner(a, b)
    kind = _kind(activation)
    rows, columns = a.shape[0], b.shape[-2] // 2
    if b.shape[-2] % 16:
        raise ValueError(f"b holds gate and up rows interleaved by 8: a multiple of 16 rows, got {b.shape[-2]}")
    if out_dtype not in (torch.bfloat16, torch.float8_e4m3fn):
        raise ValueError(f"out_dtype must be bfloat16 or float8_e4m3fn, got {out_dtype}")
    if row_weight is not None and (
        row_weight.dtype != torch.float32 or row_weight.shape != (rows,) or row_weight.device != a.device
    ):
        raise ValueError(
            f"row_weight must be fp32 [{rows}] on {a.device}, got {row_weight.dtype} {tuple(row_weight.shape)} on "
            f"{row_weight.device}"
        )
    scaling = scaling_of(a, b, a_scale, b_scale, parts=2)
    if scaling is Scaling.ROW:
        raise ValueError("an activation goes with bf16 operands or 1x128 by 128x128 scales, got one scale per row")
    majors = check_majors(a, b)
    if majors != ("k", "k"):
        raise ValueError(f"a and b must have adjacent columns (inner stride 1), got {a.stride()} and {b.stride()}")
    if not a.is_cuda:
        return reference.gated_gemm(
            a,
            b,
            offsets,
            activation=activation,
            a_scale=a_scale,
            b_scale=b_scale,
            row_weight=row_weight,
            out_dtype=out_dtype,
        )
    cast = out_dtype == torch.float8_e4m3fn
    d = (
        empty_e4m3((rows, columns), a.device)
        if cast
        else torch.empty(rows, columns, dtype=torch.bfloat16, device=a.device)
    )
    scale = empty_scales((rows, num_blocks(columns)), "sm90", a.device) if cast else None
    if d.numel():
        operands = Operands(
            a=a,
            b=b,
            d=d,
            a_scale=a_scale,
            b_scale=b_scale,
            table=None if offsets is None else offsets.contiguous(),
            d_scale=scale,
            row_weight=None if row_weight is None else row_weight.contiguous(),
            act_limit=activation.limit,
            act_alpha=activation.alpha,
        )
        grouping: Grouping = "dense" if offsets is None else "contiguous"
        launch(operands, scaling, grouping, majors, rows=rows, activation=kind)
    return d, scale


def _kind(activation: ActivationLike) -> Activation:
    known = [member.name.lower() for member in Activation if member is not Activation.NONE]
    if activation.name not in known:
        raise ValueError(f"activation must join gate and up: one of {', '.join(known)}, got {activation.name}")
    return Activation[activation.name.upper()]
