"""One traced call of the mega-kernel: checked against an untraced one, decoded, kept as files and as a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megamoe import costs
from megamoe.bench.moe_run import Run
from megamoe.bench.moe_sessions import Mega
from megamoe.bench.results import Row
from megamoe.mega import trace as layout
from megamoe.mega.trace import Timeline
from megamoe.problem import Problem
from megamoe.testing.timing import cold_l2, time_call
from megamoe.trace import perfetto
from megamoe.trace.clocks import Aligned, align
from megamoe.trace.shares import MATH, MATH_TRACKS, Shares, shares

_DRAWN = 4  # CTAs in the figure


@dataclass(frozen=True)
class Traced:
    """A call of all ranks: events of the CTAs shown, figures of all CTAs, and the untraced call's time."""

    aligned: Aligned
    ranks: list[Shares]
    ctas: list[int]
    us: float


def record(run: Run, session: Mega, tokens: int, *, ctas: int, events: int) -> Traced:
    """Trace one call with cold L2 and lined-up ranks; every process of the run together.

    Args:
        ctas: how many CTAs of a rank to keep events of, spread over all.
        events: room for events of a track of a CTA.

    Raises:
        AssertionError: y is not that of the kernel that writes no trace, bit for bit.
    """
    call, line_up = session.call(tokens), run.line_up()
    want = [y.clone() for y in call()]
    timing = time_call(call, before=line_up)
    traces = [layout.empty(r.num_sms, events=events, device=run.device) for r in session.runners]
    traced, cool = session.call(tokens, traces=traces), cold_l2()
    for _ in range(3):  # the last one is kept
        cool()
        if line_up is not None:
            line_up()
        got = traced()
    torch.cuda.synchronize()
    session.check()
    same = all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    if not all(run.all(same)):
        raise AssertionError(f"y of the traced kernel, T = {tokens}, is not that of the untraced one")
    count = session.runners[0].num_sms
    shown = sorted({i * count // min(ctas, count) for i in range(min(ctas, count))})
    here = [layout.decode(t.cpu(), rank=rank) for rank, t in zip(session.ranks, traces, strict=True)]
    mine = [(t.only(shown), shares(t)) for t in here]
    everyone = [pair for pairs in run.all(mine) for pair in pairs]
    aligned = align([t for t, _ in everyone], one_device=run.virtual)
    return Traced(aligned, [s for _, s in everyone], shown, max(run.all(timing.us)))


def make_row(run: Run, case: str, problem: Problem, tokens: int, traced: Traced) -> Row:
    """A row of the benchmark "trace", without where it comes from; docs/mega-kernel.md defines the figures."""
    gpu = None if run.virtual or run.world_size == 1 else costs.named(run.device_name)
    exposed, awaited = (max(getattr(s, name) for s in traced.ranks) for name in ("exposed_us", "awaited_us"))
    hidden = [s.hidden for s in traced.ranks if s.hidden is not None]
    row: Row = {
        "engine": run.label_of(problem),
        "recipe": problem.recipe,
        "accumulate": problem.accumulate,
        "case": case,
        "world_size": run.world_size,
        "tokens": tokens,
        "us": traced.us,
        "us_traced": max(s.duration_us for s in traced.ranks),
        "hidden": min(hidden) if hidden else None,
        "exposed_us": exposed,
        "awaited_us": awaited,
        "math": _math(traced.ranks),
        "roles": _roles(traced.ranks),
        "dropped": sum(s.dropped for s in traced.ranks),
        "clock_us": traced.aligned.within_ns / 1e3,
    }
    if gpu is not None:
        nvlink = costs.uniform_crossings(problem, tokens).one_crossing / (gpu.nvlink_gb_s * 1e3)
        row |= {"nvlink_us": nvlink, "nvlink_hidden": 1 - exposed / nvlink, "nvlink_unawaited": 1 - awaited / nvlink}
    return {**row, "sms": run.sms} if run.sms else row


def keep(folder: Path, row: Row, traced: Traced) -> list[Path]:
    """Write the timeline for Perfetto and the figure; returns their paths."""
    from megamoe.trace import figure  # matplotlib takes a second to import

    name = f"trace-{row['case'].replace('/', '-')}-{row['recipe']}-r{row['world_size']}-t{row['tokens']}"
    paths = [folder / f"{name}.json", folder / f"{name}.png"]
    timelines = traced.aligned.timelines
    about = {k: row[k] for k in ("case", "recipe", "engine", "world_size", "tokens", "us", "us_traced", "clock_us")}
    perfetto.save(paths[0], timelines, traced.ctas, **about)
    title = f"{row['case']}, {row['recipe']}, {row['engine']}, R = {row['world_size']}, T = {row['tokens']}"
    figure.save(paths[1], timelines, traced.ranks, _drawn(timelines, traced.ctas), title=title, said=line(row))
    return paths


def line(row: Row) -> str:
    """The figures as text."""
    hidden = "none" if row["hidden"] is None else f"{row['hidden']:.1%}"
    text = (
        f"{row['us']:.1f} us untraced, {row['us_traced']:.1f} traced; math busy {row['math']:.1%}; communication "
        f"hidden {hidden}, exposed {row['exposed_us']:.1f} us, awaited {row['awaited_us']:.1f}"
    )
    if "nvlink_us" in row:
        hidden = f"{row['nvlink_hidden']:.1%} hidden, {row['nvlink_unawaited']:.1%} not awaited"
        text += f"; of {row['nvlink_us']:.1f} us of NVLink {hidden}"
    if row["dropped"]:
        text += f"; {row['dropped']} events had no room"
    return text


def _drawn(timelines: Sequence[Timeline], ctas: Sequence[int]) -> list[tuple[int, int]]:
    """(rank, CTA) pairs for the figure: of the first and the last rank."""
    ranks = sorted({timelines[0].rank, timelines[-1].rank})
    each = min(_DRAWN // len(ranks), len(ctas))
    return [(rank, ctas[i * len(ctas) // each]) for rank in ranks for i in range(each)]


def _roles(ranks: Sequence[Shares]) -> dict[str, dict[str, float]]:
    """Track -> what -> share of time, mean of ranks."""
    found: dict[str, dict[str, float]] = {}
    for track in ranks[0].roles:
        kinds = sorted({what for s in ranks for what in s.roles.get(track, {})})
        means = {w.name.lower(): sum(s.roles.get(track, {}).get(w, 0.0) for s in ranks) / len(ranks) for w in kinds}
        found[track.name.lower()] = {name: round(share, 4) for name, share in means.items()}
    return found


def _math(ranks: Sequence[Shares]) -> float:
    """Share of time in which a math warpgroup multiplies or is in an epilogue, mean of both and of ranks."""
    parts = [s.roles.get(track, {}).get(what, 0.0) for s in ranks for track in MATH_TRACKS for what in MATH]
    return sum(parts) / len(ranks) / len(MATH_TRACKS)
