"""Machine code with what nvdisasm does not spell out."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from megamoe.kernels.jit.cache import default_cache
from megamoe.kernels.jit.inspect import nvdisasm_path
from megamoe.kernels.jit.source import KernelSource


def with_hints(source: KernelSource, folder: Path) -> list[tuple[str, bool]]:
    """Every instruction, and whether it lets another warp go first; ``folder`` is for a file.

    That hint is bit 109 of an instruction, inverted; nvdisasm prints its 128 bits as two words, the lower first.
    """
    path = folder / "kernel.cubin"
    path.write_bytes(default_cache().get(source).cubin)
    command = [nvdisasm_path(), "--print-code", "-hex", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(
        r"/\*[0-9a-f]{4,}\*/\s+([^;]+?)\s*;\s+/\* 0x[0-9a-f]{16} \*/\s*\n\s*/\* 0x([0-9a-f]{16}) \*/", text
    )
    return [(name, not int(high, 16) >> (109 - 64) & 1) for name, high in found]
