"""The mega-kernel's twin for some tokens of one rank, and its chain of steps cut behind the first GEMM.

``layer`` is ``engines.reference.moe`` for chosen tokens, expert by expert, so that full-sized layers can be looked at
without every expert in fp32 at once. An e4m3 activation that lies between two e4m3 codes may fall either way: the
tensor core keeps about 13 bits inside a block of 128 k. Then y moves by what that code is worth, with no fault in it.
So the chain is cut: ``mega_activations`` reads the codes that the kernel itself made and holds them against the exact
activation, and ``Twin.y_from_mid`` is what y must be given those codes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megamoe.activation import Activation
from megamoe.engines.recipes import round_activation, round_result
from megamoe.problem import Problem

# Hopper's FP8 tensor cores keep about 13 bits of a running sum: terms lose what lies below that of the largest. So the
# sum of a k-block is off by some part of its terms' magnitudes, of which 2^-12 was seen; k-blocks are summed in fp32,
# and their errors have nothing to do with one another.
BOUNDS = {"fp32": (1e-5, 1e-4), "fast": (2e-4, 2e-3)}
"""d of y, whole and in each row, of engines that round where the reference does, by ``Problem.accumulate``."""
SUMS = 2.0**-11
"""How far a pre-activation may be off, in units of the root of the sum of squares of its k-blocks' magnitudes."""


@dataclass(frozen=True)
class Expert:
    """One expert as the GEMMs see it, fp32: w13 [w13_rows, H], w2 [H, I], b13 [w13_rows] and b2 [H] or None."""

    w13: torch.Tensor
    w2: torch.Tensor
    b13: torch.Tensor | None = None
    b2: torch.Tensor | None = None


@dataclass(frozen=True)
class Twin:
    """fp32 results for n tokens: ``y`` [n, H] before its last rounding, ``exact`` activations [n, K, I] (0 where there
    is no expert); of activations that were given, ``y_from_mid`` [n, H] what follows from them and ``slack`` [n, K, I]
    how far they may be off before they are cast, both else None."""

    y: torch.Tensor
    exact: torch.Tensor
    y_from_mid: torch.Tensor | None
    slack: torch.Tensor | None


def layer(
    x: torch.Tensor,
    slots: torch.Tensor,
    topk_weights: torch.Tensor,
    expert: Callable[[int], Expert],
    *,
    problem: Problem,
    slots_per_rank: int,
    mid: torch.Tensor | None = None,
    x_is_rounded: bool = False,
) -> Twin:
    """The layer for n tokens.

    Args:
        x: [n, H]; slots [n, K] int64 physical slots, -1 = none; topk_weights [n, K] fp32.
        expert: physical slot -> its weights, already rounded as the recipe rounds them; asked once for each.
        mid: fp32 [n, K, I], what the second GEMM of ``y_from_mid`` reads in place of the rounded activations.
        x_is_rounded: x is what the first GEMM reads, as the caller's own cast gave it.
    """
    n, K = slots.shape
    recipe, before = problem.recipe, problem.weights_applied == "before_down"
    x = x.float() if x_is_rounded else round_activation(x.float(), recipe)
    exact = x.new_zeros(n, K, problem.intermediate)
    slack = None if mid is None else torch.zeros_like(exact)
    routes = [x.new_zeros(n, K, problem.hidden) for _ in range(1 if mid is None else 2)]
    for p in sorted(set(slots.flatten().tolist()) - {-1}):
        w = expert(p)
        t, k = (slots == p).nonzero(as_tuple=True)
        weight = topk_weights[t, k, None]
        h13 = x[t] @ w.w13.T
        if w.b13 is not None:
            h13 = h13 + w.b13
        a = problem.activation(h13)
        if slack is not None:
            moved = _slack(problem.activation, h13, sums_error(x[t], w.w13))
            slack[t, k] = moved * weight.abs() if before else moved
        exact[t, k] = a = a * weight if before else a
        for result, operand in zip(
            routes, [round_activation(a, recipe)] + ([] if mid is None else [mid[t, k]]), strict=True
        ):
            y = operand @ w.w2.T
            if w.b2 is not None:
                y = y + (weight * w.b2 if before else w.b2)
            result[t, k] = y if before else y * weight
    owner = torch.where(slots >= 0, slots // slots_per_rank, -1)
    ys = [_combine(round_result(result, recipe), owner, problem) for result in routes]
    return Twin(ys[0], exact, None if mid is None else ys[1], slack)


def sums_error(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """How far x [n, H] @ w [m, H]^T may be off on tensor cores that see e4m3 operands, [n, m]; see ``SUMS``."""
    mine, theirs = (blocks_of_128(one.abs()).transpose(0, 1) for one in (x, w))
    return SUMS * (mine @ theirs.mT).square().sum(0).sqrt()


def blocks_of_128(values: torch.Tensor) -> torch.Tensor:
    """[m, n] -> [m, ceil(n / 128), 128], with zeros behind the last."""
    return F.pad(values, (0, -values.shape[1] % 128)).reshape(len(values), -1, 128)


def _slack(activation: Activation, h13: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    """How far the activation of h13 [n, .] moves, at most, when each number moves by ``error``: at the corners."""
    a, parts = activation(h13), 2 if activation.gated else 1
    moved = torch.zeros_like(a)
    for signs in itertools.product((-1.0, 1.0), repeat=parts):
        corner = h13 + error * torch.tensor(signs, device=h13.device).repeat_interleave(h13.shape[1] // parts)
        moved = moved.maximum((activation(corner) - a).abs())
    return moved


def _combine(routes: torch.Tensor, owner: torch.Tensor, problem: Problem) -> torch.Tensor:
    """[n, K, H] -> [n, H]: owners ascending, within an owner k ascending; an owner's sum is rounded as it crosses."""
    total = routes.new_zeros(len(routes), problem.hidden)
    for r in range(problem.world_size):
        partial = torch.zeros_like(total)
        for k in range(routes.shape[1]):
            partial = partial + torch.where((owner[:, k] == r)[:, None], routes[:, k], 0.0)
        total = total + round_result(partial, problem.recipe)
    return total
