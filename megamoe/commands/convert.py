"""``python -m megamoe convert``: a checkpoint's experts in another format, and what that cost in precision."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from rich.console import Console

from megamoe.kernels.quant.mxfp4 import ScaleChoice
from megamoe.pretrained.convert import RECIPE_FORMATS, convert
from megamoe.pretrained.layers import FORMATS, PROJECTIONS


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser("convert", help="a checkpoint's experts in another format", description=__doc__)
    parser.add_argument("source", type=Path, help="safetensors file, or folder with model.safetensors.index.json")
    parser.add_argument("target", type=Path, help="new folder")
    choices = sorted({*FORMATS, *RECIPE_FORMATS})
    aliases = ", ".join(f"{name} means {to}" for name, to in RECIPE_FORMATS.items() if name != to)
    parser.add_argument("--to", choices=choices, required=True, help=f"format of the experts; {aliases}")
    parser.add_argument("--naming", choices=tuple(PROJECTIONS), help="gate_proj, ... or w1, ... (default: as it was)")
    scales = "scale of an MXFP4 block: the least that clips nothing, the MX specification's, or the least squared error"
    parser.add_argument("--mxfp4-scales", choices=get_args(ScaleChoice), default="ceil", help=scales)
    parser.add_argument("--experts-only", action="store_true", help="leave out everything that is not an expert")
    parser.add_argument("--shard-gb", type=float, default=5.0, help="most GB of a file (default 5)")
    parser.add_argument("--device", default="cpu", help="where conversion runs (default cpu)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="the error of every tensor, a line of JSON each")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Convert; print errors by layer and in total; 0."""
    if arguments.shard_gb <= 0:
        raise ValueError(f"--shard-gb must be greater than 0, got {arguments.shard_gb}")
    done = convert(
        arguments.source,
        arguments.target,
        arguments.to,
        naming=arguments.naming,
        mxfp4_scales=arguments.mxfp4_scales,
        experts_only=arguments.experts_only,
        shard_bytes=int(arguments.shard_gb * 1e9),
        device=arguments.device,
        progress=not arguments.quiet,
    )
    if arguments.report:
        done.report.save(arguments.report)
    console = Console(soft_wrap=True)
    console.print(done.report.table())
    formats = ", ".join(sorted({layer.format_name for layer in done.layers}))
    console.print(f"{len(done.layers)} layers from {formats} to {arguments.to}: {done.report.summary()}")
    console.print(f"wrote {done.num_bytes / 1e6:.1f} MB to {arguments.target}")
    return 0
