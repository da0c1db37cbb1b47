"""Experts of a pretrained checkpoint as one rank's weights: only its own are read, one at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megamoe.dispatch.placement import Placement, contiguous
from megamoe.kernels.quant.mxfp4 import ScaleChoice
from megamoe.prepared import (
    PreparedRecipe,
    PreparedWeights,
    checked_recipe,
    empty_scale,
    empty_values,
    weight_scale_shape,
)
from megamoe.pretrained.files import TensorFiles
from megamoe.pretrained.layers import KINDS, Expert, MoeLayer, find_layers
from megamoe.pretrained.matrix import Matrix, Plain, moved, to_recipe
from megamoe.pretrained.report import ErrorReport
from megamoe.pretrained.stacked import Biases
from megamoe.problem import Problem
from megamoe.weights import ExpertWeights


class PretrainedExperts:
    """The experts of a checkpoint: a safetensors file, or a folder with ``model.safetensors.index.json``.

    ``layers`` are found by names, without opening a shard. Close it, or use it in a ``with`` block.

    Raises:
        ValueError: nothing there, no experts, or names that do not add up, with the tensor's name.

    Example:
        >>> with PretrainedExperts("DeepSeek-V3") as experts:  # doctest: +SKIP
        ...     weights, report = experts.prepared(experts.layers[0], problem, rank=3)
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.files = TensorFiles(path)
        self.layers: list[MoeLayer] = find_layers(self.files)

    def __enter__(self) -> PretrainedExperts:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self.files.close()

    def read(self, layer: MoeLayer, expert: int) -> Expert:
        """One expert in the checkpoint's own form. Raises ValueError that names what does not fit."""
        if not 0 <= expert < layer.num_experts:
            raise ValueError(f"expert must lie in [0, {layer.num_experts}), got {expert}")
        return layer.read(self.files, expert)

    def prepared(
        self,
        layer: MoeLayer,
        problem: Problem,
        *,
        rank: int = 0,
        placement: Placement | None = None,
        device: torch.device | str = "cpu",
        mxfp4_scales: ScaleChoice = "ceil",
        progress: bool = False,
    ) -> tuple[PreparedWeights, ErrorReport]:
        """The experts that ``rank`` holds, in the form of ``problem.recipe``, and what that cost in precision.

        Args:
            placement: which rank holds which expert; contiguous over ``problem.world_size`` ranks if None.
            device: where conversion runs and the weights end.
            mxfp4_scales: as in ``cast_mxfp4``, where recipe mxfp4 is not what the checkpoint holds.
            progress: show a bar on stderr.

        Raises:
            ValueError: the layer does not fit ``problem``, or a tensor is missing, misshapen, of the wrong dtype or not
                finite; it names tensor and file.
        """
        recipe = checked_recipe(problem.recipe)
        report = ErrorReport()
        device = torch.device(device)
        stacks: dict[str, torch.Tensor] = {}

        def take(slot: int, slots: int, number: int, expert: Expert) -> None:
            made = []
            for kind, matrix in zip(KINDS, expert.matrices, strict=True):
                before = moved(matrix, device)
                after = to_recipe(before, recipe, mxfp4_scales=mxfp4_scales)
                report.measure(f"{layer.prefix}experts.{number}.{kind}", before.dequantise(), after.dequantise())
                made.append(after)
            for name, parts in (("w13", made[:2]), ("w2", made[2:])):
                _stack(stacks, name, parts, recipe, at=(slot, slots))

        biases = self._visit(layer, problem, take, rank=rank, placement=placement, progress=progress)
        on_device = {name: bias.to(device, torch.float32) for name, bias in biases.items()}
        return PreparedWeights(recipe=recipe, **stacks, **on_device), report

    def floating(
        self,
        layer: MoeLayer,
        problem: Problem,
        *,
        rank: int = 0,
        placement: Placement | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        progress: bool = False,
    ) -> ExpertWeights:
        """The experts that ``rank`` holds as master weights in ``dtype`` (bf16 or fp32); else as ``prepared``."""
        stacks: dict[str, torch.Tensor] = {}

        def take(slot: int, slots: int, number: int, expert: Expert) -> None:
            for name, parts in (("w13", expert.matrices[:2]), ("w2", expert.matrices[2:])):
                w = torch.cat([part.dequantise() for part in parts])
                if slot == 0:
                    stacks[name] = torch.empty((slots, *w.shape), dtype=dtype, device=device)
                stacks[name][slot].copy_(w)

        biases = self._visit(layer, problem, take, rank=rank, placement=placement, progress=progress)
        return ExpertWeights(**stacks, **{name: bias.to(device, dtype) for name, bias in biases.items()})

    def _visit(
        self,
        layer: MoeLayer,
        problem: Problem,
        take: Callable[[int, int, int, Expert], None],
        *,
        rank: int,
        placement: Placement | None,
        progress: bool,
    ) -> dict[str, torch.Tensor]:
        """Call ``take(slot, slots, expert id, expert)`` for every slot of ``rank``; the stacked biases."""
        if layer.num_experts != problem.num_experts:
            raise ValueError(f"{layer.prefix}experts has {layer.num_experts} experts, expected {problem.num_experts}")
        if layer.bias != problem.bias:
            raise ValueError(f"{layer.prefix}experts has bias {layer.bias}, but problem.bias is {problem.bias}")
        if not problem.activation.gated:
            raise ValueError(f"{layer.prefix}experts are gated, but activation {problem.activation.name} is not")
        placement = placement or contiguous(problem.num_experts, problem.world_size)
        if not 0 <= rank < placement.world_size:
            raise ValueError(f"rank must lie in [0, {placement.world_size}), got {rank}")
        mine: list[int] = placement.slot_to_expert[rank].tolist()
        sizes = layer.sizes(self.files, mine[0])
        if sizes != (problem.hidden, problem.intermediate):
            raise ValueError(
                f"{layer.prefix}experts in {self.files.path} have hidden {sizes[0]} and intermediate {sizes[1]}, "
                f"expected {problem.hidden} and {problem.intermediate}"
            )
        biases: list[Biases] = []
        with progress_bar(progress, layer.prefix.rstrip("."), len(mine)) as advance:
            for slot, number in enumerate(mine):
                found = layer.sizes(self.files, number)
                if found != sizes:
                    raise ValueError(
                        f"{layer.prefix}experts.{number} has (H, I) = {found}, expert {mine[0]} {sizes}: "
                        "experts of a layer must be alike"
                    )
                expert = self.read(layer, number)
                take(slot, len(mine), number, expert)
                if expert.biases is not None:
                    biases.append(expert.biases)
                advance()
        if not layer.bias:
            return {}
        return {
            "b13": torch.stack([torch.cat((gate, up)) for gate, up, _ in biases]),
            "b2": torch.stack([down for _, _, down in biases]),
        }


def _stack(
    stacks: dict[str, torch.Tensor], name: str, parts: list[Matrix], recipe: PreparedRecipe, *, at: tuple[int, int]
) -> None:
    """Put ``parts``, matrices of equal shape one upon the other, into slot at[0] of at[1] of the rank's tensors."""
    slot, slots = at
    values = torch.cat([part.values.view(torch.uint8) if recipe != "bf16" else part.values for part in parts])
    values = values if recipe == "bf16" else values.view(parts[0].values.dtype)
    rows, columns = values.shape[0], values.shape[1] * (2 if recipe == "mxfp4" else 1)
    shape = weight_scale_shape(rows, columns, recipe, parts=len(parts))
    if slot == 0:
        stacks[name] = empty_values((slots, rows, columns), recipe, values.device)
        if shape is not None:
            stacks[f"{name}_scale"] = empty_scale((slots, *shape), recipe, values.device)
    stacks[name][slot].copy_(values)
    if shape is not None:
        scales = [part.scale for part in parts if not isinstance(part, Plain)]
        stacks[f"{name}_scale"][slot].copy_(torch.cat(scales))


@contextmanager
def progress_bar(show: bool, what: str, count: int) -> Iterator[Callable[[], None]]:
    """A function that moves the bar on by one; the bar goes to stderr."""
    if not show:
        yield lambda: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=count)
        yield lambda: bar.advance(task)
