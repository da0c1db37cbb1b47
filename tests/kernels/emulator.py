"""Kernels of kernels/quant on the CPU: the text that NVRTC gets, compiled by g++ against a small stand-in for CUDA.

What it shows: indices, tails, barriers and shuffles that all threads reach, and every bit of the result. What it cannot
show: the hardware's own instructions, memory order, speed.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from megamoe.kernels.jit.source import INCLUDE_ROOT
from megamoe.kernels.quant.launch import CastArgs, CastKernel, ConvertArgs, ConvertKernel

HERE = Path(__file__).parent / "emulator"
_MAIN = """
static {args} arguments;
extern "C" void run(const {args}* a, unsigned x, unsigned y, unsigned z, unsigned threads, int backward) {{
    arguments = *a;
    emulator::body = [] {{ {entry}(arguments); }};
    gridDim = {{x, y, z}};
    blockDim = {{threads, 1, 1}};
    for (unsigned i = 0; i < x * y * z; ++i) {{
        blockIdx = {{i % x, i / x % y, i / x / y}};
        emulator::run_block(threads, backward);
    }}
}}
"""


def why_not() -> str | None:
    """None if kernels can be emulated here, else the reason."""
    return None if shutil.which("g++") else "needs g++ to compile kernels for the CPU"


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="megamoe-emulator-")  # removed when the process ends


@cache
def _library(kernel: CastKernel | ConvertKernel) -> Any:
    source = kernel.source()
    args = CastArgs if isinstance(kernel, CastKernel) else ConvertArgs
    path = Path(_folder().name) / f"{source.name}_{abs(hash(kernel))}.cpp"
    path.write_text(source.code + _MAIN.format(args=args.__name__, entry=source.entry))
    library = path.with_suffix(".so")
    command = [
        "g++",
        "-std=c++17",
        "-O0",
        "-w",
        "-shared",
        "-fPIC",
        "-ffp-contract=off",
        f"-I{HERE}",
        f"-I{INCLUDE_ROOT}",
    ]
    command += ["-include", str(HERE / "cuda_on_cpu.h"), str(path), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


class Emulator:
    """Takes the place of ``kernels.quant.launch.launch``; ``backward`` runs a block's threads from last to first."""

    def __init__(self, *, backward: bool = False) -> None:
        self.backward = backward

    def launch(
        self,
        kernel: CastKernel | ConvertKernel,
        args: ctypes.Structure,
        grid: int | tuple[int, int, int],
        device: torch.device,
    ) -> None:
        assert device.type == "cpu"
        dims = grid if isinstance(grid, tuple) else (grid, 1, 1)
        _library(kernel).run(ctypes.byref(args), *dims, kernel.threads, int(self.backward))
