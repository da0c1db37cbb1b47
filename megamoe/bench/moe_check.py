"""Whether an engine's y is right, by the reference's arithmetic on some tokens of every rank, before it is timed."""

from __future__ import annotations

import torch

from megamoe.bench.moe_data import sample
from megamoe.bench.moe_sessions import Session
from megamoe.testing.mega_activations import check_activations, check_fast
from megamoe.testing.mega_twin import layer
from megamoe.testing.numerics import assert_close, difference

SAMPLE = 16  # tokens of a rank; each brings K experts that have to be made


def check(session: Session, tokens: int, ys: list[torch.Tensor], *, count: int = SAMPLE) -> float:
    """d(y, reference) over ``count`` tokens of each of the ranks here, of which there are ``tokens``.

    Every rank's call is complete and none starts another before all have come back from here. For quantised recipes
    the kernel's own activations are held against the exact ones, and y against what follows from them (mega_twin).

    Raises:
        AssertionError: y is wrong; says where.
    """
    problem, (whole, row) = session.problem, session.bounds
    worst = 0.0
    for rank, given, y in zip(session.ranks, session.inputs, ys, strict=True):
        what = f"y of rank {rank}, T = {tokens}"
        assert y.shape == (tokens, problem.hidden), f"{what}: shape {tuple(y.shape)}"
        assert bool(y.isfinite().all()), f"{what}: not finite, first in row {int((~y.isfinite()).nonzero()[0][0])}"
        at = sample(tokens, count).to(y.device)
        x, slots, weights = given.x[at], given.topk_idx[at], given.topk_weights[at]
        found = session.activations(rank, at, slots)
        cut = found if found is not None and found.scales is not None else None
        mid = None if cut is None else cut.values
        twin = layer(
            x, slots, weights, session.experts.dense, problem=problem, slots_per_rank=session.slots, mid=mid
        )  # fmt: skip
        worst = max(worst, difference(y[at], twin.y))
        if cut is None or twin.y_from_mid is None or twin.slack is None:
            assert_close(y[at], twin.y, whole=whole, row=row, what=what)
            continue
        if problem.accumulate == "fast":
            check_fast(cut, twin.exact, slots)
        else:
            check_activations(cut, twin.exact, slots, twin.slack)
        assert_close(y[at], twin.y_from_mid, whole=whole, row=row, what=f"{what}, from the kernel's own activations")
    return worst
