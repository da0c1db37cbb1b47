"""What the compiler really made: SASS by nvdisasm, and counts of the instructions that matter."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

from megamoe.errors import EngineUnavailableError

# "/*0a50*/   @!P0 QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR4], ..." -> QGMMA.64x128x32.F32.E4M3.E4M3
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.\w+)*)", re.MULTILINE)


@cache
def nvdisasm_path() -> str:
    """nvdisasm of the nvidia-cuda-nvdisasm wheel or on PATH. Raises EngineUnavailableError if there is none."""
    wheels = importlib.util.find_spec("nvidia")
    for folder in (wheels.submodule_search_locations or ()) if wheels else ():
        for path in sorted(Path(folder).glob("cu*/bin/nvdisasm")):
            return str(path)
    if (found := shutil.which("nvdisasm")) is not None:
        return found
    raise EngineUnavailableError("nvdisasm is not installed; it comes with the wheel nvidia-cuda-nvdisasm")


def sass(cubin: bytes, entry: str) -> str:
    """Disassembly of ``entry``."""
    with tempfile.NamedTemporaryFile(prefix="megamoe-", suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [nvdisasm_path(), "--print-code", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"nvdisasm refused the cubin of {entry}: {done.stderr.strip()}")
    sections = re.split(r"^\s*\.section\s+\.text\.", done.stdout, flags=re.MULTILINE)
    for section in sections[1:]:
        if section.startswith(f"{entry},"):
            return section
    raise ValueError(f"the cubin holds no code of {entry}")


def opcodes(text: str) -> Counter[str]:
    """Count of each opcode without its modifiers: ``{"QGMMA": 32, "UTMALDG": 2, ...}``."""
    return Counter(name.split(".")[0] for name in instructions(text))


def instructions(text: str) -> list[str]:
    """Every instruction's full name in order of address."""
    return _INSTRUCTION.findall(text)
