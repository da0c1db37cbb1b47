"""DeepGEMM's GEMM names over ``megamoe.kernels.gemm.api``: kernels on Hopper, twins on a CPU.

An FP8 operand is a pair (e4m3, fp32 scale): A's scale per 1x128, [M, ceil(K / 128)] row-major or with adjacent rows,
B's per 128x128. n and t say how operands lie: "nt" is A [M, K] and B [N, K]; "n" second is B [K, N], "t" first is A
[K, M]. The kernels take "nt" only, so any other order copies the operand first. ``c``: D = A @ B^T + c, fp32 only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

from megamoe.adapters.deep_gemm.knobs import in_force
from megamoe.errors import EngineUnavailableError
from megamoe.kernels.gemm import api
from megamoe.kernels.quant.formats import num_blocks
from megamoe.kernels.quant.layouts import aligned_rows
from megamoe.kernels.quant.scales import to_sm90

Fp8 = tuple[torch.Tensor, torch.Tensor]

# Keywords without influence on results, and those that must have one of a few values.
_HINTS = frozenset({"compiled_dims", "disable_ue8m0_cast", "expected_m_for_psum_layout", "ensure_zero_padding"})
_ONLY: dict[str, tuple[Any, ...]] = {
    "recipe": (None, (1, 128, 128)),
    "recipe_a": (None, (1, 128)),
    "recipe_b": (None, (128, 128)),
    "alpha": (None, 1.0),
    "epilogue": (None,),
    "use_psum_layout": (False,),
}


def fp8_gemm_nt(
    a: Fp8, b: Fp8, d: torch.Tensor, c: torch.Tensor | None = None, recipe: Any = None, **more: Any
) -> None:
    """D [M, N] = A [M, K] @ B [N, K]^T (+ c), bf16 or fp32.

    Raises:
        ValueError: operands, scales or keywords that do not fit, with got and expected.
        EngineUnavailableError: a CUDA device other than Hopper.
    """
    _gemm("fp8_gemm_nt", a, b, d, c, {"recipe": recipe, **more})


def fp8_gemm_nn(
    a: Fp8, b: Fp8, d: torch.Tensor, c: torch.Tensor | None = None, recipe: Any = None, **more: Any
) -> None:
    """As ``fp8_gemm_nt`` with B [K, N] and its scale [K / 128, N / 128]: copies B."""
    _gemm("fp8_gemm_nn", a, _turned(b), d, c, {"recipe": recipe, **more})


def fp8_gemm_tn(
    a: Fp8, b: Fp8, d: torch.Tensor, c: torch.Tensor | None = None, recipe: Any = None, **more: Any
) -> None:
    """As ``fp8_gemm_nt`` with A [K, M], its scale [K / 128, M], and B [K, N]: copies both."""
    _gemm("fp8_gemm_tn", _turned(a), _turned(b), d, c, {"recipe": recipe, **more})


def fp8_gemm_tt(
    a: Fp8, b: Fp8, d: torch.Tensor, c: torch.Tensor | None = None, recipe: Any = None, **more: Any
) -> None:
    """As ``fp8_gemm_nt`` with A [K, M] and its scale [K / 128, M]: copies A."""
    _gemm("fp8_gemm_tt", _turned(a), b, d, c, {"recipe": recipe, **more})


def bf16_gemm_nt(a: torch.Tensor, b: torch.Tensor, d: torch.Tensor, c: torch.Tensor | None = None, **more: Any) -> None:
    """D [M, N] = A [M, K] @ B [N, K]^T (+ c), bf16 or fp32; errors as ``fp8_gemm_nt``."""
    _gemm("bf16_gemm_nt", (a, None), (b, None), d, c, more)


def bf16_gemm_nn(a: torch.Tensor, b: torch.Tensor, d: torch.Tensor, c: torch.Tensor | None = None, **more: Any) -> None:
    """As ``bf16_gemm_nt`` with B [K, N]: copies B."""
    _gemm("bf16_gemm_nn", (a, None), (_turn(b), None), d, c, more)


def bf16_gemm_tn(a: torch.Tensor, b: torch.Tensor, d: torch.Tensor, c: torch.Tensor | None = None, **more: Any) -> None:
    """As ``bf16_gemm_nt`` with A [K, M] and B [K, N]: copies both."""
    _gemm("bf16_gemm_tn", (_turn(a), None), (_turn(b), None), d, c, more)


def bf16_gemm_tt(a: torch.Tensor, b: torch.Tensor, d: torch.Tensor, c: torch.Tensor | None = None, **more: Any) -> None:
    """As ``bf16_gemm_nt`` with A [K, M]: copies A."""
    _gemm("bf16_gemm_tt", (_turn(a), None), (b, None), d, c, more)


def m_grouped_fp8_gemm_nt_contiguous(
    a: Fp8, b: Fp8, d: torch.Tensor, m_indices: torch.Tensor | None = None, recipe: Any = None, **more: Any
) -> None:
    """Row m of D [M, N] = row m of A [M, K] @ B[g]^T with g = m_indices[m], for B [G, N, K].

    ``m_indices`` int32 [M] (or ``grouped_layout=``, its name in other versions): ascending but for -1 (padding: rows of
    D become 0). Nothing is read on the host; rows whose index is smaller than one before them become NaN, and rows
    whose index is G or more are not written.
    """
    _contiguous("m_grouped_fp8_gemm_nt_contiguous", a, b, d, m_indices, {"recipe": recipe, **more})


def m_grouped_bf16_gemm_nt_contiguous(
    a: torch.Tensor, b: torch.Tensor, d: torch.Tensor, m_indices: torch.Tensor | None = None, **more: Any
) -> None:
    """As ``m_grouped_fp8_gemm_nt_contiguous`` for bf16 A [M, K] and B [G, N, K]."""
    _contiguous("m_grouped_bf16_gemm_nt_contiguous", (a, None), (b, None), d, m_indices, more)


def m_grouped_fp8_gemm_nt_masked(  # noqa: PLR0917 - DeepGEMM's order
    a: Fp8,
    b: Fp8,
    d: torch.Tensor,
    masked_m: torch.Tensor,
    expected_m: int | None = None,
    recipe: Any = None,
    **more: Any,
) -> None:
    """The first masked_m[g] rows of D[g] = those of A[g] @ B[g]^T, for A [G, M, K] with scale [G, M, ceil(K / 128)].

    ``masked_m`` int32 [G], on the device; ``expected_m`` is a guess at its mean, for speed. Other rows are not written.
    """
    _masked("m_grouped_fp8_gemm_nt_masked", a, b, d, masked_m, expected_m, {"recipe": recipe, **more})


def m_grouped_bf16_gemm_nt_masked(
    a: torch.Tensor,
    b: torch.Tensor,
    d: torch.Tensor,
    masked_m: torch.Tensor,
    expected_m: int | None = None,
    **more: Any,
) -> None:
    """As ``m_grouped_fp8_gemm_nt_masked`` for bf16 A [G, M, K] and B [G, N, K]."""
    _masked("m_grouped_bf16_gemm_nt_masked", (a, None), (b, None), d, masked_m, expected_m, more)


fp8_m_grouped_gemm_nt_masked = m_grouped_fp8_gemm_nt_masked
bf16_m_grouped_gemm_nt_masked = m_grouped_bf16_gemm_nt_masked


def _k_grouped(name: str) -> Callable[..., NoReturn]:
    def unavailable(*args: Any, **keywords: Any) -> NoReturn:
        raise EngineUnavailableError(f"{name}: GEMMs grouped along K are not part of this version of megamoe")

    unavailable.__name__ = name
    unavailable.__doc__ = "Weight gradients, grouped along K: raises EngineUnavailableError."
    return unavailable


k_grouped_fp8_gemm_nt_contiguous = _k_grouped("k_grouped_fp8_gemm_nt_contiguous")
k_grouped_fp8_gemm_tn_contiguous = _k_grouped("k_grouped_fp8_gemm_tn_contiguous")
k_grouped_bf16_gemm_tn_contiguous = _k_grouped("k_grouped_bf16_gemm_tn_contiguous")

_Operand = tuple[torch.Tensor, torch.Tensor | None]


def _gemm(  # noqa: PLR0917
    name: str, a: _Operand, b: _Operand, d: torch.Tensor, c: torch.Tensor | None, more: dict[str, Any]
) -> None:
    _check_keywords(name, more)
    _check_pairs(name, a, b)
    if c is not None:
        if d.dtype != torch.float32 or c.shape != d.shape or c.dtype != d.dtype:
            raise ValueError(
                f"{name}: c and d must be float32 of one shape, got {c.dtype} {tuple(c.shape)} and {d.dtype} "
                f"{tuple(d.shape)}"
            )
        if c.data_ptr() != d.data_ptr():
            d.copy_(c)
    with in_force():
        api.gemm(a[0], b[0], a_scale=_a_scale(a[1]), b_scale=_b_scale(b[1]), out=d, accumulate=c is not None)


def _contiguous(  # noqa: PLR0917
    name: str, a: _Operand, b: _Operand, d: torch.Tensor, m_indices: torch.Tensor | None, more: dict[str, Any]
) -> None:
    layout = more.pop("grouped_layout", None)
    if (m_indices is None) == (layout is None):
        raise ValueError(f"{name} needs m_indices, or grouped_layout, and not both")
    indices = layout if m_indices is None else m_indices
    assert indices is not None
    _check_keywords(name, more)
    _check_pairs(name, a, b)
    rows = a[0].shape[0]
    if indices.dtype != torch.int32 or tuple(indices.shape) != (rows,):
        raise ValueError(f"{name}: m_indices must be int32 [{rows}], got {indices.dtype} {tuple(indices.shape)}")
    # Padding counts to the group before it, so that groups follow one another; what that computes is overwritten.
    ascending = indices.clamp(min=0).cummax(0).values if rows else indices
    bounds = torch.arange(b[0].shape[0] + 1, dtype=torch.int32, device=indices.device)
    offsets = torch.searchsorted(ascending, bounds, out_int32=True)
    with in_force():
        api.grouped_gemm(a[0], b[0], offsets, a_scale=_a_scale(a[1]), b_scale=_b_scale(b[1]), out=d)
    padding = indices < 0
    d.masked_fill_(padding.unsqueeze(1), 0.0)
    d.masked_fill_(((indices != ascending) & ~padding).unsqueeze(1), torch.nan)


def _masked(  # noqa: PLR0917
    name: str,
    a: _Operand,
    b: _Operand,
    d: torch.Tensor,
    masked_m: torch.Tensor,
    expected_m: int | None,
    more: dict[str, Any],
) -> None:
    _check_keywords(name, more)
    _check_pairs(name, a, b)
    scale = a[1]
    if scale is not None:
        groups, rows, columns = a[0].shape
        expected = (groups, rows, num_blocks(columns))
        if scale.dtype != torch.float32 or tuple(scale.shape) != expected:
            raise ValueError(f"{name}: a's scale must be fp32 {expected}, got {scale.dtype} {tuple(scale.shape)}")
        scale = to_sm90(scale.reshape(groups * rows, -1))
    with in_force():
        api.masked_gemm(a[0], b[0], masked_m, a_scale=scale, b_scale=_b_scale(b[1]), out=d, expected_rows=expected_m)


def _check_keywords(name: str, more: dict[str, Any]) -> None:
    for keyword, value in more.items():
        if keyword in _HINTS:
            continue
        if keyword not in _ONLY:
            raise ValueError(f"{name} has no keyword {keyword!r} here (got {value!r})")
        given = tuple(value) if isinstance(value, list) else value
        if given not in _ONLY[keyword]:
            allowed = " or ".join(map(str, _ONLY[keyword]))
            raise ValueError(f"{name}: {keyword} must be {allowed}, got {value!r}")


def _check_pairs(name: str, a: Any, b: Any) -> None:
    for operand, what in ((a, "a"), (b, "b")):
        if not isinstance(operand, (tuple, list)) or len(operand) != 2:
            raise ValueError(f"{name}: {what} must be a pair (values, scale), got {type(operand).__name__}")


def _a_scale(scale: torch.Tensor | None) -> torch.Tensor | None:
    """With adjacent rows; other dtypes go on, to be refused in the GEMM's words."""
    if scale is None or scale.dtype != torch.float32 or scale.dim() != 2:
        return scale
    rows, blocks = scale.shape
    ready = scale.stride(0) == 1 and (blocks == 1 or scale.stride(1) == aligned_rows(rows))
    return scale if ready and scale.data_ptr() % 16 == 0 else to_sm90(scale)


def _b_scale(scale: torch.Tensor | None) -> torch.Tensor | None:
    return None if scale is None else scale.contiguous()


def _turned(operand: Fp8) -> Fp8:
    values, scale = operand
    return _turn(values), _turn(scale)


def _turn(x: torch.Tensor) -> torch.Tensor:
    if x.dtype == torch.float8_e4m3fn:  # few operations know e4m3; a byte is a byte
        return x.view(torch.uint8).transpose(-1, -2).contiguous().view(torch.float8_e4m3fn)
    return x.transpose(-1, -2).contiguous()
