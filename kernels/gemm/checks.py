"""What a GEMM refuses at the door, in sentences; which recipe and which majors its operands make."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from megamoe.errors import EngineUnavailableError
from megamoe.kernels.gemm.config import Activation, Grouping, Major, Out, Scaling
from megamoe.kernels.gemm.heuristics import GemmDesc
from megamoe.kernels.gemm.knobs import current
from megamoe.kernels.gemm.launch import Operands, num_sms, run
from megamoe.kernels.quant.layouts import check_scales

Layout = Literal["nt", "nn", "tn", "tt"]
_OUT: dict[torch.dtype, Out] = {torch.bfloat16: "bf16", torch.float32: "f32", torch.float8_e4m3fn: "e4m3"}


def as_nt(a: torch.Tensor, b: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """Views [.., M, K] and [.., N, K] of operands stored as ``layout`` says; nothing is copied."""
    if layout not in get_args(Layout):
        raise ValueError(f"layout must be one of {', '.join(get_args(Layout))}, got {layout!r}")
    return a.transpose(-2, -1) if layout[0] == "t" else a, b.transpose(-2, -1) if layout[1] == "n" else b


def check_grouped(a: torch.Tensor, b: torch.Tensor, dims: int) -> int:
    """Number of groups of b [G, N, K] that go with a of ``dims`` dimensions."""
    if a.dim() != dims or b.dim() != 3:
        shape = "[M, K]" if dims == 2 else "[G, M, K]"
        raise ValueError(f"a and b must be {shape} and [G, N, K], got {tuple(a.shape)} and {tuple(b.shape)}")
    if b.shape[0] < 1:
        raise ValueError(f"b must hold at least one group, got {tuple(b.shape)}")
    return int(b.shape[0])


def check_table(table: torch.Tensor, length: int, device: torch.device, name: str) -> None:
    """Offsets or counts: int32 on the operands' device; no value is read."""
    if table.shape != (length,) or table.dtype != torch.int32 or table.device != device:
        raise ValueError(
            f"{name} must be int32 [{length}] on {device}, got {table.dtype} {tuple(table.shape)} on {table.device}"
        )


def check_inner(a: torch.Tensor, b: torch.Tensor) -> None:
    """a [.., M, K] and b [.., N, K] agree in K and stand on one device."""
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(f"a and b must agree in K, got {tuple(a.shape)} and {tuple(b.shape)}")
    if b.device != a.device:
        raise ValueError(f"b must be on {a.device} like a, got {b.device}")


def prepare_out(
    shape: tuple[int, ...],
    device: torch.device,
    out: torch.Tensor | None,
    out_dtype: torch.dtype,
    *,
    accumulate: bool,
) -> torch.Tensor:
    """``out``, checked or made."""
    if out is None:
        if accumulate:
            raise ValueError("accumulate=True needs out, the tensor to add to")
        out = torch.empty(shape, dtype=out_dtype, device=device)
    if tuple(out.shape) != shape or out.device != device:
        raise ValueError(f"out must be {shape} on {device}, got {tuple(out.shape)} on {out.device}")
    if out.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"out must be bfloat16 or float32, got {out.dtype}")
    if accumulate and out.dtype != torch.float32:
        raise ValueError(f"accumulate=True needs out in float32, got {out.dtype}")
    if shape[-1] % 8:
        raise ValueError(f"N must be a multiple of 8 (16 bytes of bf16), got {shape[-1]}")
    if out.numel() and out.stride(-1) != 1 and out.shape[-1] > 1:
        raise ValueError(f"out must have adjacent columns (inner stride 1), got strides {out.stride()}")
    _check_steps(out, -2, "out")
    return out


def check_majors(a: torch.Tensor, b: torch.Tensor) -> tuple[Major, Major]:
    """``major`` of both."""
    return major(a, "a"), major(b, "b")


def check_grouped_majors(a: torch.Tensor, b: torch.Tensor) -> tuple[Major, Major]:
    """``major`` of both, for groups that may start at any row of a [M, K]: TMA starts at 16 bytes of adjacent ones."""
    majors = check_majors(a, b)
    if majors[0] == "mn" and (a.is_cuda or a.stride(-1) != 1):
        raise ValueError(
            "groups may start at any row of a, so its columns must be adjacent (inner stride 1) and its rows a "
            f"multiple of 16 bytes apart, got strides {a.stride()}"
        )
    return majors


def major(x: torch.Tensor, name: str) -> Major:
    """Which of the last two dimensions of an operand [.., M or N, K] is contiguous, both as TMA can read them."""
    along_k = x.stride(-1) == 1 or x.shape[-1] <= 1
    along_mn = x.stride(-2) == 1 or x.shape[-2] <= 1
    aligned = x.stride(-2) * x.element_size() % 16 == 0
    found: Major = "k" if along_k and (aligned or not along_mn) else "mn"
    if x.numel() == 0:
        return "k"
    if not (along_k or along_mn):
        raise ValueError(f"{name} must have stride 1 in one of its last two dimensions, got strides {x.stride()}")
    if found == "mn" and x.element_size() == 1:
        raise ValueError(
            f"{name} in float8_e4m3fn must have adjacent columns along K (inner stride 1): Hopper multiplies 8-bit "
            f"operands K-major only, got strides {x.stride()}"
        )
    _check_steps(x, -2 if found == "k" else -1, name)
    if x.is_cuda and x.dim() == 3 and x.shape[0] > 1:
        if found == "k" and x.stride(0) != x.shape[1] * x.stride(1):
            raise ValueError(f"groups of {name} must follow each other without gaps, got strides {x.stride()}")
        if found == "mn" and x.stride(0) * x.element_size() % 16:
            raise ValueError(f"groups of {name} must start 16 bytes aligned, got strides {x.stride()}")
    return found


def _check_steps(x: torch.Tensor, dim: int, name: str) -> None:
    item = x.element_size()
    if x.is_cuda and x.numel() and (x.data_ptr() % 16 or x.stride(dim) * item % 16):
        raise ValueError(
            f"{name} must start at, and step from row to row by, a multiple of 16 bytes, "
            f"got address {x.data_ptr():#x} and a row stride of {x.stride(dim) * item} bytes"
        )


def scaling_of(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor | None,
    b_scale: torch.Tensor | None,
    *,
    vectors: bool = False,
    parts: int = 1,
) -> Scaling:
    """The recipe that operands and scales make; a is [M, K]. ``vectors``: b may have 1x128 scales."""
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
        if vectors and b_scale.dim() == 2 and b_scale.shape[0] == n:
            check_scales(b_scale, rows=n, columns=k, granularity="1x128", layout="sm90", name="b_scale")
            return Scaling.VECTOR
        check_scales(b_scale, rows=n, columns=k, granularity="128x128", parts=parts, name="b_scale")
    if b_scale.shape[: -1 if by_row else -2] != b.shape[:-2]:
        raise ValueError(f"b_scale must have the {tuple(b.shape[:-2])} groups of b, got {tuple(b_scale.shape)}")
    return Scaling.ROW if by_row else Scaling.BLOCK


def launch(
    operands: Operands,
    scaling: Scaling,
    grouping: Grouping,
    majors: tuple[Major, Major],
    *,
    rows: int,
    accumulate: bool = False,
    activation: Activation = Activation.NONE,
) -> None:
    """Choose a kernel for checked operands of at least one row and column, and queue it.

    ``rows``: of all groups together, or a guess at it; of one group's D for grouping "k".
    """
    device = operands.a.device
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        raise EngineUnavailableError(f"these GEMMs need compute capability 9.0 (Hopper), {device} has {capability}")
    n, k = operands.b.shape[-2:]
    groups = operands.b.shape[0] if operands.b.dim() == 3 else 1
    if grouping == "k":
        groups = operands.d.shape[0]
        k = max(1, k // groups)
    if k == 0:
        # No TMA map describes an empty tensor. Nothing to add either; what belongs to no group is not to be written.
        raise ValueError("K must be at least 1, got 0")
    limit, config = current().num_sms, current().config
    desc = GemmDesc(
        scaling=scaling,
        grouping=grouping,
        m=max(rows, 1),
        n=n,
        k=k,
        groups=groups,
        out=_OUT[operands.d.dtype],
        accumulate=accumulate,
        a_major=majors[0],
        b_major=majors[1],
        activation=activation,
        num_sms=min(limit or num_sms(device.index), num_sms(device.index)),
    )
    run(operands, desc, config)
