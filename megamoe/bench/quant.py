"""``megamoe bench quant``: casts and scale layouts against the device copy that moves as many bytes.

Each row: ``op``, ``m`` x ``n`` (of what is cast; of the scales for conversions), ``us``, ``gbps`` (inputs read once
plus outputs written once), ``share`` of ``ceiling_gbps`` (a copy of 4 GiB in the same run), ``peers`` (a copy that
moves the same bytes), ``equal``: share of result elements equal to the twin's, 1 for all but activations.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from megamoe.activation import Activation
from megamoe.bench.results import Row, provenance, save
from megamoe.kernels.quant import casts, reference, reference_scales, scales
from megamoe.testing.timing import copy_ceiling_gbps, time_call

Result = tuple[torch.Tensor, ...]
COPY = "copy of as many bytes"


@dataclass(frozen=True)
class Operation:
    """One thing to measure: what it reads, and the call on CUDA with its twin."""

    op: str
    make: Callable[[int, int], Result]
    call: Callable[..., Result]
    twin: Callable[..., Result]


def operations() -> list[Operation]:
    """Everything that ``bench quant`` knows."""
    swiglu, geglu = Activation("swiglu"), Activation("geglu")
    found = [
        _cast("cast_1x128", _bf16),
        _cast("cast_1x128", _bf16, layout="sm90"),
        _cast("cast_1x128", _bf16, layout="sm100", power_of_two=True),
        _cast("cast_1x128", _fp32),
        _cast("cast_row", _bf16),
        _cast("cast_1x128_both", _bf16, layout="sm90"),
        Operation(
            "cast_1x128_both groups=32 layout=sm90",
            lambda m, n: (*_bf16(m, n), _offsets(m)),
            lambda x, offsets: casts.cast_1x128_both(x, offsets=offsets, layout="sm90"),
            lambda x, offsets: reference.cast_1x128_both(x, offsets=offsets, layout="sm90"),
        ),
        _cast("cast_128x128", _bf16),
        _cast("cast_128x128_both", _bf16),
        _cast("cast_128x128", _fp32),
        _cast("cast_128x128_both", _fp32),
        _cast("cast_1x128", _gate_up, activation=swiglu, layout="sm90"),
        _cast("cast_1x128", _gate_up, activation=geglu, layout="sm90"),
        _cast("cast_row", _gate_up, activation=swiglu),
        _cast("cast_1x128_both", _gate_up, activation=swiglu, layout="sm90"),
    ]
    for name in ("to_sm90", "to_sm100", "pack_ue8m0"):
        options = {} if name == "to_sm90" else {"check": False}
        found.append(
            Operation(
                name,
                _powers,
                lambda s, name=name, options=options: (getattr(scales, name)(s, **options),),
                lambda s, name=name, options=options: (getattr(reference_scales, name)(s, **options),),
            )
        )
    return found


def shapes_of(op: str) -> list[tuple[int, int]]:
    """Shapes that ``op`` is measured at: tokens of one rank by hidden sizes, experts' weights, scales of both."""
    if op.split(maxsplit=1)[0] in ("to_sm90", "to_sm100", "pack_ue8m0"):
        return [(8192, 56), (131072, 56), (1048576, 56)]
    if "activation" in op:
        return [(65536, 768), (65536, 2048), (32768, 2880), (65536, 3072)]
    if "128x128" in op:
        return [(32 * 4096, 4096), (32 * 4096, 7168), (64 * 1536, 2048)]
    return [(8192, 7168), (65536, 2048), (32768, 2880), (65536, 4096), (65536, 7168)]


def measure(operation: Operation, m: int, n: int, ceiling_gbps: float) -> Row:
    """One row, without where it comes from."""
    inputs = operation.make(m, n)
    result = operation.call(*inputs)
    equal = _equal_share(result, operation.twin(*inputs))
    num_bytes = sum(t.numel() * t.element_size() for t in (*inputs, *result))
    del result
    timing = time_call(lambda: operation.call(*inputs))
    source = torch.empty(num_bytes // 2, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copy_us = time_call(lambda: target.copy_(source)).us
    gbps = num_bytes / timing.us / 1e3
    return {
        "op": operation.op,
        "m": m,
        "n": n,
        "us": timing.us,
        "us_min": timing.us_min,
        "gbps": gbps,
        "ceiling_gbps": ceiling_gbps,
        "share": gbps / ceiling_gbps,
        "equal": equal,
        "peers": {COPY: copy_us},
    }


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the benchmark to ``megamoe bench``."""
    parser = subparsers.add_parser("quant", help="casts and scale layouts", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of result files to merge into (default: print only)")
    parser.add_argument("--commit", help="what is measured, where this copy has no .git")
    parser.add_argument("--op", default="", help="only operations whose name contains this")
    parser.add_argument("--shape", type=_shape, action="append", help="M,N in place of the usual shapes; may repeat")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, and merge into the result file."""
    chosen = [operation for operation in operations() if arguments.op in operation.op]
    if not chosen:
        raise ValueError(f"no operation contains {arguments.op!r}: {', '.join(o.op for o in operations())}")
    if not torch.cuda.is_available():
        raise ValueError("bench quant needs a CUDA device, none is visible")
    source: Row = {}
    if arguments.out:
        source = provenance("python -m megamoe " + shlex.join(sys.argv[1:]), commit=arguments.commit)
    ceiling = copy_ceiling_gbps()
    rows = []
    for row in _rows(chosen, arguments.shape, ceiling):
        rows.append(row)
        print(f"{row['op']:56} {row['m']:>8} x {row['n']:<6} {row['us']:9.1f} us  {row['share']:6.1%}", flush=True)
        if arguments.out:
            save(arguments.out, "quant", [{**row, **source}])
    _print(rows, ceiling)
    return 0


def _rows(chosen: Iterable[Operation], shapes: list[tuple[int, int]] | None, ceiling: float) -> Iterator[Row]:
    for operation in chosen:
        for m, n in shapes or shapes_of(operation.op):
            yield measure(operation, m, n, ceiling)
            torch.cuda.empty_cache()


def _print(rows: list[Row], ceiling: float) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"copy ceiling {ceiling:.0f} GB/s")
    for name in ("operation", "m x n", "us", "GB/s", "of ceiling", "copy / ours", "equal to twin"):
        table.add_column(name, justify="left" if name == "operation" else "right")
    for row in rows:
        ratio = row["peers"][COPY] / row["us"]
        cells = (f"{row['us']:.1f}", f"{row['gbps']:.0f}", f"{row['share']:.1%}", f"{ratio:.2f}", f"{row['equal']:.6f}")
        table.add_row(row["op"], f"{row['m']} x {row['n']}", *cells)
    Console().print(table)


def _cast(name: str, make: Callable[[int, int], Result], **options: object) -> Operation:
    words = [f"{key}={value.name if isinstance(value, Activation) else value}" for key, value in options.items()]
    if make is _fp32:
        words.append("fp32")
    return Operation(
        " ".join([name, *words]),
        make,
        lambda x: tuple(getattr(casts, name)(x, **options)),
        lambda x: tuple(getattr(reference, name)(x, **options)),
    )


def _generator() -> torch.Generator:
    return torch.Generator("cuda").manual_seed(0)


def _fp32(m: int, n: int) -> Result:
    return (torch.randn(m, n, generator=_generator(), device="cuda"),)


def _bf16(m: int, n: int) -> Result:
    return (torch.randn(m, n, generator=_generator(), device="cuda", dtype=torch.bfloat16),)


def _gate_up(m: int, n: int) -> Result:
    return _bf16(m, 2 * n)


def _powers(m: int, n: int) -> Result:
    return (torch.exp2(torch.randint(-20, 20, (m, n), generator=_generator(), device="cuda").float()),)


def _offsets(m: int, groups: int = 32) -> torch.Tensor:
    cuts = torch.randint(0, m, (groups - 1,), generator=_generator(), device="cuda").sort().values
    return torch.cat([cuts.new_zeros(1), cuts, cuts.new_full((1,), m)]).int()


def _equal_share(actual: Result, expected: Result) -> float:
    """Share of elements with equal bits; memory is short at these sizes, so twins were made one operation at a time."""
    equal = total = 0
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape)
        kind = torch.uint8 if a.element_size() == 1 else torch.int32
        equal += int((a.view(kind) == b.view(kind)).sum())
        total += a.numel()
    return equal / max(total, 1)


def _shape(text: str) -> tuple[int, int]:
    m, _, n = text.partition(",")
    return int(m), int(n)
