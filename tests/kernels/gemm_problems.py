"""Random GEMM problems that the CPU and GPU tests of the GEMMs share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megamoe.kernels.quant.reference import cast_1x128, cast_128x128, cast_row
from megamoe.testing.numerics import assert_close

RECIPES = ("bf16", "fp8_block", "fp8_row")
POISON = float("nan")
# bf16 rounds each element to 2^-9 of it: d of one rounding is about 1.3e-6. fp32 outputs leave only the order of sums.
WHOLE, ROW = 1e-5, 1e-4


@dataclass(frozen=True)
class Operand:
    """Values as the GEMM takes them, and their scales (None for bf16)."""

    values: torch.Tensor
    scale: torch.Tensor | None


def left(rows: int, k: int, recipe: str, generator: torch.Generator, *, device: str = "cpu") -> Operand:
    """A [rows, k], dense Gaussian, each row at its own magnitude."""
    x = torch.randn(rows, k, generator=generator) * torch.rand(rows, 1, generator=generator).add(0.1)
    x = x.bfloat16().to(device)
    if recipe == "bf16":
        return Operand(x, None)
    q, scale = cast_row(x) if recipe == "fp8_row" else cast_1x128(x, layout="sm90")
    return Operand(q.contiguous(), scale)


def right(groups: int, n: int, k: int, recipe: str, generator: torch.Generator, *, device: str = "cpu") -> Operand:
    """B [groups, n, k], or [n, k] if groups is 0."""
    x = torch.randn(max(groups, 1), n, k, generator=generator).bfloat16().to(device)
    x = x if groups else x[0]
    if recipe == "bf16":
        return Operand(x, None)
    q, scale = cast_row(x) if recipe == "fp8_row" else cast_128x128(x)
    return Operand(q.contiguous(), scale)


def group_rows(groups: int, total: int, generator: torch.Generator) -> list[int]:
    """Rows of each group: random, some 0, at most ``total`` together."""
    share = torch.rand(groups, generator=generator).pow(2)
    share[torch.rand(groups, generator=generator) < 0.25] = 0
    return [int(r) for r in (share / share.sum().clamp(min=1e-9) * total)]


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, POISON, dtype=dtype, device="cuda")


def check(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """d over all and in every row, and no element beyond what rounding of its row can explain."""
    assert_close(actual, expected, whole=WHOLE, row=ROW, what=what)
    if actual.numel() == 0:
        return
    slack = expected.float().norm(dim=-1, keepdim=True) / math.sqrt(max(1, expected.shape[-1])) * 2**-7
    worst = ((actual.float() - expected.float()).abs() - expected.float().abs() * 2**-7 - slack).max()
    assert worst <= 0, f"{what}: an element lies {float(worst):.3e} beyond its bound"
