"""The picture of a run: loss over steps, and how evenly each layer's experts were used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from megamoe.lm.train import History

_INK, _MUTED, _BLUE, _ORANGE = "#1f2328", "#8b949e", "#1f6feb", "#d1570a"


def plot(history: History, path: Path, *, unigram: float, without_experts: float, title: str) -> None:
    """Write a PNG. Left: training (smoothed) and held-out loss; right: one heat map a layer, expert by step."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    layers = len(history.load[0][1]) if history.load else 0
    figure = plt.figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.15, 1])
    figure.suptitle(title, fontsize=11, color=_INK)

    axes = left.subplots()
    steps, bits = np.array(history.train).T
    axes.plot(steps, bits, color=_BLUE, alpha=0.2, linewidth=0.8)
    axes.plot(steps, _smooth(bits), color=_BLUE, label="training")
    if history.held_out:
        held_steps, held_bits = np.array(history.held_out).T
        axes.plot(held_steps, held_bits, "o-", color=_INK, markersize=4, label="held out")
        axes.annotate(
            f"{held_bits[-1]:.2f}", (held_steps[-1], held_bits[-1]), xytext=(-4, -14), textcoords="offset points",
            ha="right", color=_INK,
        )  # fmt: skip
    axes.axhline(unigram, color=_MUTED, linestyle="--", linewidth=1, label=f"unigram entropy {unigram:.2f}")
    axes.plot([steps[-1]], [without_experts], "x", color=_ORANGE, label=f"experts zeroed {without_experts:.2f}")
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(0, max(8.2, without_experts + 0.3)))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)

    if layers:
        ends = [step for step, _ in history.load]
        edges = np.array([0, *ends] if ends[0] > 0 else ends)
        rows = right.subplots(layers, 1, sharex=True, squeeze=False)[:, 0]
        for layer, axes in enumerate(rows):
            load = np.array([counts[layer] for _, counts in history.load], dtype=float).T
            share = load / np.maximum(load.mean(axis=0), 1)
            image = axes.pcolormesh(
                edges, np.arange(len(share) + 1) - 0.5, share, cmap="RdBu_r", vmin=0, vmax=2, rasterized=True
            )
            axes.set_ylabel(f"layer {layer}\nexpert")
            axes.yaxis.get_major_locator().set_params(integer=True)
        rows[-1].set_xlabel("step")
        right.colorbar(image, ax=list(rows), label="load over mean load")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _smooth(values: np.ndarray, reach: int = 8) -> np.ndarray:
    """Mean over ``reach`` values to both sides, fewer at the ends."""
    total = np.cumsum(np.insert(values, 0, 0.0))
    at = np.arange(len(values))
    first, last = np.maximum(at - reach, 0), np.minimum(at + reach + 1, len(values))
    return np.asarray((total[last] - total[first]) / (last - first))
