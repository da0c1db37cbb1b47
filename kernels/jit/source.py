"""``KernelSource``: the whole truth about one kernel before it is compiled. Pure text, no compiler, no driver."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from megamoe.errors import CompileError

INCLUDE_ROOT = Path(__file__).resolve().parents[1] / "include"
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(?:"([^"\n]+)"|<([^>\n]+)>)', re.MULTILINE)


@dataclass(frozen=True)
class KernelSource:
    """One kernel as text.

    Args:
        name: what files, logs and the cache call it; letters, digits, ``_``, ``-`` and ``.``.
        code: CUDA C++. ``#include "megamoe/..."`` names a header of ``kernels/include``; ``cuda_fp8.h``,
            ``cuda_bf16.h`` and their like may be included with angle brackets.
        entry: the ``extern "C" __global__`` function to launch.
        options: compiler options beyond the ones every kernel gets (see ``compiler.py``); spelled so that NVRTC and
            nvcc both know them, such as ``--use_fast_math`` or ``-lineinfo``.
        arch: ``sm_90a`` or another real architecture.
    """

    name: str
    code: str
    entry: str
    options: tuple[str, ...] = ()
    arch: str = "sm_90a"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]{1,120}", self.name):
            raise ValueError(f"name must be 1 to 120 letters, digits, '_', '-' or '.', got {self.name!r}")
        if not re.fullmatch(r"[A-Za-z_]\w*", self.entry):
            raise ValueError(f"entry must be a C identifier, got {self.entry!r}")
        if not re.fullmatch(r"sm_\d+[af]?", self.arch):
            raise ValueError(f"arch must name a real architecture such as sm_90a, got {self.arch!r}")


@dataclass(frozen=True)
class Headers:
    """What a source reaches. ``ours``: include name -> text; ``toolkit``: include name -> hash, CUDA's own headers."""

    ours: Mapping[str, str]
    toolkit: Mapping[str, str]

    def digest(self) -> str:
        """Hash of every name and text."""
        state = hashlib.sha256()
        for group in (self.ours, self.toolkit):
            for name in sorted(group):
                state.update(f"{name}\0{len(group[name])}\0{group[name]}".encode())
            state.update(b"\1")
        return state.hexdigest()


def reached_headers(code: str, *, root: Path = INCLUDE_ROOT, toolkit_root: Path | None = None) -> Headers:
    """Headers that ``code`` includes, directly or through others of ours, whether or not an ``#if`` hides them.

    Angle-bracket names that ``toolkit_root`` does not hold (``<cstdint>`` in a branch for the host) are passed over.

    Raises:
        CompileError: a quoted include names a file that ``root`` does not hold.
    """
    ours: dict[str, str] = {}
    toolkit: dict[str, str] = {}
    pending = [(code, "the kernel source")]
    while pending:
        text, origin = pending.pop()
        for quoted, angled in _INCLUDE.findall(text):
            if quoted and quoted not in ours:
                path = root / quoted
                if not path.is_file():
                    raise CompileError(f'{origin} includes "{quoted}", which {root} does not hold')
                ours[quoted] = path.read_text(encoding="utf-8")
                pending.append((ours[quoted], quoted))
            elif angled and angled not in toolkit and toolkit_root is not None:
                digest = _toolkit_digest(toolkit_root, angled)
                if digest is not None:
                    toolkit[angled] = digest
    return Headers(ours, toolkit)


@cache
def _toolkit_digest(root: Path, name: str) -> str | None:
    """Hash of a toolkit header, its .hpp, and the header with the toolkit's version; None if ``root`` lacks it.

    Not of all it reaches: a megabyte, whose reading would cost a warm start more than the rest together.
    """
    if not (root / name).is_file():
        return None
    state = hashlib.sha256()
    for path in (root / name, (root / name).with_suffix(".hpp"), root / "cuda_runtime_api.h"):
        if path.is_file():
            state.update(path.read_bytes())
    return state.hexdigest()
