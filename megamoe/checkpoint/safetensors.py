"""safetensors files with one tensor an expert: one file, or one a rank with an index.

The folder is laid out as Hugging Face lays out sharded checkpoints: ``model.safetensors.index.json`` with a
``weight_map`` from tensor to file. Every rank writes the experts it holds and reads those it needs, whatever the number
of ranks was; a file without any of them is never opened.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from megamoe.checkpoint.entries import OPTIMIZER, Entry, check, entries
from megamoe.checkpoint.full import gather
from megamoe.checkpoint.portable import init_optimizer_state
from megamoe.engines.liveness import naming

INDEX = "model.safetensors.index.json"


@torch.no_grad()
def save_safetensors(
    module: nn.Module,
    path: str | os.PathLike[str],
    optimizer: torch.optim.Optimizer | None = None,
    *,
    metadata: dict[str, str] | None = None,
) -> None:
    """Save a model, and on request its optimiser's tensors; a collective of all ranks.

    Args:
        module: the model.
        path: ``*.safetensors`` for one file, which the first rank writes after gathering everything to its memory;
            anything else is a new folder with one file a rank, nothing gathered but FSDP's shards.
        optimizer: its state tensors go along; hyperparameters do not.
        metadata: strings to keep in the file's header, or in the index.

    Raises:
        FileExistsError: the folder already holds a checkpoint: half of an old one must never be taken for a new one.
        OSError: a rank could not write; raised on every rank. A single file is replaced only once it is complete.
    """
    path = Path(path)
    found = entries(module, optimizer)
    single = path.suffix == ".safetensors"
    _on_all_ranks(lambda: None if single or _rank() else _new_folder(path))
    tensors = dict(_gathered(found) if single else _own(found))
    name = path.name if single else f"model-{_rank() + 1:05d}-of-{_world_size():05d}.safetensors"
    folder = path.parent if single else path

    def write() -> dict[str, int]:
        if tensors:
            header = {"format": "pt", **(metadata or {})}
            partial = folder / f".{name}.partial"
            save_file({n: t.contiguous() for n, t in tensors.items()}, partial, header)
            os.replace(partial, folder / name)
        return {n: t.numel() * t.element_size() for n, t in tensors.items()}

    written = _on_all_ranks(write)

    def write_index() -> None:
        weight_map = {
            n: f"model-{rank + 1:05d}-of-{len(written):05d}.safetensors"
            for rank, sizes in enumerate(written)
            for n in sizes
        }
        total = sum(sum(sizes.values()) for sizes in written)
        index = {"metadata": {**(metadata or {}), "total_size": total}, "weight_map": weight_map}
        partial = folder / f".{INDEX}.partial"
        partial.write_text(json.dumps(index, indent=1, sort_keys=True))
        os.replace(partial, folder / INDEX)

    _on_all_ranks(lambda: None if single or _rank() else write_index())


def load_safetensors(
    module: nn.Module,
    path: str | os.PathLike[str],
    optimizer: torch.optim.Optimizer | None = None,
    *,
    strict: bool = True,
) -> dict[str, str]:
    """Load what ``save_safetensors`` saved, with any number of ranks; each reads only its own experts.

    Args:
        module: the model.
        path: the file or the folder.
        optimizer: to be loaded too; without it the checkpoint's optimiser tensors are passed over.
        strict: whether tensors that the model does not have are an error.

    Returns:
        the metadata given when saving.

    Raises:
        ValueError: missing, unexpected or wrongly shaped tensors, named; nothing is overwritten then.
    """
    path = Path(path)
    if optimizer is not None:
        init_optimizer_state(optimizer)
    found = entries(module, optimizer)
    with ExitStack() as stack:
        files: dict[Path, Any] = {}

        def opened(file: Path) -> Any:
            if file not in files:
                files[file] = stack.enter_context(safe_open(file, framework="pt"))
            return files[file]

        if path.is_dir():
            index = json.loads((path / INDEX).read_text())
            where = {name: path / file for name, file in index["weight_map"].items()}
            metadata = {k: v for k, v in index["metadata"].items() if k != "total_size"}
        else:
            where = dict.fromkeys(opened(path).keys(), path)
            metadata = {k: v for k, v in (opened(path).metadata() or {}).items() if k != "format"}
        if optimizer is None:
            where = {name: file for name, file in where.items() if not name.startswith(OPTIMIZER)}
        mine = [name for entry in found for name in _local_names(entry) if name in where]
        shapes = {name: tuple(opened(where[name]).get_slice(name).get_shape()) for name in mine}
        check(found, shapes, where, strict)
        for entry in found:
            entry.fill(lambda name: opened(where[name]).get_tensor(name))
    return metadata


def _local_names(entry: Entry) -> list[str]:
    if entry.experts is None:
        return [entry.name]
    return [entry.portable_name(expert) for expert in entry.experts.local_experts]


def _gathered(found: list[Entry]) -> Iterator[tuple[str, torch.Tensor]]:
    """Everything, on the first rank; the others only take part."""
    keep = _rank() == 0
    for entry in found:
        full = gather(entry, keep)
        if keep and entry.experts is None:
            yield entry.name, full
        elif keep:
            yield from zip(entry.portable_names(), full, strict=True)


def _own(found: list[Entry]) -> Iterator[tuple[str, torch.Tensor]]:
    """What this rank writes: all that is replicated on the first rank; each expert's first copy in the first group."""
    writers = _writing_groups(found)
    for entry in found:
        whole = entry.whole()
        if entry.experts is None:
            if _rank() == 0:
                yield entry.name, whole.to("cpu", copy=True)
            continue
        placement = entry.experts.placement
        if writers[entry.name] != _members(entry):
            continue
        rank = 0 if entry.experts.group is None else dist.get_rank(entry.experts.group)
        first = placement.expert_slots()[:, 0].tolist()
        for slot, expert in enumerate(entry.experts.local_experts):
            if first[expert] == rank * placement.slots_per_rank + slot:
                yield entry.portable_name(expert), whole[slot].cpu()


def _writing_groups(found: list[Entry]) -> dict[str, list[int]]:
    """For every expert tensor the group that saves it, where several hold the same: the one with the lowest ranks."""
    mine = {entry.name: _members(entry) for entry in found if entry.experts is not None}
    chosen: dict[str, list[int]] = {}
    for theirs in _on_all_ranks(lambda: mine):
        for name, members in theirs.items():
            chosen[name] = min(chosen.get(name, members), members)
    return chosen


def _members(entry: Entry) -> list[int]:
    assert entry.experts is not None
    group = entry.experts.group
    return [_rank()] if group is None else sorted(dist.get_process_group_ranks(group))


def _new_folder(path: Path) -> None:
    if (path / INDEX).exists():
        raise FileExistsError(f"{path} already holds a checkpoint; save each into a folder of its own")
    path.mkdir(parents=True, exist_ok=True)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _on_all_ranks(action: Callable[[], Any]) -> list[Any]:
    """Run ``action`` on every rank and return all results; what stops one rank is raised on all of them."""
    result: Any = None
    error: OSError | None = None
    try:
        result = action()
    except FileExistsError as caught:
        error = caught
    except Exception as caught:  # the others must not wait for a rank that has left
        error = OSError(f"rank {_rank()} could not save: {type(caught).__name__}: {caught}")
        error.__cause__ = caught
    outcomes: list[Any] = [(result, error)]
    if dist.is_initialized():
        outcomes = [None] * dist.get_world_size()
        with naming(dist.group.WORLD, "saving a checkpoint"):
            dist.all_gather_object(outcomes, (result, error))
    for _, failure in outcomes:
        if failure is not None:
            raise failure
    return [outcome for outcome, _ in outcomes]
