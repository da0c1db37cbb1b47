"""The figure of a traced call: some CTAs over time, where each role's time went, what communication math hides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from megamoe.mega.trace import Timeline, Track, What
from megamoe.trace.shares import Shares

_WAITS = [what for what in What if what.name.startswith("AWAIT")]
# Work in strong colours, waiting in pale ones.
_COLOURS = {
    **{what: matplotlib.colormaps["tab20"](i) for i, what in enumerate(w for w in What if w not in _WAITS)},
    **{what: matplotlib.colormaps["Set3"](i) for i, what in enumerate(_WAITS)},
}


def save(
    path: Path,
    timelines: Sequence[Timeline],
    figures: Sequence[Shares],
    shown: Sequence[tuple[int, int]],
    *,
    title: str,
    said: str,
) -> None:
    """Draw into ``path`` (PNG) the (rank, CTA) pairs ``shown`` over time and shares of roles; ``said`` stands above.

    Raises:
        ValueError: it cannot be written.
    """
    figure = Figure(figsize=(15, 3 + 0.16 * len(shown) * len(Track) + 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    heights = [0.16 * len(shown) * len(Track) + 1, 3.5]
    above, below = figure.subplots(2, 1, height_ratios=heights)
    figure.suptitle(f"{title}\n{said}", fontsize=10)
    seen = _timeline(above, timelines, shown) | _roles(below, figures)
    patches = [Patch(color=_COLOURS[what], label=what.name.lower()) for what in sorted(seen)]
    figure.legend(handles=patches, loc="outside lower center", ncols=9, fontsize=8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, format="png")
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from None


def _timeline(axes: Axes, timelines: Sequence[Timeline], shown: Sequence[tuple[int, int]]) -> set[What]:
    origin, seen = min(t.span_ns[0] for t in timelines), set()
    lines: list[str] = []
    by_rank = {t.rank: t for t in timelines}
    for rank, cta in shown:
        spans: dict[tuple[Track, What], list[tuple[float, float]]] = {}
        for e in by_rank[rank].events([cta]):
            span = ((e.begin_ns - origin) / 1e3, (e.end_ns - e.begin_ns) / 1e3)
            spans.setdefault((e.track, e.what), []).append(span)
        for track in (Track.ALL, *(t for t in Track if t != Track.ALL)):
            for what in (w for t, w in spans if t == track):
                axes.broken_barh(spans[track, what], (len(lines) - 0.45, 0.9), color=_COLOURS[what], linewidth=0)
                seen.add(what)
            lines.append(f"rank {rank} CTA {cta} {track.name.lower()}")
    axes.set_yticks(range(len(lines)), lines, fontsize=6)
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_xlabel("microseconds since the first CTA began")
    axes.margins(x=0.01)
    return seen


def _roles(axes: Axes, figures: Sequence[Shares]) -> set[What]:
    seen = set()
    for place, track in enumerate(Track):
        left = 0.0
        for what in What:
            share = sum(f.roles.get(track, {}).get(what, 0.0) for f in figures) / len(figures)
            if share > 0:
                axes.barh(place, share, left=left, color=_COLOURS[what])
                seen.add(what)
                left += share
    axes.set_yticks(range(len(Track)), [track.name.lower() for track in Track], fontsize=8)
    axes.set_xlim(0, 1)
    axes.invert_yaxis()
    axes.set_xlabel("share of a CTA's time, mean over CTAs and ranks")
    return seen
