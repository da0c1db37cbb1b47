"""Tables in README.md and docs/*.md, generated: ``python -m megamoe.bench.tables`` rewrites them, ``--check`` compares.

A table stands between ``<!-- table: NAME OPTION=VALUE ... -->`` and ``<!-- end table -->``. NAME is one of

- ``env``: the table of environment variables;
- ``checks``: how many GPU tests of each file passed, and where;
- ``ratios of=BENCHMARK by=FIELD,FIELD``: geometric means of peers' times over ours;
- a benchmark of ``docs/results/*.json``: ``columns=a,b,c`` picks the columns, ``sort=a,b`` orders the rows, and every
  other option keeps the rows whose field equals VALUE.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from megamoe import env
from megamoe.bench.results import KEYS, Row, load, sortable

_BLOCK = re.compile(r"(<!-- table: ([^\n]*?) -->\n).*?(<!-- end table -->)", re.DOTALL)
NOTHING = "Not run yet.\n"

# Columns that are computed from others; ours against a peer is `vs:NAME` (above 1 means ours is faster).
DERIVED: dict[str, Callable[[Row], Any]] = {
    "us/floor": lambda row: row["us"] / row["floor_us"] if row.get("floor_us") else None,
    "torch": lambda row: row["versions"]["torch"],
}
DEFAULT_COLUMNS: dict[str, tuple[str, ...]] = {
    "gemm": ("grouping", "layout", "recipe", "groups", "m", "n", "k", "us", "us/floor", "tflops", "diff"),
    "accuracy": ("grouping", "recipe", "shapes", "repeats", "whole", "row", "element", "worst", "machine"),
    "quant": ("op", "m", "n", "us", "gbps"),
    "moe": (
        "case",
        "recipe",
        "accumulate",
        "engine",
        "world_size",
        "tokens",
        "us",
        "floor_us",
        "us/floor",
        "diff",
        "machine",
    ),
    "trace": (
        "case",
        "recipe",
        "engine",
        "world_size",
        "tokens",
        "us",
        "us_traced",
        "math",
        "hidden",
        "exposed_us",
        "nvlink_us",
        "nvlink_hidden",
        "awaited_us",
        "nvlink_unawaited",
        "machine",
    ),
    "train": ("case", "recipe", "direction", "engine", "world_size", "tokens", "us", "floor_us", "us/floor"),
    "generate": ("model", "recipe", "engine", "world_size", "new_tokens_each", "tokens", "us"),
    "scale": ("what", "recipe", "engine", "world_size", "count", "wrong", "seconds", "machine", "date", "commit"),
    "megatron": ("model", "recipe", "engine", "world_size", "tokens", "us", "tokens_per_second", "diff"),
    "check": ("what", "outcome", "seconds", "diff", "machine", "date", "commit"),
}


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A pipe table; ``|`` inside cells is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def env_table() -> str:
    """Name, default and meaning of every variable of ``env.TABLE``."""
    rows = [[f"`{v.name}`", f"`{v.default}`" if v.default else "", v.meaning] for v in env.TABLE]
    return markdown(["variable", "default", "meaning"], rows)


def cell(value: Any) -> str:
    """Text of one value: three significant digits below 100, none after the point above; "" for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        if value != 0 and abs(value) < 1e-2:
            return f"{value:.1e}"
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def value_of(row: Row, column: str) -> Any:
    """A field of ``row``, a derived one, or the ratio peer / ours for ``vs:NAME``."""
    if column in DERIVED:
        return DERIVED[column](row)
    if column.startswith("vs:"):
        peer = row.get("peers", {}).get(column[3:])
        return peer / row["us"] if peer is not None else None
    return row.get(column)


def results_table(benchmark: str, options: dict[str, str], folder: Path) -> str:
    """Rows of ``benchmark`` from every file in ``folder`` that match ``options``; says so if there are none."""
    wanted = {field: value for field, value in options.items() if field not in ("columns", "sort")}
    rows = [row for path in sorted(folder.glob(f"{benchmark}-*.json")) for row in load(path)]
    rows = [row for row in rows if all(str(row.get(field)) == value for field, value in wanted.items())]
    if not rows:
        return NOTHING
    if "columns" in options:
        columns = options["columns"].split(",")
    else:
        peers = sorted({peer for row in rows for peer in row.get("peers", {})})
        columns = [*DEFAULT_COLUMNS[benchmark], *(f"vs:{peer}" for peer in peers)]
    for column in reversed(options["sort"].split(",") if "sort" in options else []):
        rows.sort(key=lambda row: sortable(value_of(row, column)))
    return markdown(columns, [[cell(value_of(row, column)) for column in columns] for row in rows])


def checks_table(folder: Path) -> str:
    """Tests marked for GPUs, counted by file and machine: what was run where, when last, and of which commits."""
    counts: dict[tuple[str, str], list[Row]] = {}
    for path in sorted(folder.glob("check-*.json")):
        for row in load(path):
            counts.setdefault((row["what"].split("::")[0], row["machine"]), []).append(row)
    if not counts:
        return NOTHING
    lines = []
    for (file, machine), rows in sorted(counts.items()):
        passed = sum(row["outcome"] == "passed" for row in rows)
        last = max(str(row["date"]) for row in rows)
        commits = ", ".join(sorted({row["commit"] for row in rows if row["date"] == last}))
        lines.append([f"`{file}`", machine, str(passed), str(len(rows) - passed), last, commits])
    return markdown(["tests", "machine", "passed", "failed", "last run", "commits"], lines)


def ratios_table(options: dict[str, str], folder: Path) -> str:
    """For each peer of benchmark ``of``, in groups by the fields ``by``: how many cases, and peer's time over ours."""
    fields = options["by"].split(",")
    groups: dict[tuple[str, ...], list[float]] = {}
    for path in sorted(folder.glob(f"{options['of']}-*.json")):
        for row in load(path):
            for peer, microseconds in row.get("peers", {}).items():
                group = (*(cell(row.get(field)) for field in fields), peer, row["machine"])
                groups.setdefault(group, []).append(microseconds / row["us"])
    if not groups:
        return NOTHING
    lines = []
    for (*values, peer, machine), ratios in sorted(groups.items()):
        mean = f"{geometric_mean(ratios):.2f}"
        lines.append([*values, peer, str(len(ratios)), mean, f"{min(ratios):.2f}", f"{max(ratios):.2f}", machine])
    return markdown([*fields, "peer", "cases", "geometric mean", "least", "most", "machine"], lines)


def render(name: str, options: dict[str, str], folder: Path) -> str:
    """The table called ``name``. Raises ValueError for an unknown one."""
    if name == "env":
        return env_table()
    if name == "checks":
        return checks_table(folder)
    if name == "ratios":
        return ratios_table(options, folder)
    if name not in KEYS:
        raise ValueError(f"table must be env, checks, ratios or one of {', '.join(KEYS)}, got {name!r}")
    return results_table(name, options, folder)


def regenerate(text: str, folder: Path) -> str:
    """``text`` with every marked table made anew from ``env.TABLE`` and the JSON files in ``folder``."""

    def replace(match: re.Match[str]) -> str:
        name, *words = match.group(2).split()
        options = dict(word.split("=", 1) for word in words)
        return match.group(1) + render(name, options, folder) + match.group(3)

    return _BLOCK.sub(replace, text)


def main(argv: list[str] | None = None) -> int:
    """Rewrite the tables of the checkout in ``--root``, or with ``--check`` name the files whose tables are stale."""
    parser = argparse.ArgumentParser(prog="python -m megamoe.bench.tables", description="Tables of README and docs.")
    parser.add_argument("--root", type=Path, default=Path(), help="top of the checkout (default: here)")
    parser.add_argument("--check", action="store_true", help="write nothing, fail if a table is stale")
    arguments = parser.parse_args(argv)
    stale = []
    for path in [arguments.root / "README.md", *sorted((arguments.root / "docs").rglob("*.md"))]:
        old = path.read_text(encoding="utf-8")
        new = regenerate(old, arguments.root / "docs" / "results")
        if new != old:
            stale.append(str(path))
            if not arguments.check:
                path.write_text(new, encoding="utf-8")
    if stale:
        print(f"{'stale' if arguments.check else 'rewritten'}: {', '.join(stale)}")
    return int(bool(stale) and arguments.check)


if __name__ == "__main__":
    sys.exit(main())
