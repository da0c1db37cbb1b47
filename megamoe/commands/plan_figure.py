"""The figures of ``python -m megamoe plan --png FILE``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megamoe import costs
from megamoe.commands.plan_load import RankLoad
from megamoe.costs import Gpu
from megamoe.problem import Problem

_TOKENS = [2**i for i in range(15)]


def save_figure(path: Path, problem: Problem, load: RankLoad, *, gpu: Gpu, rank_counts: Sequence[int]) -> None:
    """Floors over T, load per rank, bytes and weights over R, as a PNG. Raises ValueError if it cannot be written."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    figure.suptitle(
        f"H {problem.hidden}, I {problem.intermediate}, E {problem.num_experts}, K {problem.top_k}, {problem.recipe}, "
        f"R {problem.world_size}, {gpu.name}"
    )
    _floors(axes[0, 0], problem, gpu)
    _load(axes[0, 1], load)
    _crossings(axes[1, 0], problem, rank_counts)
    _weights(axes[1, 1], problem, rank_counts)
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from None


def _floors(axes: Axes, problem: Problem, gpu: Gpu) -> None:
    floors = [costs.floors(problem, tokens, gpu) for tokens in _TOKENS]
    axes.plot(_TOKENS, [f.memory_us for f in floors], label="HBM")
    axes.plot(_TOKENS, [f.compute_us for f in floors], label="compute")
    if problem.world_size > 1:
        axes.plot(_TOKENS, [f.nvlink_us for f in floors], label="NVLink")
    axes.plot(_TOKENS, [f.us for f in floors], "k--", label="floor")
    axes.set(
        xscale="log", yscale="log", xlabel="tokens a rank", ylabel="microseconds", title="Floors of a forward call"
    )
    axes.set_ylim(bottom=0.5)
    axes.legend()


def _load(axes: Axes, load: RankLoad) -> None:
    axes.bar(range(len(load.routes)), load.routes.tolist())
    axes.axhline(float(load.routes.mean()), color="k", linestyle="--", label="mean")
    axes.set(xlabel="rank", ylabel="routes", title="Load per rank")
    axes.legend()


def _crossings(axes: Axes, problem: Problem, rank_counts: Sequence[int]) -> None:
    counts = [ranks for ranks in rank_counts if ranks > 1]
    tokens = problem.max_tokens
    sent = [costs.uniform_crossings(dataclasses.replace(problem, world_size=ranks), tokens) for ranks in counts]
    axes.plot(counts, [s.per_route / 2**20 for s in sent], "o-", label="per route")
    axes.plot(counts, [s.one_crossing / 2**20 for s in sent], "o-", label="one crossing out")
    axes.plot(counts, [s.partial_sums / 2**20 for s in sent], "o-", label="and partial sums back")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="ranks", ylabel="MiB a rank sends", title=f"NVLink bytes, T = {tokens}")
    axes.set_ylim(bottom=0)
    axes.legend()


def _weights(axes: Axes, problem: Problem, rank_counts: Sequence[int]) -> None:
    others = [dataclasses.replace(problem, world_size=ranks) for ranks in rank_counts]
    weights = [costs.slots_per_rank(other) * sum(costs.expert_bytes(other).values()) / 2**30 for other in others]
    axes.plot(rank_counts, weights, "o-")
    axes.set_xscale("log", base=2)
    axes.set(yscale="log", xlabel="ranks", ylabel="GiB a rank", title="Expert weights")
