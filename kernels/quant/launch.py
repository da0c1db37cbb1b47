"""The cast kernels as text, and their launch: what is compiled in, what is an argument.

Pure but for ``launch``: ``CastKernel(...).source()`` can be compiled and inspected without a GPU.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch

from megamoe.errors import EngineUnavailableError
from megamoe.kernels.jit.kernel import Kernel, LaunchShape, load
from megamoe.kernels.jit.source import KernelSource
from megamoe.kernels.jit.structs import cuda_args
from megamoe.kernels.quant.formats import num_blocks
from megamoe.kernels.quant.layouts import Layout

Kind = Literal["1x128", "128x128", "row", "both"]
ScaleForm = Literal["fp32_row", "fp32_adjacent", "packed_row", "packed_adjacent"]
_ACTIVATIONS = {
    "swiglu": "SwiGlu",
    "swiglu_limited": "SwiGluLimited",
    "swiglu_clamped": "SwiGluClamped",
    "geglu": "GeGlu",
    "relu2": "Relu2",
}
_SCALES = {"row": "RowMajorScales", "sm90": "Sm90Scales", "sm100": "Sm100Scales"}
_FORMS = {
    "fp32_row": "Fp32RowMajor",
    "fp32_adjacent": "Fp32RowsAdjacent",
    "packed_row": "PackedRowMajor",
    "packed_adjacent": "PackedRowsAdjacent",
}
VALUES_PER_THREAD = 16


class CastArgs(ctypes.Structure):
    """Run-time arguments of every cast; each kernel reads those it needs. ``ld_*`` and ``rows`` count elements."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("row_weight", ctypes.c_void_p),
        ("q", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("q_t", ctypes.c_void_p),
        ("scale_t", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("ld_x", ctypes.c_int64),
        ("ld_q", ctypes.c_int64),
        ("ld_q_t", ctypes.c_int64),
        ("ld_scale", ctypes.c_int64),
        ("ld_scale_t", ctypes.c_int64),
        ("rows", ctypes.c_int64),  # of all matrices together; "128x128": of one part
        ("matrix_rows", ctypes.c_int64),  # of one matrix of a batch
        ("columns", ctypes.c_int32),  # of q
        ("blocks", ctypes.c_int32),
        ("blocks_t", ctypes.c_int32),
        ("parts", ctypes.c_int32),
        ("num_groups", ctypes.c_int32),
        ("limit", ctypes.c_float),
        ("alpha", ctypes.c_float),
    )
    keep: tuple[torch.Tensor, ...]  # inputs, perhaps copies, that must not be freed before the launch


class ConvertArgs(ctypes.Structure):
    """Run-time arguments of a conversion of scales [batch, rows, blocks]; ``ld``: stride of whichever side has one."""

    _fields_ = (
        ("source", ctypes.c_void_p),
        ("target", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("ld", ctypes.c_int64),
        ("blocks", ctypes.c_int32),
    )


@dataclass(frozen=True, kw_only=True)
class CastKernel:
    """What is compiled into a cast.

    Args:
        kind: scale per 1x128, 128x128 or row; "both" is 1x128 with the transposed copy.
        element: bf16 or fp32, of x.
        activation: name, None for a plain cast.
        power_of_two: scales rounded up to powers of two.
        layout: of 1x128 scales.
        transposed: "128x128" only: write the transposed copy too.
        grouped: "both" only: offsets say which rows belong together.
        row_threads, steps, one_read: "row" only, see ``row_shape``.
        arch: real architecture to compile for.
    """

    kind: Kind
    element: torch.dtype = torch.bfloat16
    activation: str | None = None
    power_of_two: bool = False
    layout: Layout = "row"
    transposed: bool = False
    grouped: bool = False
    row_threads: int = 32
    steps: int = 1
    one_read: bool = True
    arch: str = "sm_90a"

    @property
    def narrow(self) -> bool:
        """Whether a thread holds its values in 16 bits each: half the registers, twice the rows of a tile."""
        return self.element == torch.bfloat16 and self.activation is None

    @property
    def threads(self) -> int:
        """Threads of a block."""
        if self.kind == "row":
            return self.row_threads * max(1, 256 // self.row_threads)
        return 256 if self.kind == "1x128" or self.narrow else 512

    @property
    def rows_per_block(self) -> int:
        """Rows that a block of kind "row" takes."""
        return self.threads // self.row_threads

    @property
    def groups_per_block(self) -> int:
        """Groups of 128 values that a block of kind "1x128" takes."""
        return self.threads * VALUES_PER_THREAD // 128 * self.loads

    @property
    def loads(self) -> int:
        """Times 16 values that a thread of kind "1x128" has in flight: 64 bytes or more."""
        return 2 if self.narrow else 1

    def shape(self) -> LaunchShape:
        """Threads of a block."""
        return LaunchShape(threads=self.threads)

    def source(self) -> KernelSource:
        """The kernel as text."""
        # Blocks of a multiprocessor: enough loads in flight, and no kernel spills at the registers that leaves.
        blocks = 6 if self.kind == "1x128" else 1024 // self.threads
        entry = f'extern "C" __global__ void __launch_bounds__({self.threads}, {blocks}) cast'
        body = {"1x128": self._cast_1x128, "128x128": self._cast_128x128, "row": self._cast_row, "both": self._both}
        header, statement = body[self.kind]()
        code = (
            f'#include "megamoe/quant/{header}.cuh"\n{cuda_args("CastArgs", CastArgs)}using namespace megamoe;\n'
            f"{entry}(const __grid_constant__ CastArgs a) {{\n  {self._source()}\n  {statement}\n}}\n"
        )
        return KernelSource(self._name(), code, "cast", arch=self.arch)

    def _name(self) -> str:
        parts = ["cast", self.kind, str(self.element).removeprefix("torch."), self.activation or "", self.layout]
        flags = ("power_of_two", "transposed", "grouped")
        return "_".join([p for p in parts if p] + [flag for flag in flags if getattr(self, flag)])

    def _source(self) -> str:
        element = {torch.bfloat16: "BF16", torch.float32: "float"}[self.element]
        x = "static_cast<const u8*>(a.x), a.ld_x, a.columns"
        if self.activation is None:
            return f"const quant::Matrix<{element}> source{{{x}}};"
        kind = f"quant::Activated<{element}, quant::{_ACTIVATIONS[self.activation]}>"
        return f"const {kind} source{{{x}, static_cast<const float*>(a.row_weight), a.limit, a.alpha}};"

    @property
    def _rule(self) -> str:
        return "quant::PowerOfTwoScale" if self.power_of_two else "quant::AnyScale"

    def _scales(self, suffix: str, rows: str) -> str:
        pointer = "u8" if self.layout == "sm100" else "float"
        return (
            f"quant::{_SCALES[self.layout]}{{static_cast<{pointer}*>(a.scale{suffix}), {rows}, a.blocks{suffix}, "
            f"a.ld_scale{suffix}}}"
        )

    def _cast_1x128(self) -> tuple[str, str]:
        scales = self._scales("", "a.matrix_rows")
        run = f"quant::Cast1x128::run<{self._rule}, {self.loads}>"
        return "cast_1x128", f"{run}(source, {scales}, static_cast<u8*>(a.q), a.ld_q, a.rows);"

    def _cast_row(self) -> tuple[str, str]:
        run = f"quant::CastRow<{self.threads}, {self.row_threads}>"
        run += f"::run<{self._rule}, {self.steps}, {_bool(self.one_read)}>"
        return "cast_row", f"{run}(source, static_cast<float*>(a.scale), static_cast<u8*>(a.q), a.ld_q, a.rows);"

    def _cast_128x128(self) -> tuple[str, str]:
        out = (
            "{static_cast<u8*>(a.q), a.ld_q, static_cast<float*>(a.scale), static_cast<u8*>(a.q_t), a.ld_q_t, "
            "static_cast<float*>(a.scale_t), static_cast<i32>(a.rows), a.parts}"
        )
        return "cast_128x128", f"quant::Cast128x128::run<{self._rule}, {_bool(self.transposed)}>(source, {out});"

    def _both(self) -> tuple[str, str]:
        rows = (
            "quant::GroupedRows{static_cast<const i32*>(a.offsets), a.num_groups}"
            if self.grouped
            else "quant::AllRows{a.rows}"
        )
        out = (
            f"quant::CastBoth::Out<quant::{_SCALES[self.layout]}>{{static_cast<u8*>(a.q), a.ld_q, "
            f"{self._scales('', 'a.rows')}, static_cast<u8*>(a.q_t), a.ld_q_t, {self._scales('_t', 'a.columns')}}}"
        )
        return "cast_both", f"quant::CastBoth::run<{self._rule}>(source, {rows}, {out});"


def row_shape(columns: int, element: torch.dtype, *, activated: bool) -> tuple[int, int, bool]:
    """(threads of a row, 16-value steps of a thread, whether the row then fits in registers) for kind "row".

    Fewest idle threads first, then fewest threads. Example: 7168 columns of bf16 are 448 times 16: (128, 4, True).
    """
    units = num_blocks(columns, VALUES_PER_THREAD)
    most = 1 if activated else 4 if element == torch.bfloat16 else 2  # what 64 registers a thread can hold
    # (Idle threads cost an activation's arithmetic, too: there, any number of warps that divides work well.)
    widths = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024) if activated else (32, 64, 128, 256, 512, 1024)
    choices = [
        (threads * steps - units, threads, steps)
        for threads in widths
        for steps in (1, 2, 4)
        if steps <= most and threads * steps >= units
    ]
    if not choices:
        return 256, most, False
    _, threads, steps = min(choices)
    return threads, steps, True


@dataclass(frozen=True, kw_only=True)
class ConvertKernel:
    """What is compiled into a conversion of scales: the forms of both sides.

    pieces: from "fp32_row" only: rows are whole pieces of four scales that start at 16 bytes, and are read by those.
    """

    source_form: ScaleForm
    target_form: ScaleForm
    pieces: bool = False
    arch: str = "sm_90a"
    threads = 256
    tile_rows = 64

    @property
    def tile_blocks(self) -> int:
        """Blocks that a block of threads converts, of as many as 64 rows."""
        return 64 if self.pieces else 32

    def shape(self) -> LaunchShape:
        """Threads of a block."""
        return LaunchShape(threads=self.threads)

    def source(self) -> KernelSource:
        """The kernel as text."""
        run = f"ConvertScales::run<quant::{_FORMS[self.source_form]}, quant::{_FORMS[self.target_form]}>"
        if self.pieces:
            assert self.source_form == "fp32_row"
            run = f"ConvertPieces::run<quant::{_FORMS[self.target_form]}>"
        code = (
            f'#include "megamoe/quant/convert_scales.cuh"\n{cuda_args("ConvertArgs", ConvertArgs)}'
            "using namespace megamoe;\n"
            'extern "C" __global__ void __launch_bounds__(256) convert(const __grid_constant__ ConvertArgs a) {\n'
            f"  quant::{run}(static_cast<const u32*>(a.source), static_cast<u32*>(a.target), a.rows, a.blocks, a.ld);\n"
            "}\n"
        )
        name = f"convert_{self.source_form}_{self.target_form}" + "_pieces" * self.pieces
        return KernelSource(name, code, "convert", arch=self.arch)


@cache
def loaded(kernel: CastKernel | ConvertKernel) -> Kernel:
    """``kernel`` compiled and loaded, once a process."""
    return load(kernel.source(), kernel.shape())


def runs_kernels(x: torch.Tensor) -> bool:
    """Whether the kernels take x; everything else goes to the twins."""
    return x.is_cuda


@cache
def arch_of(device: torch.device) -> str:
    """Architecture to compile for on this device. Raises EngineUnavailableError before 8.9, which has no E4M3."""
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        raise EngineUnavailableError(
            f"casts to e4m3 need compute capability 8.9 or more, device {device} has {major}.{minor}"
        )
    return f"sm_{major}{minor}a" if major >= 9 else f"sm_{major}{minor}"


def launch(
    kernel: CastKernel | ConvertKernel, args: ctypes.Structure, grid: int | tuple[int, int, int], device: torch.device
) -> None:
    """Queue ``kernel`` on the current stream of ``device``."""
    dims: tuple[Any, ...] = grid if isinstance(grid, tuple) else (grid, 1, 1)
    if dims[0] >= 2**31 or max(dims[1:]) > 65535:
        raise ValueError(f"too large for one launch: a grid of {dims} blocks, at most (2147483647, 65535, 65535)")
    if device.index == torch.cuda.current_device():
        loaded(kernel).launch(args, dims)
        return
    with torch.cuda.device(device):
        loaded(kernel).launch(args, dims)


def _bool(value: bool) -> str:
    return "true" if value else "false"
