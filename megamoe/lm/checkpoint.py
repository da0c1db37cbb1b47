"""Checkpoints: one safetensors file a step, whole tensors inside, so that any number of ranks can go on from it.

Names: ``model/NAME`` (parameters and buffers; experts in full, [E, ...]), ``exp_avg/NAME`` and ``exp_avg_sq/NAME``
(AdamW). Everything else (step, options, figures so far) is JSON in the file's metadata. The file is written beside its
place, flushed and renamed: a crash leaves the checkpoint before it, never half of one.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from megamoe.lm.parameters import Parameters

_NAME = re.compile(r"checkpoint-(\d{6,})\.safetensors")
_FORMAT = 1
_MOMENTS = ("exp_avg", "exp_avg_sq")
KEEP = 2


def save(
    folder: Path, model: nn.Module, parameters: Parameters, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> Path:
    """Write ``checkpoint-STEP.safetensors`` and drop all but the newest ``KEEP``; collective, rank 0 writes.

    ``state`` must hold ``step``; JSON types alone.
    """
    world = parameters.world
    tensors: dict[str, torch.Tensor] = {f"model/{n}": b.detach().cpu() for n, b in _buffers(model).items()}
    for name, p in parameters.all.items():
        moments = {k: optimizer.state[p].get(k, torch.zeros_like(p)) for k in _MOMENTS}
        for kind, tensor in {"model": p.detach(), **moments}.items():
            whole = world.gather_rows(tensor, "checkpoint") if name in parameters.experts else tensor
            if world.rank == 0:
                tensors[f"{kind}/{name}"] = whole.cpu().contiguous()
    path = folder / f"checkpoint-{state['step']:06d}.safetensors"
    if world.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(tensors, partial, metadata={"format": str(_FORMAT), "state": json.dumps(state)})
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        for old in list_checkpoints(folder)[:-KEEP]:
            old.unlink()
    return path


def read_state(path: Path) -> dict[str, Any]:
    """The JSON part: step, options, figures.

    Raises:
        ValueError: not a checkpoint of this job.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except Exception as error:  # safetensors has its own exception type for a damaged header
        raise ValueError(f"{path} is not a readable checkpoint: {error}") from None
    if metadata.get("format") != str(_FORMAT):
        raise ValueError(f"{path}: checkpoint format must be {_FORMAT}, got {metadata.get('format')}")
    state: dict[str, Any] = json.loads(metadata["state"])
    return state


@torch.no_grad()
def load(path: Path, model: nn.Module, parameters: Parameters, optimizer: torch.optim.Optimizer, *, step: int) -> None:
    """Fill model and optimiser; each rank reads its experts alone."""
    world = parameters.world
    with safe_open(path, framework="pt") as file:
        for name, buffer in _buffers(model).items():
            buffer.copy_(file.get_tensor(f"model/{name}"))
        for name, p in parameters.all.items():
            rows = slice(world.rank * len(p), (world.rank + 1) * len(p)) if name in parameters.experts else slice(None)
            p.copy_(file.get_slice(f"model/{name}")[rows])
            moments = {k: file.get_slice(f"{k}/{name}")[rows].to(p.device) for k in _MOMENTS}
            optimizer.state[p] = {"step": torch.tensor(float(step), device=p.device), **moments}


def find(place: Path) -> Path:
    """``place`` itself if it is a file, else the newest checkpoint in it, else in its newest sub-folder that has one.

    Raises:
        ValueError: none there.
    """
    if place.is_file():
        return place
    here = list_checkpoints(place)
    below = [] if here else [c for d in place.glob("*/") for c in list_checkpoints(d)[-1:]]
    newest = here[-1:] or sorted(below, key=lambda c: c.stat().st_mtime)[-1:]
    if not newest:
        raise ValueError(f"--resume found no checkpoint-*.safetensors in {place}")
    return newest[0]


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in ``folder``, oldest step first."""
    found = [(int(m[1]), p) for p in folder.glob("checkpoint-*.safetensors") if (m := _NAME.fullmatch(p.name))]
    return [p for _, p in sorted(found)]


def _buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that belong in a checkpoint, such as a router's balancing bias; equal on all ranks."""
    keys = model.state_dict().keys()
    return {n: b for n, b in sorted(model.named_buffers()) if n in keys}
