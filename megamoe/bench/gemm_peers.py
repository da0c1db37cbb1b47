"""Ours and the peers of ``megamoe bench gemm`` as calls on the same data.

Peers are torch's own (cuBLASLt, CUTLASS) and, if it can be imported, DeepGEMM. Building one may raise whatever its
library raises where it has no such kernel; the benchmark then goes on without it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch

from megamoe.bench.gemm_cases import Data, spread
from megamoe.kernels.gemm import api
from megamoe.kernels.gemm.checks import Layout
from megamoe.kernels.gemm.config import Major, Scaling
from megamoe.kernels.gemm.heuristics import GemmDesc, choose
from megamoe.kernels.gemm.launch import num_sms
from megamoe.kernels.quant import scales

_SCALING = {"bf16": Scaling.NONE, "fp8_block": Scaling.BLOCK, "fp8_row": Scaling.ROW}


@dataclass(frozen=True)
class Contender:
    """``call`` queues the product and returns D; ``valid`` picks the valid rows of D, in the order of ``Data.a``."""

    call: Callable[[], torch.Tensor]
    valid: Callable[[torch.Tensor], torch.Tensor] = lambda d: d


Build = Callable[[Data], Contender]


def config_name(data: Data) -> str:
    """The kernel that ``ours`` runs."""
    case, device = data.case, data.a.device
    sms = num_sms(device.index or 0) if device.type == "cuda" else 132
    rows = case.groups * case.expected if case.grouping == "masked" else data.a.shape[0]
    scaling = _SCALING[case.recipe]
    if case.grouping == "k":
        major: Major = "mn" if data.a_scale is None else "k"
        k = max(1, data.a.shape[0 if data.a_scale is None else 1] // case.groups)
        return choose(
            GemmDesc(
                scaling=scaling if data.a_scale is None else Scaling.VECTOR,
                grouping="k",
                m=case.n,
                n=case.k,
                k=k,
                groups=case.groups,
                out="bf16" if case.out == torch.bfloat16 else "f32",
                a_major=major,
                b_major=major,
                num_sms=sms,
            )
        ).name
    desc = GemmDesc(
        scaling=scaling,
        grouping=case.grouping,
        m=rows,
        n=case.n,
        k=case.k,
        groups=case.groups,
        a_major="mn" if case.layout[0] == "t" else "k",
        b_major="mn" if case.layout[1] == "n" else "k",
        num_sms=sms,
    )
    return choose(desc).name


def ours(data: Data) -> Contender:
    """This project's kernel."""
    case, a, b, sb = data.case, data.a, data.b, data.b_scale
    if case.grouping == "k":
        return _ours_by_k(data)
    if case.grouping == "masked":
        places = data.places([g * case.most for g in range(case.groups)])
        total = case.groups * case.most
        a = spread(a, places, total).view(case.groups, case.most, case.k)
        sa = _columns(None if data.a_scale is None else spread(data.a_scale, places, total))
        if sa is not None and sa.dim() == 1:
            sa = sa.view(case.groups, case.most)
        counts = torch.tensor(case.counts, dtype=torch.int32, device=a.device)
        out = _out(a, case.groups, case.most, case.n)
        return Contender(
            lambda: api.masked_gemm(a, b, counts, a_scale=sa, b_scale=sb, out=out, expected_rows=case.expected),
            lambda d: d.view(total, -1)[places],
        )
    sa, out = _columns(data.a_scale), _out(a, a.shape[0], case.n)
    if case.grouping == "dense":
        return Contender(lambda: api.gemm(a, b, a_scale=sa, b_scale=sb, out=out))
    offsets = data.offsets
    return Contender(lambda: api.grouped_gemm(a, b, offsets, a_scale=sa, b_scale=sb, out=out))


def _ours_by_k(data: Data) -> Contender:
    case, a, b, bounds = data.case, data.a, data.b, data.bounds
    sa, sb = _columns(data.a_scale), _columns(data.b_scale)
    out = torch.empty(case.groups, case.n, case.k, dtype=case.out, device=a.device)
    layout: Layout = "tn" if sa is None else "nt"
    return Contender(lambda: api.k_grouped_gemm(a, b, bounds, layout=layout, a_scale=sa, b_scale=sb, out=out))


def peers(data: Data) -> Iterator[tuple[str, Build]]:
    """Name and builder of every peer that may know this case."""
    dense, recipe = data.case.grouping == "dense", data.case.recipe
    if data.case.grouping == "k":
        if recipe == "bf16":
            yield "torch._grouped_mm", _grouped_mm_by_k
        return
    if recipe == "bf16":
        yield ("torch.mm", _torch_mm) if dense else ("torch._grouped_mm", _grouped_mm)
    elif dense:
        yield "torch._scaled_mm", _scaled_mm
        if recipe == "fp8_row":
            yield "torch._scaled_mm fast", lambda data: _scaled_mm(data, fast=True)
    elif recipe == "fp8_row":
        yield "torch._scaled_grouped_mm fast", _scaled_grouped_mm
    if recipe != "fp8_row" and data.a.is_cuda and (module := deep_gemm()) is not None:
        yield f"deep_gemm-{module.__version__}", _deep_gemm


@cache
def deep_gemm() -> Any | None:
    """DeepGEMM, None where it is not installed or cannot start."""
    try:
        return importlib.import_module("deep_gemm")
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        if not (isinstance(error, ModuleNotFoundError) and error.name == "deep_gemm"):
            print(f"deep_gemm is there but does not start: {error}", flush=True)
        return None


def _columns(scale: torch.Tensor | None) -> torch.Tensor | None:
    """Scales of A as Hopper's kernels take them: adjacent rows; those per row stay."""
    return scale if scale is None or scale.dim() == 1 else scales.to_sm90(scale)


def _out(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=like.device)


def _torch_mm(data: Data) -> Contender:
    out = _out(data.a, data.a.shape[0], data.case.n)
    return Contender(lambda: torch.mm(data.a, data.b.t(), out=out))


def _grouped_mm(data: Data) -> Contender:
    ends = data.offsets[1:].contiguous()
    return Contender(lambda: torch.ops.aten._grouped_mm(data.a, data.b.transpose(1, 2), ends))


def _grouped_mm_by_k(data: Data) -> Contender:
    ends = data.offsets[1:].contiguous()
    return Contender(lambda: torch.ops.aten._grouped_mm(data.a.t(), data.b, ends))


def _scaled_mm(data: Data, *, fast: bool = False) -> Contender:
    """cuBLASLt or CUTLASS; ``fast``: one fp8 accumulator for all of K, which is less precise."""
    sa, sb = data.a_scale, data.b_scale
    assert sa is not None and sb is not None
    if sa.dim() == 1:
        left, right = sa[:, None], sb[None, :]
    else:
        left, right = sa.t().contiguous().t(), sb.t()
    out = torch.bfloat16
    return Contender(
        lambda: torch._scaled_mm(data.a, data.b.t(), scale_a=left, scale_b=right, out_dtype=out, use_fast_accum=fast)
    )


def _scaled_grouped_mm(data: Data) -> Contender:
    ends = data.offsets[1:].contiguous()
    return Contender(
        lambda: torch.ops.aten._scaled_grouped_mm(
            data.a,
            data.b.transpose(1, 2),
            data.a_scale,
            data.b_scale,
            ends,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    )


def _deep_gemm(data: Data) -> Contender:
    case, module = data.case, deep_gemm()
    assert module is not None
    kind = "fp8" if case.recipe == "fp8_block" else "bf16"
    b = data.b if data.b_scale is None else (data.b, data.b_scale)
    if case.grouping == "dense":
        out = _out(data.a, data.a.shape[0], case.n)
        left = _deep_left(module, data.a, data.a_scale)
        # Its functions for other layouts turn the operands into these views.
        return _returning(out, lambda d: d, getattr(module, f"{kind}_gemm_nt"), left, b, out)
    if case.grouping == "contiguous":
        # Groups start at multiples of this many rows; padding rows carry index -1.
        align = int(getattr(module, "get_mk_alignment_for_contiguous_layout", lambda: 128)())
        padded = [-(-count // align) * align for count in case.counts]
        total = sum(padded)
        places = data.places([0, *accumulate(padded[:-1])])
        owner = torch.repeat_interleave(torch.arange(case.groups), torch.tensor(case.counts)).int().to(data.a.device)
        indices = torch.full((total,), -1, dtype=torch.int32, device=data.a.device)
        indices[places] = owner
        scale = None if data.a_scale is None else spread(data.a_scale, places, total)
        left, out = _deep_left(module, spread(data.a, places, total), scale), _out(data.a, total, case.n)
        function = getattr(module, f"m_grouped_{kind}_gemm_nt_contiguous")
        return _returning(out, lambda d: d[places], function, left, b, out, indices)
    total = case.groups * case.most
    places = data.places([g * case.most for g in range(case.groups)])
    a = spread(data.a, places, total).view(case.groups, case.most, case.k)
    scale = None
    if data.a_scale is not None:
        scale = spread(data.a_scale, places, total).view(case.groups, case.most, -1)
    counts = torch.tensor(case.counts, dtype=torch.int32, device=a.device)
    out = _out(a, case.groups, case.most, case.n)
    function = getattr(module, f"m_grouped_{kind}_gemm_nt_masked", None)
    function = function or getattr(module, f"{kind}_m_grouped_gemm_nt_masked")
    left = _deep_left(module, a, scale)
    return _returning(out, lambda d: d.view(total, -1)[places], function, left, b, out, counts, case.expected)


def _deep_left(module: Any, a: torch.Tensor, scale: torch.Tensor | None) -> Any:
    """A, with its scales in the layout that saves DeepGEMM a kernel per call."""
    if scale is None:
        return a
    convert = getattr(module.utils, "get_mn_major_tma_aligned_tensor", None)
    return a, scale if convert is None else convert(scale)


def _returning(
    out: torch.Tensor, valid: Callable[[torch.Tensor], torch.Tensor], function: Callable[..., object], *args: Any
) -> Contender:
    def call() -> torch.Tensor:
        function(*args)
        return out

    return Contender(call, valid)
