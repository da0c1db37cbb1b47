"""A run's checkpoints: ``checkpoint-STEP.safetensors``, which any number of ranks can go on from.

``megamoe.checkpoint`` writes model and optimiser, one tensor an expert; step, options and figures so far are JSON in
the file's header. Batches depend on the step alone, so nothing else needs keeping.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from megamoe.checkpoint import save_safetensors
from megamoe.engines.liveness import naming
from megamoe.lm.world import World

_NAME = re.compile(r"checkpoint-(\d{6,})\.safetensors")
_KEY = "megamoe.lm"
KEEP = 2


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], world: World) -> Path:
    """Write the checkpoint of ``state["step"]`` and drop all but the newest ``KEEP``; collective, rank 0 writes.

    The file appears when it is complete: a crash leaves the checkpoint before it, never half of one. ``state`` holds
    JSON types alone.
    """
    path = folder / f"checkpoint-{state['step']:06d}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    with naming(world.group, "checkpoint"):
        save_safetensors(model, path, optimizer, metadata={_KEY: json.dumps(state)})
    if world.rank == 0:
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
    if _KEY not in metadata:
        raise ValueError(
            f"{path} must carry {_KEY!r} in its header, got only {sorted(metadata)}: not a run of this job"
        )
    state: dict[str, Any] = json.loads(metadata[_KEY])
    return state


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
