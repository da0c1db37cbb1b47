"""A whole checkpoint rewritten with its experts in another format, one expert in memory at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megamoe.checkpoint.safetensors import INDEX
from megamoe.kernels.quant.mxfp4 import ScaleChoice
from megamoe.pretrained.files import ShardWriter
from megamoe.pretrained.layers import KINDS, Expert, MoeLayer, Naming, converted, format_named, tensors_of
from megamoe.pretrained.load import PretrainedExperts, progress_bar
from megamoe.pretrained.matrix import moved
from megamoe.pretrained.report import ErrorReport
from megamoe.pretrained.stacked import GptOss

RECIPE_FORMATS = {"bf16": "bf16", "fp8_block": "fp8_block", "mxfp4": "deepseek_v4"}
"""The format that a recipe's own name stands for."""


@dataclass(frozen=True)
class Conversion:
    """What ``convert`` did: bytes written, errors of every expert matrix, layers."""

    num_bytes: int
    report: ErrorReport
    layers: tuple[MoeLayer, ...]


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: str,
    *,
    naming: Naming | None = None,
    mxfp4_scales: ScaleChoice = "ceil",
    experts_only: bool = False,
    shard_bytes: int = 5 << 30,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Conversion:
    """Write ``source`` to the new folder ``target`` with all experts in format ``to``; everything else as it is.

    Args:
        to: one of ``layers.FORMATS``, or ``mxfp4`` for deepseek_v4.
        naming: of the experts' matrices; that of the source if None (``proj`` for gpt-oss).
        mxfp4_scales: as in ``cast_mxfp4``, where MXFP4 is not what the source holds.
        experts_only: leave everything else out.
        shard_bytes: most bytes of a file; a larger tensor gets one of its own.
        device: where conversion runs.
        progress: show a bar on stderr, one step an expert.

    Raises:
        ValueError: a format that is unknown or cannot hold these sizes; ``target`` holds a checkpoint; a tensor of the
            source that is missing, misshapen, of the wrong dtype or not finite, by name. ``target`` is then no
            checkpoint: its index is written last.
    """
    target_format = format_named(RECIPE_FORMATS.get(to, to))
    there = torch.device(device)
    report = ErrorReport()

    def one(experts: PretrainedExperts, layer: MoeLayer, number: int) -> Expert:
        read = experts.read(layer, number)
        gate, up, down = (moved(matrix, there) for matrix in read.matrices)
        before = Expert((gate, up, down), read.biases)
        after = converted(before, target_format.form, mxfp4_scales=mxfp4_scales)
        for kind, was, is_now in zip(KINDS, before.matrices, after.matrices, strict=True):
            report.measure(
                f"{layer.prefix}experts.{number}.{kind}", was.dequantise(), target_format.stored(is_now).dequantise()
            )
        return after

    def everything(experts: PretrainedExperts, advance: Callable[[], None]) -> Iterator[tuple[str, torch.Tensor]]:
        if not experts_only:
            expert_names = {name for layer in experts.layers for name in layer.names}
            for name in experts.files.names:
                if name not in expert_names:
                    yield name, experts.files.read(name)
        for layer in experts.layers:
            # gpt-oss stacks a layer's experts; all other formats need only one in memory.
            at_once = layer.num_experts if isinstance(target_format, GptOss) else 1
            for first in range(0, layer.num_experts, at_once):
                batch = []
                for number in range(first, first + at_once):
                    batch.append(one(experts, layer, number))
                    advance()
                yield from tensors_of(layer.prefix, batch, target_format, naming or layer.naming, first).items()

    with PretrainedExperts(source) as experts:
        writer = ShardWriter(target, shard_bytes=shard_bytes)
        count = sum(layer.num_experts for layer in experts.layers)
        try:
            with progress_bar(progress, f"experts to {target_format.name}", count) as advance:
                for name, tensor in everything(experts, advance):
                    writer.add(name, tensor)
            num_bytes = writer.finish({"experts_format": target_format.name})
        except BaseException:
            writer.abandon()
            raise
        if not experts_only:
            _copy_beside(experts.files.path, Path(target))
        return Conversion(num_bytes, report, tuple(experts.layers))


def _copy_beside(source: Path, target: Path) -> None:
    """config.json, tokenizer and whatever else lies beside the tensors (plain files of the top folder)."""
    if source.is_dir():
        for file in sorted(source.iterdir()):
            if file.is_file() and file.suffix != ".safetensors" and file.name != INDEX and file.name[0] != ".":
                shutil.copy2(file, target / file.name)
