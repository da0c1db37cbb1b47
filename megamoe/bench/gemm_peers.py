"""The peers of ``megamoe bench gemm`` as calls on the data that ours get.

Peers are torch's own (cuBLASLt, CUTLASS) and, if it can be imported, DeepGEMM. Building one may raise whatever its
library raises where it has no such kernel; the benchmark then goes on without it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import cache
from itertools import accumulate
from typing import Any

import torch

from megamoe.bench.gemm_cases import Data, spread
from megamoe.bench.gemm_ours import Build, Contender, out_like
from megamoe.kernels.quant.reference import dequantise_1x128


def peers(data: Data) -> Iterator[tuple[str, Build]]:
    """Name and builder of every peer that may know this case."""
    dense, recipe = data.case.grouping == "dense", data.case.recipe
    if data.case.grouping == "k":
        yield ("torch._grouped_mm" if recipe == "bf16" else "torch._grouped_mm in bf16"), _grouped_mm_by_k
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


def _torch_mm(data: Data) -> Contender:
    out = out_like(data.a, data.a.shape[0], data.case.n)
    return Contender(lambda: torch.mm(data.a, data.b.t(), out=out))


def _grouped_mm(data: Data) -> Contender:
    ends = data.offsets[1:].contiguous()
    return Contender(lambda: torch.ops.aten._grouped_mm(data.a, data.b.transpose(1, 2), ends))


def _grouped_mm_by_k(data: Data) -> Contender:
    """Of e4m3, which torch does not group along K: the same values in bf16 rows."""
    a, b, ends = data.a, data.b, data.bounds[1:].contiguous()
    if data.a_scale is not None and data.b_scale is not None:
        a, b = (
            dequantise_1x128(q, scale).bfloat16().t().contiguous()
            for q, scale in ((a, data.a_scale), (b, data.b_scale))
        )
    return Contender(lambda: torch.ops.aten._grouped_mm(a.t(), b, ends))


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
        out = out_like(data.a, data.a.shape[0], case.n)
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
        left, out = _deep_left(module, spread(data.a, places, total), scale), out_like(data.a, total, case.n)
        function = getattr(module, f"m_grouped_{kind}_gemm_nt_contiguous")
        return _returning(out, lambda d: d[places], function, left, b, out, indices)
    total = case.groups * case.most
    places = data.places([g * case.most for g in range(case.groups)])
    a = spread(data.a, places, total).view(case.groups, case.most, case.k)
    scale = None
    if data.a_scale is not None:
        scale = spread(data.a_scale, places, total).view(case.groups, case.most, -1)
    counts = torch.tensor(case.counts, dtype=torch.int32, device=a.device)
    out = out_like(a, case.groups, case.most, case.n)
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
