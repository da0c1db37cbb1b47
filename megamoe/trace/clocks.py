"""One clock for all ranks: each GPU counts nanoseconds by itself, and a call's own flags say how far they are apart.

A rank has every rank's header only after each of them has sent it, and every rank's results likewise. So the first
moment at which rank a is told, less the last one at which rank b tells, bounds how much later a's clock may stand;
the same the other way round bounds it from below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megamoe.mega.trace import Moment, Timeline

# (a moment behind which a CTA has told its peers, a moment at which it has heard from all of them)
_FLAGS = ((Moment.SORTED, Moment.TOLD_PLAN), (Moment.MATH_DONE, Moment.RESULTS_IN))


@dataclass(frozen=True)
class Aligned:
    """Timelines on rank 0's clock; no two are more than ``within_ns`` out of place against rank 0's."""

    timelines: list[Timeline]
    within_ns: int


def align(timelines: Sequence[Timeline], *, one_device: bool) -> Aligned:
    """Timelines of all ranks of one call, by rank; those of one GPU have one clock and stay as they are."""
    if one_device or len(timelines) == 1:
        return Aligned(list(timelines), 0)
    # ahead[a, b]: at most so much does a's clock stand before b's; bounds add up along chains of ranks.
    ahead = torch.full((len(timelines), len(timelines)), 2**62, dtype=torch.int64)
    for tells, hears in _FLAGS:
        told = torch.stack([t.moments[:, tells].max() for t in timelines])
        heard = torch.stack([t.moments[:, hears].min() for t in timelines])
        ahead = torch.minimum(ahead, heard[:, None] - told[None, :])
    ahead.fill_diagonal_(0)
    for via in range(len(timelines)):
        ahead = torch.minimum(ahead, ahead[:, via, None] + ahead[None, via, :])
    shift = (ahead[:, 0] - ahead[0, :]) // 2
    within = (ahead[:, 0] + ahead[0, :]).abs() // 2
    return Aligned([t.shifted(-int(s)) for t, s in zip(timelines, shift, strict=True)], int(within.max()))
