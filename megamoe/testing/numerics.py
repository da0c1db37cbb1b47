"""How far two tensors are apart, and a check that points at the worst spot."""

from __future__ import annotations

import torch


def difference(x: torch.Tensor, y: torch.Tensor) -> float:
    """d(x, y) = 1 - 2<x, y> / (<x, x> + <y, y>), in float64; 0 for equal tensors and for two all-zero ones."""
    x64, y64 = x.detach().double().flatten(), y.detach().double().flatten()
    denominator = float(x64 @ x64 + y64 @ y64)
    if denominator == 0:
        return 0.0
    # <x-y, x-y> / denominator is the same number without the cancellation of 1 - 2<x,y>/denominator.
    return float((x64 - y64) @ (x64 - y64)) / denominator


def row_difference(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``difference`` of each row of two [N, C] tensors, float64 [N]."""
    x64, y64 = x.detach().double(), y.detach().double()
    denominator = (x64 * x64 + y64 * y64).sum(1)
    numerator = ((x64 - y64) ** 2).sum(1)
    return torch.where(denominator == 0, numerator, numerator / denominator.clamp(min=1e-300))


def assert_close(
    actual: torch.Tensor, expected: torch.Tensor, *, whole: float, row: float, what: str = "result"
) -> None:
    """Fail unless d <= ``whole`` over the tensor, <= ``row`` in every row, and NaN, Inf, -Inf stand where expected.

    Raises:
        AssertionError: with shape, the worst row and the worst element and both values.
    """
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    finite = expected.isfinite()
    # NaN, +Inf and -Inf must stand where they are expected, each as itself.
    stray = _stray(actual, expected)
    if bool(stray.any()):
        at = stray.nonzero()[0].tolist()
        raise AssertionError(
            f"{what}: finite and non-finite elements differ, first at {at}: {actual[tuple(at)]} "
            f"against {expected[tuple(at)]}"
        )
    a = actual.detach().double().masked_fill(~finite, 0.0)
    e = expected.detach().double().masked_fill(~finite, 0.0)
    if a.numel() == 0:
        return
    d_whole = difference(a, e)
    rows = row_difference(a.reshape(-1, a.shape[-1]), e.reshape(-1, a.shape[-1]))
    if d_whole <= whole and float(rows.max()) <= row:
        return
    flat = int((a - e).abs().argmax())
    at = list(torch.unravel_index(torch.tensor(flat), a.shape))
    worst = int(rows.argmax())
    raise AssertionError(
        f"{what} {tuple(actual.shape)} {actual.dtype}: d = {d_whole:.3e} (bound {whole:.0e}), "
        f"worst row {worst} d = {float(rows[worst]):.3e} (bound {row:.0e}), "
        f"worst element {[int(i) for i in at]}: {float(a.flatten()[flat]):.6g}, expected {float(e.flatten()[flat]):.6g}"
    )


def _stray(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Bool mask of elements where NaN, +Inf, -Inf or a finite number meets something of another kind."""
    a, e = actual.detach().double(), expected.detach().double()
    return (a.isnan() != e.isnan()) | (a.isposinf() != e.isposinf()) | (a.isneginf() != e.isneginf())
