"""What ``megamoe bench gemm`` shows of its rows: a table, means of the ratios peer / ours, a plot."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from megamoe.bench.results import Row

BEST = "best peer"
_ALL = "all"


def geometric_mean(values: Iterable[float]) -> float:
    """Raises ValueError without values."""
    logs = [math.log(value) for value in values]
    if not logs:
        raise ValueError("the geometric mean needs at least one value, got none")
    return math.exp(sum(logs) / len(logs))


def ratios(row: Row) -> dict[str, float]:
    """Time of each peer, and of the fastest, over ours: above 1 ours is faster. {} without peers."""
    found = {name: us / row["us"] for name, us in row["peers"].items()}
    return {**found, BEST: min(found.values())} if found else {}


def kind(row: Row) -> str:
    """Grouping, and the layout if it is not A @ B^T."""
    return f"{row['grouping']} {row['layout']}" if row.get("layout") else str(row["grouping"])


def summary(rows: list[Row]) -> list[tuple[str, str, str, str, int, float, float]]:
    """(recipe, grouping, rows per group, peer, cases, geometric mean, least ratio), per size and over all sizes."""
    seen: dict[tuple[str, str, str, str], list[float]] = {}
    for row in rows:
        for peer, ratio in ratios(row).items():
            for size in (str(row["rows"]), _ALL):
                seen.setdefault((row["recipe"], kind(row), size, peer), []).append(ratio)
    return [(*key, len(values), geometric_mean(values), min(values)) for key, values in seen.items()]


def show(rows: list[Row]) -> None:
    """Both tables."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=180)
    names = sorted({peer for row in rows for peer in row["peers"]})
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="peer / ours: above 1 ours is faster")
    head = ("recipe", "grouping", "groups", "rows", "m", "n x k", "us", "TFLOPS", "GB/s", "d", *names)
    for name in head:
        table.add_column(name, justify="left" if name in ("recipe", "grouping") else "right")
    for row in rows:
        found = ratios(row)
        table.add_row(
            row["recipe"],
            kind(row),
            *(str(row[field]) for field in ("groups", "rows", "m")),
            f"{row['n']} x {row['k']}",
            f"{row['us']:.1f}",
            *(f"{row[field]:.0f}" for field in ("tflops", "gbps")),
            f"{row['diff']:.1e}",
            *(f"{found[name]:.3f}" if name in found else "" for name in names),
        )
    console.print(table)
    means = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="peer / ours")
    for name in ("recipe", "grouping", "rows", "peer", "cases", "geometric mean", "least"):
        means.add_column(name, justify="left" if name in ("recipe", "grouping", "peer") else "right")
    for recipe, grouping, size, peer, count, mean, least in summary(rows):
        means.add_row(recipe, grouping, size, peer, str(count), f"{mean:.3f}", f"{least:.3f}")
    console.print(means)


def plot(rows: list[Row], path: Path) -> None:
    """One panel per recipe and grouping: ratio to every peer, case by case. Raises ValueError without a ratio."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["peers"]:
            panels.setdefault((row["recipe"], kind(row)), []).append(row)
    if not panels:
        raise ValueError("no row has a peer: there is no ratio to plot")
    figure = Figure(figsize=(14, 3.6 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(len(panels), 1, squeeze=False)
    for axis, ((recipe, grouping), members) in zip(axes[:, 0], panels.items(), strict=True):
        for peer in sorted({peer for row in members for peer in row["peers"]}):
            points = [(i, ratios(row)[peer]) for i, row in enumerate(members) if peer in row["peers"]]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=1, label=peer)
        axis.axhline(1, color="black", linewidth=0.8)
        labels = [f"{row['groups']} x {row['rows']}, {row['n']} x {row['k']}" for row in members]
        axis.set_xticks(range(len(members)), labels, rotation=90, fontsize=6)
        axis.set_ylabel("peer / ours")
        axis.set_title(f"{recipe}, {grouping} (groups x rows, n x k); above 1 ours is faster", fontsize=9)
        axis.grid(axis="y", linewidth=0.3)
        axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
