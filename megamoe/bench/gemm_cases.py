"""What ``megamoe bench gemm`` multiplies: cases, their random data, and the fp32 product that results are held to."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch

from megamoe.kernels.gemm import reference
from megamoe.kernels.gemm.checks import Layout
from megamoe.kernels.gemm.config import Grouping
from megamoe.kernels.quant import casts
from megamoe.kernels.quant.reference import dequantise_1x128, dequantise_128x128, dequantise_row, transposed_blocks

Recipe = Literal["bf16", "fp8_block", "fp8_row"]
RECIPES: tuple[Recipe, ...] = ("bf16", "fp8_block", "fp8_row")
GROUPINGS: tuple[Grouping, ...] = ("dense", "contiguous", "masked", "k")
LAYOUTS: tuple[Layout, ...] = ("nt", "nn", "tn", "tt")
DENSE_M = (64, 128, 4096, 8192)
DENSE_NK = (
    (2112, 7168),
    (576, 7168),
    (24576, 1536),
    (32768, 512),
    (7168, 16384),
    (4096, 7168),
    (7168, 2048),
    (6144, 7168),
    (7168, 3072),
    (8192, 8192),
)
TRAINING_M = 1024  # rows of a dense case from which the layouts besides "nt" are measured: they serve training
Spec = tuple[int, int, int, int]  # groups, mean rows of one, n, k
CONTIGUOUS: tuple[Spec, ...] = (
    (4, 8192, 4096, 7168),
    (4, 8192, 7168, 2048),
    (8, 4096, 4096, 7168),
    (8, 4096, 7168, 2048),
    (8, 4096, 6144, 7168),
    (8, 4096, 7168, 3072),
    (32, 256, 4096, 4096),
    (32, 256, 4096, 2048),
    (32, 1536, 4096, 4096),
    (32, 1536, 4096, 2048),
)
MASKED: tuple[Spec, ...] = (
    # Decode: a few rows an expert, the weights are all there is to read (470 MB and more in FP8).
    *((32, rows, n, k) for rows in (1, 4, 16) for n, k in ((4096, 4096), (7168, 2048))),
    *(
        (groups, rows, n, k)
        for groups, rows in ((32, 20), (32, 192), (6, 1024))
        for n, k in ((4096, 4096), (4096, 2048), (6144, 7168), (7168, 3072))
    ),
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One product. ``rows``: rows of A when dense, else the mean of a group; groups get 0.7 to 1.3 times that.

    Grouping "k" is the gradient of each group's weight [n, k], fp32 from e4m3 and bf16 from bf16 (as torch gives it):
    rows of [m, n], transposed, by the same rows of [m, k].
    """

    recipe: Recipe
    grouping: Grouping
    groups: int
    rows: int
    n: int
    k: int
    layout: Layout = "nt"  # how the operands are stored; "nt" also where K is grouped

    @property
    def m(self) -> int:
        """Valid rows of all groups."""
        return sum(self.counts)

    @property
    def out(self) -> torch.dtype:
        """dtype of D."""
        return torch.float32 if self.grouping == "k" and self.recipe != "bf16" else torch.bfloat16

    @property
    def num_bytes(self) -> int:
        """Valid rows, weights and results, each read or written once."""
        size, weights = 2 if self.recipe == "bf16" else 1, self.groups * self.n * self.k
        if self.grouping == "k":
            return size * self.m * (self.n + self.k) + self.out.itemsize * weights
        return size * (self.m * self.k + weights) + self.out.itemsize * self.m * self.n

    @property
    def counts(self) -> list[int]:
        """Rows of each group, the same on every run; at least 1."""
        if self.grouping == "dense":
            return [self.rows]
        draw = random.Random(self.groups * 1_000_003 + self.rows)
        return [max(1, int(self.rows * draw.uniform(0.7, 1.3))) for _ in range(self.groups)]

    @property
    def most(self) -> int:
        """Rows that a masked group has room for."""
        return 4096 if self.rows > 512 else 512

    @property
    def expected(self) -> int:
        """The guess at a masked group's rows that every contender is told."""
        return max(1, int(self.rows * 1.2))

    @property
    def label(self) -> str:
        """Short name for plots and messages."""
        groups = "" if self.grouping == "dense" else f"{self.groups} x "
        layout = "" if self.layout == "nt" else f" {self.layout}"
        return f"{self.recipe} {self.grouping}{layout} {groups}{self.rows}, {self.n} x {self.k}"


def cases(
    recipes: Sequence[Recipe],
    groupings: Sequence[Grouping],
    *,
    ms: Sequence[int] = DENSE_M,
    shapes: Sequence[tuple[int, int]] = DENSE_NK,
    specs: Sequence[Spec] | None = None,
    layouts: Sequence[Layout] = ("nt",),
) -> Iterator[Case]:
    """All cases in order; ``specs`` replaces the usual ones of the grouped forms.

    ``layouts`` besides "nt" are those of bf16: all where dense and of many rows, "nn" where rows are grouped.
    """
    for grouping in groupings:
        for recipe in recipes:
            if grouping == "k" and recipe == "fp8_row":
                continue  # scales along K are per 1x128
            for layout in layouts:
                if layout != "nt" and (recipe != "bf16" or grouping not in ("dense", "contiguous")):
                    continue
                if grouping == "dense":
                    for m in ms if layout == "nt" else [m for m in ms if m >= TRAINING_M]:
                        for n, k in shapes:
                            yield Case(recipe=recipe, grouping=grouping, groups=1, rows=m, n=n, k=k, layout=layout)
                elif grouping != "contiguous" or layout in ("nt", "nn"):
                    for groups, rows, n, k in specs or (MASKED if grouping == "masked" else CONTIGUOUS):
                        yield Case(recipe=recipe, grouping=grouping, groups=groups, rows=rows, n=n, k=k, layout=layout)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Operands of a case: valid rows alone, group after group; scales as the casts' layout ``row`` has them.

    Views [valid, K] and [N, K] or [G, N, K] of what the case's layout stores. Grouping "k": rows [valid, N] and [valid,
    K] in bf16; in FP8 their transposed copies, groups padded to 128.
    """

    case: Case
    a: torch.Tensor
    a_scale: torch.Tensor | None
    b: torch.Tensor
    b_scale: torch.Tensor | None

    @property
    def offsets(self) -> torch.Tensor:
        """int32 [G + 1]: where groups start in ``a``."""
        return torch.tensor([0, *accumulate(self.case.counts)], dtype=torch.int32, device=self.a.device)

    @property
    def bounds(self) -> torch.Tensor:
        """int32 [G + 1]: where groups start along a grouped K."""
        return self.offsets if self.a_scale is None else (transposed_blocks(self.offsets) * 128).int()

    def places(self, starts: Sequence[int]) -> torch.Tensor:
        """int64 [valid]: where each row of ``a`` goes if group g starts at ``starts[g]``."""
        pieces = [torch.arange(start, start + c) for start, c in zip(starts, self.case.counts, strict=True)]
        return torch.cat(pieces).to(self.a.device)


def make(case: Case, device: str) -> Data:
    """Dense Gaussian operands in the case's recipe; group by group, so that memory holds little besides."""
    generator = torch.Generator(device).manual_seed(0)
    options = {"generator": generator, "device": device, "dtype": torch.bfloat16}
    if case.grouping == "k":
        return _make_by_k(case, *(torch.randn(case.m, width, **options) for width in (case.n, case.k)))  # type: ignore[call-overload]
    a, a_scale = _cast(torch.randn(sum(case.counts), case.k, **options), case.recipe, weight=False)  # type: ignore[call-overload]
    parts = [
        _cast(torch.randn(case.n, case.k, **options), case.recipe, weight=True)  # type: ignore[call-overload]
        for _ in range(case.groups)
    ]
    if case.layout[0] == "t":
        a = a.t().contiguous().t()
    if case.grouping == "dense":
        b, b_scale = parts[0]
        b = b.t().contiguous().t() if case.layout[1] == "n" else b
        return Data(case=case, a=a, a_scale=a_scale, b=b, b_scale=b_scale)
    b = _bytes_apart([values for values, _ in parts])
    b = b.transpose(1, 2).contiguous().transpose(1, 2) if case.layout[1] == "n" else b
    scales = [scale for _, scale in parts if scale is not None]
    return Data(case=case, a=a, a_scale=a_scale, b=b, b_scale=torch.stack(scales) if scales else None)


def _make_by_k(case: Case, a: torch.Tensor, b: torch.Tensor) -> Data:
    data = Data(case=case, a=a, a_scale=None, b=b, b_scale=None)
    if case.recipe == "bf16":
        return data
    left, right = (casts.cast_1x128_both(x, offsets=data.offsets) for x in (a, b))
    return Data(case=case, a=left.q_t, a_scale=left.scale_t, b=right.q_t, b_scale=right.scale_t)


def _cast(x: torch.Tensor, recipe: Recipe, *, weight: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    if recipe == "bf16":
        return x, None
    if recipe == "fp8_row":
        return casts.cast_row(x)
    return casts.cast_128x128(x) if weight else casts.cast_1x128(x)


def _bytes_apart(values: list[torch.Tensor]) -> torch.Tensor:
    dtype = values[0].dtype
    return torch.stack([v.view(torch.uint8) for v in values]).view(dtype)


def spread(packed: torch.Tensor, places: torch.Tensor, total: int) -> torch.Tensor:
    """[total, ...] with row i of ``packed`` at ``places[i]`` and zeros elsewhere."""
    raw = packed.view(torch.uint8) if packed.element_size() == 1 else packed
    out = torch.zeros(total, *raw.shape[1:], dtype=raw.dtype, device=raw.device)
    out[places] = raw
    return out.view(packed.dtype)


def product(data: Data) -> torch.Tensor:
    """fp32 [valid, N], or [G, N, K] where K is grouped: of the dequantised operands; the caller keeps TF32 off."""
    if data.case.grouping == "k":
        layout = "tn" if data.a_scale is None else "nt"
        return reference.k_grouped_gemm(
            data.a, data.b, data.bounds, layout=layout, a_scale=data.a_scale, b_scale=data.b_scale
        )
    out = torch.empty(data.a.shape[0], data.case.n, dtype=torch.float32, device=data.a.device)
    start = 0
    for g, count in enumerate(data.case.counts):
        end = start + count
        scale = None if data.a_scale is None else data.a_scale[start:end]
        grouped = data.b.dim() == 3
        b_scale = data.b_scale if data.b_scale is None or not grouped else data.b_scale[g]
        weight = _values(data.b[g] if grouped else data.b, b_scale, weight=True)
        torch.mm(_values(data.a[start:end], scale, weight=False), weight.t(), out=out[start:end])
        start = end
    return out


def _values(x: torch.Tensor, scale: torch.Tensor | None, *, weight: bool) -> torch.Tensor:
    if scale is None:
        return x.float()
    if scale.dim() == 1:
        return dequantise_row(x, scale)
    return dequantise_128x128(x, scale) if weight else dequantise_1x128(x, scale)
