"""What the tests about the repository itself share: its root and its files."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("kernels", "symm_mem", "dispatch")


@cache
def is_checkout() -> bool:
    """Whether ROOT is the top of a git checkout with the house's links (not an unpacked sdist)."""
    return (ROOT / ".git").exists() and (ROOT / "kernels").is_dir()


@cache
def tracked() -> tuple[str, ...]:
    """Paths that git tracks and that exist, relative to ROOT, links included as themselves."""
    out = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return tuple(sorted(p for p in out.split("\0") if p and ((ROOT / p).is_symlink() or (ROOT / p).exists())))


def library_files(suffix: str) -> list[Path]:
    """Files of the importable package, seen through the links: ``megamoe/kernels/...``; relative to ROOT."""
    rooms = [ROOT / "megamoe", *(ROOT / "megamoe" / name for name in LINKED)]
    found = {path.relative_to(ROOT) for room in rooms for path in room.rglob(f"*{suffix}")}
    return sorted(path for path in found if "__pycache__" not in path.parts)
