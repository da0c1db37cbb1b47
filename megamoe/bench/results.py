"""Measured rows in ``docs/results/<benchmark>-<machine>.json``: merge new ones over old ones of the same key.

A file holds ``benchmark``, ``machine`` ("2x NVIDIA H200") and ``rows``. Each row carries the fields of its key
(``KEYS``; absent means not applicable), what was measured, and where it comes from: ``date``, ``commit``,
``command``, ``versions``.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]

# What tells two rows of one benchmark on one machine apart.
KEYS: dict[str, tuple[str, ...]] = {
    "gemm": ("grouping", "recipe", "accumulate", "layout", "out", "groups", "m", "n", "k"),
    "quant": ("op", "m", "n"),
    "accuracy": ("grouping", "recipe"),  # of the GEMMs
    "moe": ("case", "recipe", "direction", "accumulate", "engine", "world_size", "tokens", "sms"),
    "trace": ("case", "recipe", "accumulate", "engine", "world_size", "tokens", "sms"),
    "train": ("case", "recipe", "direction", "accumulate", "engine", "world_size", "tokens"),
    "generate": ("model", "recipe", "engine", "graphs", "world_size", "tokens", "new_tokens_each"),
    "megatron": ("model", "recipe", "engine", "world_size", "tokens"),
    "scale": ("what", "recipe", "engine", "world_size"),
    "host": ("what", "when", "rank", "world_size"),  # what calls cost the host: docs/generation.md
    "tuning": ("run", "case", "recipe", "world_size", "tokens", "variant"),  # patched kernels: docs/performance.md
    "check": ("what",),  # one test of a GPU, by its name; written by pytest --record
}
PROVENANCE = ("date", "commit", "command", "versions")


def provenance(command: str, *, commit: str | None = None, peers: Iterable[str] = ()) -> Row:
    """The fields of ``PROVENANCE`` for a row measured now; ``peers`` are distribution names whose versions count.

    ``commit`` is needed where the copy has no ``.git``; raises ValueError without either.
    """
    if commit is None:
        git = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "--short=12", "HEAD"]
        done = subprocess.run(git, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError("this copy has no .git: pass the commit that is measured")
        commit = done.stdout.strip()
    versions: Row = {"torch": torch.__version__, "cuda": torch.version.cuda, "driver": driver_version()}
    versions["peers"] = {peer: metadata.version(peer) for peer in peers}
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"date": date, "commit": commit, "command": command, "versions": versions}


def driver_version() -> str | None:
    """Version of the CUDA driver's package ("580.65.06"), None without one."""
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip() or None


def machine_name() -> str:
    """Number and name of the GPUs ("2x NVIDIA H200"), or "CPU" where none is visible."""
    count = torch.cuda.device_count()
    return f"{count}x {torch.cuda.get_device_name(0)}" if count else "CPU"


def path_of(folder: Path, benchmark: str, machine: str) -> Path:
    """("moe", "2x NVIDIA H200") -> folder/moe-2x-nvidia-h200.json."""
    return folder / f"{benchmark}-{re.sub(r'[^a-z0-9]+', '-', machine.lower()).strip('-')}.json"


def key_of(benchmark: str, row: Row) -> tuple[Any, ...]:
    """What identifies ``row``. Raises ValueError for an unknown benchmark."""
    if benchmark not in KEYS:
        raise ValueError(f"benchmark must be one of {', '.join(KEYS)}, got {benchmark!r}")
    return tuple(row.get(field) for field in KEYS[benchmark])


def merge(benchmark: str, old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """``old`` with every row of the same key as one of ``new`` replaced by it, sorted by key."""
    rows = {key_of(benchmark, row): row for row in old}
    for row in new:
        if missing := [field for field in PROVENANCE if field not in row]:
            raise ValueError(f"a row of {benchmark} lacks {', '.join(missing)}: {row}")
        rows[key_of(benchmark, row)] = row
    return [rows[key] for key in sorted(rows, key=lambda key: [sortable(part) for part in key])]


def sortable(value: Any) -> tuple[bool, Any]:
    """Sorts absent values (None) before all others."""
    return value is not None, 0 if value is None else value


def load(path: Path) -> list[Row]:
    """Rows of one file with its ``benchmark`` and ``machine`` added to each; [] if there is no such file."""
    if not path.exists():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    return [{"benchmark": content["benchmark"], "machine": content["machine"], **row} for row in content["rows"]]


def save(folder: Path, benchmark: str, rows: Iterable[Row], *, machine: str | None = None) -> Path:
    """Merge ``rows`` into the file of ``benchmark`` on ``machine`` (this one by default) and return its path."""
    machine = machine or machine_name()
    path = path_of(folder, benchmark, machine)
    old = [{name: value for name, value in row.items() if name not in ("benchmark", "machine")} for row in load(path)]
    lines = ",\n  ".join(json.dumps(row, sort_keys=True) for row in merge(benchmark, old, rows))
    head = f'"benchmark": {json.dumps(benchmark)},\n "machine": {json.dumps(machine)}'
    folder.mkdir(parents=True, exist_ok=True)
    # One row a line keeps diffs small; the rename keeps readers from half a file.
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False, encoding="utf-8") as file:
        file.write(f'{{{head},\n "rows": [\n  {lines}\n ]}}\n')
    os.replace(file.name, path)
    return path
