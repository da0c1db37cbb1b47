"""Where the time of a traced call went: shares of each role, and how much communication math hides.

docs/mega-kernel.md defines the figures; all are means over CTAs, of one rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from megamoe.mega.trace import Moment, Timeline, Track, What

MATH_TRACKS = (Track.MATH, Track.MATH_SECOND)
MATH = (What.GEMM_1, What.EPILOGUE_1, What.GEMM_2, What.EPILOGUE_2)
COMMUNICATION = (What.PUSH, What.AWAIT_HEADERS, What.AWAIT_ROWS, What.AWAIT_RESULTS, What.COMBINE)
"""What serves rows on their way: dispatch push, waiting for other ranks and their rows, combine."""
REMOTE = (What.PUSH, What.AWAIT_HEADERS, What.AWAIT_COPIES, What.AWAIT_RESULTS)
"""What math can only wait for while rows are under way. Not AWAIT_ROWS: copiers wait far ahead of need."""
AWAITED = (What.AWAIT_HEADERS, What.AWAIT_COPIES, What.AWAIT_RESULTS)
"""What comes from other ranks, or out of what they have sent."""


@dataclass(frozen=True)
class Shares:
    """One rank's call. ``roles``: track -> what -> share of a CTA's time from its first moment to its last.

    hidden: share of the time of ``COMMUNICATION`` in which a math warpgroup of the same CTA computes; None without
    any. exposed_us: time in which none computes and something of ``REMOTE`` is under way. awaited_us: time in which
    none computes, or pushes rows, and something of ``AWAITED`` is under way; results from when all CTAs of this rank
    have multiplied, for before they are awaited from these. duration_us: first CTA's begin to the last one's end.
    dropped: events that had no room.
    """

    roles: dict[Track, dict[What, float]]
    hidden: float | None
    exposed_us: float
    awaited_us: float
    duration_us: float
    dropped: int


def shares(timeline: Timeline) -> Shares:
    """The figures of one rank."""
    t, moments = timeline, timeline.moments
    begin, end = timeline.span_ns
    total = int((moments[:, Moment.END] - moments[:, Moment.START]).sum())
    spent = t.end_ns - t.begin_ns
    roles: dict[Track, dict[What, float]] = {}
    for track in Track:
        for what in What:
            at = (t.track == track) & (t.what == what)
            if bool(at.any()):
                roles.setdefault(track, {})[what] = int(spent[at].sum()) / max(total, 1)
    math = _among(t.what, MATH) & _among(t.track, MATH_TRACKS)
    communicates, both = _together(t, _among(t.what, COMMUNICATION), math)
    waits, hidden_waits = _together(t, _among(t.what, REMOTE), math)
    pushes = (t.what == What.PUSH) & (t.track == Track.MATH)
    awaited, busy = _together(_without_own_results(t), _among(t.what, AWAITED), math | pushes)
    return Shares(
        roles=roles,
        hidden=both / communicates if communicates else None,
        exposed_us=(waits - hidden_waits) / timeline.num_ctas / 1e3,
        awaited_us=(awaited - busy) / timeline.num_ctas / 1e3,
        duration_us=(end - begin) / 1e3,
        dropped=int(t.dropped.sum()),
    )


def _without_own_results(t: Timeline) -> Timeline:
    """AWAIT_RESULTS from when the rank's last CTA has multiplied on."""
    begin = t.begin_ns.clone()
    results = t.what == What.AWAIT_RESULTS
    begin[results] = begin[results].clamp(min=int(t.moments[:, Moment.MATH_DONE].max()))
    return replace(t, begin_ns=begin, end_ns=t.end_ns.maximum(begin))


def _among(column: torch.Tensor, members: tuple[int, ...]) -> torch.Tensor:
    return torch.isin(column, torch.tensor(members))


def _together(t: Timeline, some: torch.Tensor, other: torch.Tensor) -> tuple[int, int]:
    """Nanoseconds, summed over CTAs, in which an event of ``some`` runs, and those in which one of ``other`` does too.

    ``some`` and ``other`` are masks of events. Every begin and end of one is a step; between two steps of a CTA
    nothing changes.
    """
    changes = []
    for mask, column in ((some, 0), (other, 1)):
        for times, step in ((t.begin_ns[mask], 1), (t.end_ns[mask], -1)):
            change = torch.zeros(len(times), 4, dtype=torch.int64)
            change[:, 0], change[:, 1], change[:, 2 + column] = t.cta[mask], times, step
            changes.append(change)
    steps = torch.cat(changes)
    if not len(steps):
        return 0, 0
    steps = steps[torch.argsort(steps[:, 1])]
    steps = steps[torch.argsort(steps[:, 0], stable=True)]
    running = steps[:, 2:].cumsum(0)[:-1] > 0  # all of a CTA's events have ended at its last step
    length = torch.where(steps[1:, 0] == steps[:-1, 0], steps[1:, 1] - steps[:-1, 1], 0)
    return int(length[running[:, 0]].sum()), int(length[running.all(1)].sum())
