"""Activations that a mega-kernel made, from its ranks' workspaces, held against the exact ones of ``mega_twin``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megamoe.kernels.quant import reference as casts
from megamoe.kernels.quant.formats import to_e4m3
from megamoe.mega.config import BLOCK_ROWS
from megamoe.mega.workspace import Workspace
from megamoe.symm_mem.buffer import RankViews
from megamoe.testing.mega_twin import BOUNDS, blocks_of_128
from megamoe.testing.numerics import difference

ROUNDING = 2.0**-15
"""How far a scale may be off by fp32 arithmetic and by approximated exponentials, in units of itself."""
FLIPS = 0.04
"""Share of e4m3 codes of activations that may differ from the reference's: Gaussian pre-activations off by 2^-12 of
their size, which alone gives y a d of 1e-5, flip 2.2% of those of their SwiGLU."""
_FEW = 4  # codes that may differ beyond that share, where there are hardly any


@dataclass(frozen=True)
class Pool:
    """Where an owner put the routes it got in the last call: source rank, token * K + k there, row of the pool."""

    source: torch.Tensor
    slot: torch.Tensor
    row: torch.Tensor

    @staticmethod
    def of(views: RankViews, workspace: Workspace) -> Pool:
        """From the fields of the owner's workspace; the place of each row is that of mega/schedule.cuh."""
        offsets = views["offsets"].long()  # [R, S + 1]
        counts = offsets.diff(dim=1)
        blocks = torch.ceil(counts.sum(0) / BLOCK_ROWS).long()
        first = (blocks.cumsum(0) - blocks) * BLOCK_ROWS  # an expert's first row
        before = counts.cumsum(0) - counts  # [R, S] rows of sources before this one
        routes = views["routes"].view(torch.int32).view(len(offsets), -1, 4)
        sources, slots, rows = [], [], []
        for s in range(len(offsets)):
            i = torch.arange(int(offsets[s, -1]), device=offsets.device)
            e = torch.searchsorted(offsets[s, 1:].contiguous(), i, right=True)
            rows.append(first[e] + before[s, e] + i - offsets[s, e])
            slots.append(routes[s, : len(i), 1].long())
            sources.append(torch.full_like(i, s))
        return Pool(torch.cat(sources), torch.cat(slots), torch.cat(rows))


@dataclass(frozen=True)
class Activations:
    """What the kernel's second GEMM read: ``codes`` fp32 [n, K, I] and ``scales`` fp32 [n, K, ceil(I / 128)], with
    ``by_row`` [n, K, 1]."""

    codes: torch.Tensor
    scales: torch.Tensor | None  # None for bf16
    by_row: bool = False

    @property
    def values(self) -> torch.Tensor:
        """fp32 [n, K, I]."""
        if self.scales is None:
            return self.codes
        return self.codes * self.spread(self.scales)

    def spread(self, scales: torch.Tensor) -> torch.Tensor:
        """[..., scales of a row] -> [..., I]."""
        width = self.codes.shape[-1]
        return scales.repeat_interleave(width if self.by_row else 128, -1)[..., :width]

    def largest(self, values: torch.Tensor) -> torch.Tensor:
        """[m, I] -> [m, .]: the largest of those that share a scale."""
        if self.by_row:
            return values.amax(-1, keepdim=True)
        return blocks_of_128(values).amax(-1)

    def stored(self, values: torch.Tensor) -> torch.Tensor:
        """fp32 numbers as they are when their scale is found: with ``by_row`` they were stored in bf16 before."""
        return values.bfloat16().float() if self.by_row else values

    def cast(self, exact: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 [m, I] -> (e4m3, scales [m, .]), as the reference casts them."""
        if not self.by_row:
            return casts.cast_1x128(exact)
        q, scale = casts.cast_row(self.stored(exact))
        return q, scale[:, None]


def kernel_activations(
    views: Sequence[RankViews], workspace: Workspace, source: int, tokens: torch.Tensor, slots: torch.Tensor
) -> Activations:
    """Activations of the last call for ``tokens`` [n] of rank ``source``, whose physical slots are ``slots`` [n, K].

    ``views``: every rank's fields, by rank. No rank may have started another call.
    """
    p, (n, K) = workspace.problem, slots.shape
    config, device = workspace.config, slots.device
    # fp8_row: the first of a row's words holds its scale, the others what it was found from.
    per_row = 1 if config.row_scaled else workspace.mid_blocks
    codes = torch.zeros(n, K, p.intermediate, device=device)
    scales = torch.ones(n, K, per_row, device=device) if config.element_bytes == 1 else None
    for owner, fields in enumerate(views):
        t, k = (torch.where(slots >= 0, slots // workspace.slots, -1) == owner).nonzero(as_tuple=True)
        if not len(t):
            continue
        pool = Pool.of(fields, workspace)
        mine = pool.source == source
        row_of = torch.full((max(p.max_tokens, 1) * K,), -1, device=device)
        row_of[pool.slot[mine].to(device)] = pool.row[mine].to(device)
        rows = row_of[tokens[t] * K + k].to(fields["mid"].device)
        assert bool((rows >= 0).all()), f"rank {owner} was never told of a route of rank {source}"
        raw = fields["mid"].view(torch.uint8)[rows, : p.intermediate * config.element_bytes]
        codes[t, k] = raw.view(config.operand).float().to(device)
        if scales is not None:
            scales[t, k] = fields["mid_scales"][:per_row, rows].T.to(device)
    return Activations(codes, scales, config.row_scaled)


def check_fast(got: Activations, exact: torch.Tensor, slots: torch.Tensor) -> None:
    """Hold activations of ``accumulate="fast"``, whose sums and so codes are their own, against the exact ones
    [n, K, I]: no further from them than what the reference rounds them to, but for the bound of ``fast``.

    Raises:
        AssertionError: they are.
    """
    at = slots >= 0
    if not bool(at.any()):
        return
    q, scale = got.cast(exact[at])
    ours = difference(got.values[at], exact[at])
    most = difference(q.float() * got.spread(scale), exact[at]) + BOUNDS["fast"][0]
    assert ours <= most, f"activations: d = {ours:.3e} to the exact ones, which may be {most:.3e}"


def check_activations(got: Activations, exact: torch.Tensor, slots: torch.Tensor, slack: torch.Tensor) -> float:
    """Hold e4m3 codes against the exact activations [n, K, I], which may be off by ``slack`` (``Twin``) before they are
    cast; returns the share that differs from the reference's.

    Raises:
        AssertionError: a scale off by more than what the block's largest slack makes of it (and ``ROUNDING``), a value
            further from the exact one than one step of e4m3 there and that, or more than ``FLIPS`` of the codes unlike
            the reference's.
    """
    assert got.scales is not None, "only codes of e4m3 are checked one by one"
    at = slots >= 0
    codes, scales, a = got.codes[at], got.scales[at], exact[at]
    if a.numel() == 0:
        return 0.0
    _, want_scale = got.cast(a)
    amax, moved = got.largest(a.abs()), got.largest(slack[at])
    up, down = got.stored(amax + moved), got.stored((amax - moved).clamp(min=0))
    leeway = (up - got.stored(amax)).maximum(got.stored(amax) - down) / 448 + ROUNDING * want_scale
    off = (scales - want_scale).abs()
    worst = int((off / leeway).argmax())
    assert bool((off <= leeway).all()), (
        f"scale of activations off by {float((off / want_scale).flatten()[worst]):.2e} of itself, "
        f"{float((off / leeway).flatten()[worst]):.2f} times what is allowed"
    )
    wide = got.spread(scales)
    # Steps of e4m3: 2^(exponent - 3), and 2^-9 below 2^-6.
    exponent = (a / wide).abs().clamp(min=2.0**-6, max=448).log2().floor()
    allowed = torch.exp2(exponent - 3) * wide + slack[at] + 448 * got.spread(leeway)
    error = (codes * wide - a).abs()
    assert bool((error <= allowed).all()), (
        f"activation off by {float((error / allowed).nan_to_num(nan=torch.inf).max()):.2f} times what is allowed"
    )
    # At the kernel's own scale: one that is a step of bf16 off, as it may be, moves many codes.
    want_q = to_e4m3(got.stored(a) * got.spread(scales.reciprocal()))
    flips = int((codes != want_q.float()).sum())
    assert flips <= FLIPS * codes.numel() + _FEW, (
        f"{flips} of {codes.numel()} codes of activations differ from the reference's (bound {FLIPS:.0%} and {_FEW})"
    )
    return flips / codes.numel()
