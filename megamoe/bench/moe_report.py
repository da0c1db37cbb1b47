"""What ``megamoe bench moe`` shows of its rows: a line each, a table, a plot of time over tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from megamoe.bench.gemm_report import geometric_mean
from megamoe.bench.moe_peers import GPU, published
from megamoe.bench.results import Row

_HEAD = ("case", "recipe", "engine", "R", "T", "us", "min", "TF", "floor", "us/floor", "best peer", "peer/ours", "d")


def best_peer(row: Row) -> float | None:
    """Least time of a peer in this cell: published, of whatever GPUs, or measured in the same run."""
    found = published(row["case"], row["recipe"], row["tokens"], world_size=row["world_size"]) | row["peers"]
    return min(found.values()) if found else None


def line(row: Row) -> str:
    """One row as text."""
    floor = f"{row['us'] / row['floor_us']:5.2f} x floor {row['floor_us']:.0f}" if row["floor_us"] else ""
    label = f"{row['case']} {row['recipe']} {row['accumulate']} {row['engine']} T = {row['tokens']}"
    times = f"{row['us']:9.1f} us (min {row['us_min']:.1f})"
    return f"{label:48} {times} {row['tflops']:6.0f} TF  d {row['diff']:.1e}  {floor}"


def show(rows: list[Row], *, machine: str) -> None:
    """The table, and means."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"{machine}; published peers are of {GPU}s")
    for name in _HEAD:
        table.add_column(name, justify="left" if name in ("case", "recipe", "engine") else "right")
    ratios, floors = [], []
    for row in rows:
        peer, floor = best_peer(row), row["floor_us"]
        if peer:
            ratios.append(peer / row["us"])
        if floor:
            floors.append(row["us"] / floor)
        table.add_row(
            *(str(row[field]) for field in ("case", "recipe", "engine", "world_size", "tokens")),
            f"{row['us']:.1f}",
            f"{row['us_min']:.1f}",
            f"{row['tflops']:.0f}",
            f"{floor:.0f}" if floor else "",
            f"{row['us'] / floor:.2f}" if floor else "",
            f"{peer:.0f}" if peer else "",
            f"{peer / row['us']:.2f}" if peer else "",
            f"{row['diff']:.1e}",
        )
    console.print(table)
    for what, values in (("best peer / ours", ratios), ("ours / floor", floors)):
        if values:
            worst = min(values) if values is ratios else max(values)
            console.print(f"{what}: geometric mean {geometric_mean(values):.3f} of {len(values)}, worst {worst:.3f}")


def plot(rows: list[Row], path: Path, *, machine: str) -> None:
    """One panel a case and recipe: microseconds over tokens, ours, the floor and the published peers.

    Raises:
        ValueError: there is no row.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not rows:
        raise ValueError("there is no row to plot")
    panels: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        panels.setdefault((row["case"], row["recipe"]), []).append(row)
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.9 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, ((case, recipe), members) in zip(axes.flat, panels.items(), strict=False):
        for name, points in _curves(members).items():
            style = {"floor": "k--"}.get(name, "o-" if name.startswith("megamoe") else "s:")
            axis.plot(*zip(*sorted(points.items()), strict=True), style, markersize=4, linewidth=1, label=name)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title(f"{case}, {recipe}, EP{members[0]['world_size']}", fontsize=9)
        axis.set_xlabel("tokens per rank")
        axis.set_ylabel("microseconds")
        axis.grid(linewidth=0.3, which="both")
        axis.legend(fontsize=6)
    figure.suptitle(f"forward, {machine}; published peers on {GPU}s", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _curves(rows: list[Row]) -> dict[str, dict[int, float]]:
    curves: dict[str, dict[int, float]] = {}
    for row in rows:
        T = row["tokens"]
        ours = f"megamoe {row['engine']}, {row['accumulate']}"
        curves.setdefault("plain PyTorch" if row["engine"] == "torch" else ours, {})[T] = row["us"]
        if row["floor_us"]:
            curves.setdefault("floor", {})[T] = row["floor_us"]
        for peer, us in published(row["case"], row["recipe"], T, world_size=row["world_size"]).items():
            curves.setdefault(peer.removeprefix("numbers.md:"), {})[T] = us
    return curves
