"""``MegaConfig``: every compile-time choice of one mega-kernel, its shared memory, and the CUDA text made from it."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from dataclasses import dataclass
from typing import Literal

import torch

from megamoe.activation import Activation, ActivationName
from megamoe.kernels.jit.source import KernelSource
from megamoe.kernels.jit.structs import TensorMap, cuda_args, cuda_struct
from megamoe.problem import Accumulate

SMEM_LIMIT = 227 * 1024  # bytes one CTA may have on SM90
THREADS = 384
BLOCK_ROWS = 128  # rows of a tile
TILE_COLS = 256  # columns of one: 128 of gate and 128 of up, 256 of a matrix that is not gated, or 256 of y
HALF_COLS = 128
GROUP_COLS = 64  # that one copy brings
K_BLOCK_BYTES = 128
MAX_ROUTES = 16  # experts of one token, shared ones included
_STAGE_BYTES = (BLOCK_ROWS + TILE_COLS) * K_BLOCK_BYTES
_STAGING_BYTES = 8 * 2048
_TILE_BYTES = 32
_NOTES = 2
_ROW_NOTE_BYTES = BLOCK_ROWS * 16
_TABLE_BYTES = 5 * 4
_MAXIMA_BYTES = 2 * 8 * 16 * 4

MegaRecipe = Literal["bf16", "fp8_block", "fp8_row"]
_SUM = {  # mega/sums.cuh, by recipe and accumulation
    ("bf16", "fp32"): "Direct<BF16, N>",
    ("fp8_block", "fp32"): "Promoted<N, ShareScale>",
    ("fp8_block", "fast"): "Chained<N>",
    ("fp8_row", "fp32"): "Promoted<N, NoShareScale>",
    ("fp8_row", "fast"): "Direct<E4M3, N>",
}
_PIECE = {  # how rows of x are pushed, by recipe and whether they are cast already
    ("bf16", False): "PlainPiece",
    ("fp8_block", False): "BlockCastPiece",
    ("fp8_row", False): "RowCastPiece",
    ("fp8_block", True): "QuantisedPiece<false>",
    ("fp8_row", True): "QuantisedPiece<true>",
}
_ACTIVATION = {
    "swiglu": ("SwiGlu", "{}"),
    "swiglu_limited": ("SwiGluLimited", "{{args.act_limit}}"),
    "swiglu_clamped": ("SwiGluClamped", "{{args.act_limit}, args.act_alpha}"),
    "geglu": ("GeGlu", "{}"),
    "relu2": ("Relu2", "{}"),
}


@dataclass(frozen=True, kw_only=True)
class MegaConfig:
    """One kernel. Sizes are run-time arguments but for ``top_k``, ``num_shared`` (experts that every token of the rank
    visits beside those), and what shared memory must have room for: ``max_slots`` local experts, shared ones included,
    ``max_offsets`` = R * (S + 1) offsets of routes, ``max_kb`` k-blocks of either GEMM.
    """

    recipe: MegaRecipe
    accumulate: Accumulate  # of FP8; bf16 sums are fp32 either way
    top_k: int
    activation: ActivationName
    bias: bool
    weights_before: bool
    index_64: bool
    max_slots: int
    max_offsets: int
    max_kb: int
    num_shared: int = 0
    quantised: bool = False  # x comes in the recipe's e4m3, with scales
    trace: bool = False  # CTAs write down when they did what
    partial_sums: bool = False  # owners add up a token's rows before they send them back

    def __post_init__(self) -> None:
        assert (self.recipe, self.accumulate) in _SUM, (self.recipe, self.accumulate)
        assert not (self.quantised and self.recipe == "bf16")
        assert 1 <= self.top_k <= self.routes <= MAX_ROUTES
        assert self.activation in _ACTIVATION, self.activation
        assert self.max_slots % 32 == self.max_offsets % 4 == self.max_kb % 2 == 0
        assert self.num_stages >= 3

    @property
    def routes(self) -> int:
        """Experts that a token can visit."""
        return self.top_k + self.num_shared

    @property
    def block_scaled(self) -> bool:
        return self.recipe == "fp8_block"

    @property
    def row_scaled(self) -> bool:
        return self.recipe == "fp8_row"

    @property
    def operand(self) -> torch.dtype:
        """What the tensor cores read."""
        return torch.bfloat16 if self.recipe == "bf16" else torch.float8_e4m3fn

    @property
    def mid_dtype(self) -> torch.dtype:
        """What activations are stored in first: bf16 where they are cast, in place, once the whole row is there."""
        return torch.bfloat16 if self.row_scaled else self.operand

    @property
    def parts(self) -> int:
        """Matrices stacked in w13: 2, gate and up, or 1."""
        return 2 if Activation(self.activation).gated else 1

    @property
    def up_cols(self) -> int:
        """Columns of activations that come of one tile of the first GEMM."""
        return TILE_COLS // self.parts

    @property
    def element_bytes(self) -> int:
        return self.operand.itemsize

    @property
    def block_k(self) -> int:
        """Elements of K in one k-block."""
        return K_BLOCK_BYTES // self.element_bytes

    @property
    def _per_stage(self) -> int:
        return _STAGE_BYTES + (BLOCK_ROWS * 4 if self.block_scaled else 0) + 16

    @property
    def _note_bytes(self) -> int:
        """Notes on one tile with their three barriers."""
        scales = 8 * self.max_kb if self.block_scaled else 4 * TILE_COLS if self.row_scaled else 0
        return _TILE_BYTES + _ROW_NOTE_BYTES + scales + 24

    @property
    def _fixed(self) -> int:
        notes = _NOTES * (self._note_bytes + (BLOCK_ROWS * 4 if self.row_scaled else 0))
        words = _TILE_BYTES + 48 + (0 if self.recipe == "bf16" else _MAXIMA_BYTES)
        return _STAGING_BYTES + notes + words + 4 * self.max_offsets + _TABLE_BYTES * self.max_slots

    @property
    def num_stages(self) -> int:
        """As many as fit."""
        return (SMEM_LIMIT - self._fixed) // self._per_stage

    @property
    def smem_bytes(self) -> int:
        """Shared memory of a CTA; the kernel asserts that its own sum is the same."""
        return self.num_stages * self._per_stage + self._fixed

    @property
    def sort_bytes(self) -> int:
        """Shared memory that sorting the tokens may use: that of the ring, which is not in use then."""
        return self.num_stages * _STAGE_BYTES

    @property
    def name(self) -> str:
        """What files and logs call the kernel."""
        parts = [f"mega_{self.recipe}_k{self.top_k}_{self.activation}_s{self.max_slots}"]
        parts += (
            ["fast"] * (self.accumulate == "fast")
            + [f"shared{self.num_shared}"] * bool(self.num_shared)
            + ["quantised"] * self.quantised
            + ["partial"] * self.partial_sums
            + ["trace"] * self.trace
            + ["bias"] * self.bias
            + ["before"] * self.weights_before
            + ["i64" if self.index_64 else "i32"]
        )
        return "_".join(parts)

    def source(self) -> KernelSource:
        """The kernel's text: arguments, configuration, and an entry of one line."""
        return _source(self)


@functools.cache
def _source(config: MegaConfig) -> KernelSource:
    """Kept: every call asks for its kernel, and writing the text takes a tenth of a millisecond."""
    elem = "BF16" if config.recipe == "bf16" else "E4M3"
    total, piece = _SUM[config.recipe, config.accumulate], _PIECE[config.recipe, config.quantised]
    kind, make = _ACTIVATION[config.activation]
    facts = _Facts(**{f.name: getattr(config, f.name) for f in dataclasses.fields(_Facts)})
    code = f"""#include "megamoe/common/args.cuh"
namespace megamoe::mega {{
{cuda_args("Args", Args)}}}
#include "megamoe/mega/kernel.cuh"
namespace megamoe::mega {{
{cuda_struct("Facts", facts)}
struct Config : Facts {{
  using Elem = {elem};
  using Piece = {piece};
  template <int N>
  using Sum = {total};
  using Activation = {kind};
  static MM_DEVICE Activation activation(const Args& args) {{ return Activation{make}; }}
}};
}}
extern "C" __global__ void __launch_bounds__({THREADS}, 1)
megamoe_layer(const __grid_constant__ megamoe::mega::Args args) {{
  megamoe::mega::entry<megamoe::mega::Config>(args);
}}
"""
    return KernelSource(name=config.name, code=code, entry="megamoe_layer")


@dataclass(frozen=True)
class _Facts:
    block_scaled: bool
    row_scaled: bool
    parts: int
    top_k: int
    num_shared: int
    routes: int
    bias: bool
    weights_before: bool
    index_64: bool
    max_slots: int
    max_offsets: int
    max_kb: int
    trace: bool
    partial_sums: bool
    num_stages: int
    smem_bytes: int


class Args(ctypes.Structure):
    """Run-time arguments, one layout for Python and CUDA. What is not a pointer below ``abort`` is a byte offset."""

    _fields_ = (
        ("map_w13", TensorMap),
        ("map_w2", TensorMap),
        ("map_pool", TensorMap),  # rows of x, expert by expert: whole blocks,
        ("map_pool_few", TensorMap),  # 16 rows at a time,
        ("map_pool_scales", TensorMap),  # fp8_block: [k-blocks, rows]; fp8_row: [1, rows]
        ("map_mid", TensorMap),  # the same of the activations between the GEMMs
        ("map_mid_few", TensorMap),
        ("map_mid_scales", TensorMap),
        ("x", ctypes.c_void_p),  # bf16 [T, x_ld], or e4m3
        ("x_scales", ctypes.c_void_p),  # fp32 of e4m3: token * x_scales_ld + block * x_scales_step
        ("topk_idx", ctypes.c_void_p),
        ("topk_weights", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("scales_w13", ctypes.c_void_p),  # fp32 [S, parts * ceil(I / 128), up_kb]; fp8_row: [S, parts * I]
        ("scales_w2", ctypes.c_void_p),  # fp32 [S, ceil(H / 128), down_kb]; fp8_row: [S, H]
        ("bias13", ctypes.c_void_p),  # fp32 [S, parts * I]
        ("bias2", ctypes.c_void_p),  # fp32 [S, H]
        ("device_tokens", ctypes.c_void_p),  # int32, or null: num_tokens counts
        ("bases", ctypes.c_void_p),  # uint64 [R], every rank's symmetric memory
        ("own", ctypes.c_void_p),  # this rank's
        ("record", ctypes.c_void_p),  # comm::Record, host-mapped
        ("ring_record", ctypes.c_void_p),  # WaitRecord, host-mapped
        ("trace", ctypes.c_void_p),  # uint64 [CTAs, megamoe/mega/trace.py], or null
        ("limit_ns", ctypes.c_uint64),
        ("x_ld", ctypes.c_int64),
        ("x_scales_ld", ctypes.c_int64),
        ("x_scales_step", ctypes.c_int64),
        ("y_ld", ctypes.c_int64),
        # Offsets of the workspace's fields, see megamoe/mega/workspace.py.
        ("abort", ctypes.c_int64),
        ("header_flags", ctypes.c_int64),
        ("done_flags", ctypes.c_int64),
        ("offsets", ctypes.c_int64),
        ("targets", ctypes.c_int64),
        ("arrived", ctypes.c_int64),
        ("routes", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("row_scales", ctypes.c_int64),
        ("results", ctypes.c_int64),
        ("control", ctypes.c_int64),
        ("histogram", ctypes.c_int64),
        ("sent", ctypes.c_int64),
        ("tiles_done", ctypes.c_int64),
        ("copied", ctypes.c_int64),
        ("casts_done", ctypes.c_int64),
        ("pushes", ctypes.c_int64),
        ("pool", ctypes.c_int64),
        ("pool_scales", ctypes.c_int64),
        ("mid", ctypes.c_int64),
        ("mid_scales", ctypes.c_int64),
        ("num_tokens", ctypes.c_int32),
        ("max_tokens", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("world", ctypes.c_int32),
        ("slots", ctypes.c_int32),
        ("max_copies", ctypes.c_int32),  # rows one token can become
        ("hidden", ctypes.c_int32),
        ("intermediate", ctypes.c_int32),
        ("row_pitch", ctypes.c_int32),  # bytes of a pushed row
        ("scale_pitch", ctypes.c_int32),  # floats of its scales
        ("mid_pitch", ctypes.c_int32),  # bytes of a row of activations
        ("mid_rows", ctypes.c_int32),
        ("ring_blocks", ctypes.c_int32),  # blocks that the pool of rows holds
        ("max_blocks", ctypes.c_int32),
        ("up_kb", ctypes.c_int32),
        ("down_kb", ctypes.c_int32),
        ("up_tiles", ctypes.c_int32),
        ("down_tiles", ctypes.c_int32),
        ("lag", ctypes.c_int32),
        ("ups_first", ctypes.c_int32),
        ("act_limit", ctypes.c_float),
        ("act_alpha", ctypes.c_float),
        ("trace_events", ctypes.c_int32),  # room for events of each track of a CTA
        ("returns", ctypes.c_int64),  # an offset; behind the others, which keep their places
        ("pad", ctypes.c_uint8 * 16),
    )
