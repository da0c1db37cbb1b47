"""``python -m megamoe plan``: what one layer costs before anything is allocated or run.

Bytes of every field, the load of every rank, bytes over NVLink, floors in microseconds, and what more ranks change.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from megamoe import costs
from megamoe.commands.plan_load import RankLoad, choose_placement, sample_load
from megamoe.costs import GPUS, Gpu
from megamoe.dispatch.balance import imbalance
from megamoe.dispatch.capacity import Capacity, Field, chunks_for
from megamoe.problem import Problem
from megamoe.testing.cases import CASES
from megamoe.testing.routing import KINDS

TOKENS = (1, 8, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_SHOWN_RANKS = 16
_LEAST_WIDTH = 112  # of the widest table; a narrower terminal wraps lines instead of losing figures
_WORDS = ("", "field", "memory", "what", "what crosses", "bound by")  # columns of text
_PIECES = {
    "per_route": "per route",
    "one_crossing": "one crossing out",
    "partial_sums": "one crossing out, partial sums back",
}


def add(subparsers: Any) -> None:
    """Register the sub-command; ``subparsers`` is what ``ArgumentParser.add_subparsers`` returns."""
    parser = subparsers.add_parser(
        "plan", help="bytes, loads and floors of a layer, by arithmetic", description=__doc__
    )
    known = "; ".join(f"{case.name}: {case.why}" for case in CASES.values())
    parser.add_argument(
        "--case", choices=CASES, default="flash", help=f"layer whose sizes the next four override. {known}"
    )
    for name in ("hidden", "intermediate", "experts", "top-k"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--ranks", type=int, default=2, help="R (default 2)")
    parser.add_argument("--tokens", type=int, default=8192, help="T of every rank, also the bound (default 8192)")
    parser.add_argument("--recipe", choices=("bf16", "fp8_block", "fp8_row", "mxfp4"), default="fp8_block")
    parser.add_argument("--gpu", choices=GPUS, default="h200")
    parser.add_argument("--routing", choices=KINDS, default="balanced", help="routing of the load table")
    parser.add_argument("--redundant", type=int, default=0, metavar="N", help="slots a rank for copies of hot experts")
    parser.add_argument("--chunks", type=int, help="token chunks (default: as many as keep re-reading weights cheap)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the figures into FILE")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the tables; 0. Raises ValueError for sizes no engine can do."""
    problem, gpu = _problem(arguments), GPUS[arguments.gpu]
    placement = choose_placement(problem, arguments.routing, arguments.redundant, arguments.seed)
    load = sample_load(problem, placement, arguments.tokens, arguments.routing, arguments.seed)
    chunks = arguments.chunks if arguments.chunks is not None else _chunks(problem, gpu)
    fields = _fields(problem, placement.slots_per_rank, chunks)

    console = Console(width=max(shutil.get_terminal_size((120, 24)).columns, _LEAST_WIDTH))
    console.print(
        f"H {problem.hidden}, I {problem.intermediate}, E {problem.num_experts}, K {problem.top_k}, "
        f"{problem.recipe}, {problem.activation.name}; R {problem.world_size}, T {arguments.tokens} a rank, "
        f"{placement.slots_per_rank} expert slots a rank; {gpu.name} ({gpu.source})\n"
    )
    console.print(_bytes_table(fields, chunks))
    console.print(_load_table(load, arguments.routing, arguments.redundant))
    console.print(_crossing_table(problem, load, arguments.tokens, arguments.routing, gpu))
    console.print(_floor_table(problem, arguments.tokens, gpu))
    console.print(_rank_table(problem, arguments.tokens, gpu))
    console.print(
        f"From R = {problem.num_experts} on a rank holds one expert, then a copy of one. Regions grow with R because "
        "any source may send all its tokens to one owner; evenly routed, only the share in the last column is used. An "
        "HGX board links 8 GPUs by NVLink: beyond that domain the bytes hold, the NVLink times do not."
    )
    if arguments.png:
        from megamoe.commands.plan_figure import save_figure  # matplotlib takes a second to import

        save_figure(arguments.png, problem, load, gpu=gpu, rank_counts=RANKS)
        console.print(f"wrote {arguments.png}")
    return 0


def _problem(arguments: argparse.Namespace) -> Problem:
    case = CASES[arguments.case].problem(
        world_size=arguments.ranks, max_tokens=arguments.tokens, recipe=arguments.recipe
    )
    changed = {"hidden": arguments.hidden, "intermediate": arguments.intermediate}
    changed |= {"num_experts": arguments.experts, "top_k": arguments.top_k}
    return dataclasses.replace(case, **{name: value for name, value in changed.items() if value is not None})


def _chunks(problem: Problem, gpu: Gpu) -> int:
    """As many chunks as keep the reading of weights under half the compute time, and no chunk without a token."""
    tokens = max(problem.max_tokens, 1)
    compute_us = costs.floors(problem, tokens, gpu).compute_us
    return min(chunks_for(compute_us, costs.weights_us(problem, tokens, gpu)), tokens)


def _capacity(problem: Problem, slots: int, chunks: int) -> Capacity:
    return Capacity(
        world_size=problem.world_size,
        slots_per_rank=slots,
        top_k=problem.top_k,
        max_tokens=problem.max_tokens,
        chunks=chunks,
    )


def _fields(problem: Problem, slots: int, chunks: int) -> list[tuple[str, Field]]:
    """(group, field) of everything that lies on one rank."""
    tokens, hidden = problem.max_tokens, problem.hidden
    weights = [
        Field(name=name, where="local", rows=slots, row_bytes=size, meaning="one row an expert slot, scales included")
        for name, size in costs.expert_bytes(problem).items()
    ]
    user = [
        Field(name="x", where="local", rows=tokens, row_bytes=hidden * 2, meaning="bf16, handed in"),
        Field(name="y", where="local", rows=tokens, row_bytes=hidden * 2, meaning="bf16, handed back"),
        Field(
            name="topk",
            where="local",
            rows=tokens,
            row_bytes=problem.top_k * 12,
            meaning="int64 indices and fp32 weights",
        ),
    ]
    workspace = _capacity(problem, slots, chunks).fields(
        in_row_bytes=costs.row_bytes(hidden, problem.recipe),
        mid_row_bytes=costs.row_bytes(problem.intermediate, problem.recipe),
        out_row_bytes=costs.out_row_bytes(problem),
    )
    groups = {"weights": weights, "in and out": user, "workspace": list(workspace)}
    return [(group, field) for group, members in groups.items() for field in members]


def _bytes_table(fields: list[tuple[str, Field]], chunks: int) -> Table:
    table = _table(
        f"Bytes on each rank, worst case ({chunks} token chunk{'s' if chunks > 1 else ''}, at most 2 in flight)",
        "", "field", "memory", "rows", "B a row", "size", "what",
    )  # fmt: skip
    for i, (group, field) in enumerate(fields):
        last = i + 1 == len(fields) or fields[i + 1][0] != group
        first = i == 0 or fields[i - 1][0] != group
        table.add_row(
            group if first else "", field.name, field.where, f"{field.rows:,}", f"{field.row_bytes:,}",
            size(field.bytes), field.meaning, end_section=last,
        )  # fmt: skip
    symmetric = sum(field.bytes for _, field in fields if field.where == "symmetric")
    total = sum(field.bytes for _, field in fields)
    table.add_row("total", "", "", "", "", size(total), f"{size(symmetric)} of it symmetric")
    return table


def _load_table(load: RankLoad, kind: str, redundant: int) -> Table:
    copies = f", {redundant} redundant slot(s) a rank" if redundant else ""
    table = _table(
        f"Load per rank, {kind} routing{copies} ({load.sampled} tokens a rank drawn): max / mean "
        f"{imbalance(load.routes):.3f}",
        "rank", "routes\ncomputed", "of the\nmean", "rows received\nfrom others", "rows sent\nto others",
    )  # fmt: skip
    mean = float(load.routes.mean()) or 1.0
    order = list(range(len(load.routes)))
    if len(order) > _SHOWN_RANKS:
        heavy: list[int] = load.routes.argsort(descending=True, stable=True).tolist()
        order = heavy[: _SHOWN_RANKS // 2] + heavy[-(_SHOWN_RANKS // 2) :]
        table.caption = f"the {_SHOWN_RANKS // 2} heaviest and lightest of {len(load.routes)} ranks"
    for rank in order:
        routes = float(load.routes[rank])
        table.add_row(
            str(rank), f"{routes:,.0f}", f"{routes / mean:.3f}", f"{float(load.rows_from_away[rank]):,.0f}",
            f"{float(load.rows_away[rank]):,.0f}",
        )  # fmt: skip
    return table


def _crossing_table(problem: Problem, load: RankLoad, tokens: int, kind: str, gpu: Gpu) -> Table:
    table = _table(
        f"NVLink, bytes a rank sends and the time at {gpu.nvlink_gb_s:.0f} GB/s",
        "what crosses", "uniform, mean rank", "us", f"{kind}, busiest rank", "us",
    )  # fmt: skip
    uniform = costs.uniform_crossings(problem, tokens)
    busiest = busiest_crossings(problem, load)
    for name, title in _PIECES.items():
        mean, most = getattr(uniform, name), busiest[name]
        rate = gpu.nvlink_gb_s * 1e3
        table.add_row(title, size(mean), f"{mean / rate:.0f}", size(most), f"{most / rate:.0f}")
    return table


def busiest_crossings(problem: Problem, load: RankLoad) -> dict[str, float]:
    """Bytes of the rank that sends or receives most, by way of crossing."""
    there, back = costs.row_bytes(problem.hidden, problem.recipe), costs.out_row_bytes(problem)
    ways = {
        "per_route": (load.routes_away, load.routes_from_away, load.routes_from_away, load.routes_away),
        "one_crossing": (load.rows_away, load.routes_from_away, load.rows_from_away, load.routes_away),
        "partial_sums": (load.rows_away, load.rows_from_away, load.rows_from_away, load.rows_away),
    }
    return {
        name: max(float((out * there + sums * back).max()), float((into * there + got * back).max()))
        for name, (out, sums, into, got) in ways.items()
    }


def _floor_table(problem: Problem, tokens: int, gpu: Gpu) -> Table:
    table = _table(
        f"Floors of a forward call on {gpu.name}, us (uniform routing, mean rank)",
        "T a rank", "HBM", "compute", "NVLink", "floor", "bound by",
    )  # fmt: skip
    for count in sorted({*TOKENS, *([tokens] if tokens else [])}):
        floor = costs.floors(problem, count, gpu)
        table.add_row(
            str(count), f"{floor.memory_us:.0f}", f"{floor.compute_us:.0f}", f"{floor.nvlink_us:.0f}",
            f"{floor.us:.0f}", floor.bound_by,
        )  # fmt: skip
    return table


def _rank_table(problem: Problem, tokens: int, gpu: Gpu) -> Table:
    table = _table(
        f"What more ranks change (per rank, T {tokens}, uniform routing)",
        "R", "slots", "weights", "other ranks\nof a token", "sent,\nper route", "sent, once\nboth ways", "NVLink\nus",
        "floor\nus", "regions", "evenly\nused",
    )  # fmt: skip
    for ranks in RANKS:
        other = dataclasses.replace(problem, world_size=ranks)
        slots = costs.slots_per_rank(other)
        sent = costs.uniform_crossings(other, tokens)
        floor = costs.floors(other, tokens, gpu)
        regions = next(f for _, f in _fields(other, slots, _chunks(other, gpu)) if f.name == "regions")
        reached = costs.remote_ranks(other) / (ranks - 1) if ranks > 1 else 1.0
        table.add_row(
            str(ranks), str(slots), size(slots * sum(costs.expert_bytes(other).values())),
            f"{costs.remote_ranks(other):.2f}", size(sent.per_route), size(sent.partial_sums),
            f"{floor.nvlink_us:.0f}", f"{floor.us:.0f}", size(regions.bytes), f"{reached:.1%}",
        )  # fmt: skip
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in _WORDS else "right", no_wrap=column != "what")
    return table


def size(count: float) -> str:
    """Bytes for people: 1536 -> 1.50 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")
