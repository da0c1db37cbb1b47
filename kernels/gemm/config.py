"""``GemmConfig``: every compile-time choice of one GEMM kernel, and the CUDA text generated from it."""

from __future__ import annotations

import ctypes
import dataclasses
import enum
from dataclasses import dataclass
from typing import Literal

from megamoe.kernels.jit.source import KernelSource
from megamoe.kernels.jit.structs import TensorMap, cuda_args, cuda_struct

SMEM_LIMIT = 227 * 1024  # bytes one CTA may have on SM90
K_BLOCK_BYTES = 128  # one k-block of a row: 128 e4m3 or 64 bf16
CHUNK_MN = 64  # bf16 of M or N in one box of an MN-major operand
_WARPGROUP = 128  # threads
_NOTE_BYTES = 32  # gemm/layout.cuh
_DRAWN_RING_BYTES = 150 * 1024  # 6 stages of 16 or 32 rows by 128 columns
_CHUNK_BYTES = 2048  # 16 rows x 64 columns of bf16, see epilogue/store.cuh

Elem = Literal["e4m3", "bf16"]
Grouping = Literal["dense", "contiguous", "masked", "k"]
Major = Literal["k", "mn"]
Out = Literal["bf16", "f32", "e4m3"]
_ELEM_TYPE = {"e4m3": "megamoe::E4M3", "bf16": "megamoe::BF16"}
_GROUPING_TYPE = {
    "dense": "megamoe::Dense",
    "contiguous": "megamoe::Contiguous",
    "masked": "megamoe::Masked",
    "k": "megamoe::ByK<accumulate, scaling == Scaling::VECTOR ? 128 : 1>",
}


class Share(enum.Enum):
    """How the CTAs of a cluster share a unit of work."""

    NONE = 0  # one CTA, one tile
    B = 1  # two tiles below each other, B loaded once
    A = 2  # two tiles beside each other, A loaded once
    SPLIT_K = 3  # one tile, each CTA a range of K


class Scaling(enum.Enum):
    """Scales of FP8 operands."""

    NONE = 0
    BLOCK = 1  # A 1x128, B 128x128
    ROW = 2  # A per row, B per row
    VECTOR = 3  # A 1x128, B 1x128


class Activation(enum.Enum):
    """What joins gate and up columns in the epilogue (megamoe/activation.py)."""

    NONE = "void"
    SWIGLU = "megamoe::quant::SwiGlu"
    SWIGLU_LIMITED = "megamoe::quant::SwiGluLimited"
    SWIGLU_CLAMPED = "megamoe::quant::SwiGluClamped"
    GEGLU = "megamoe::quant::GeGlu"


@dataclass(frozen=True, kw_only=True)
class GemmConfig:
    """One kernel: D[M, N] = A[M, K] x B[N, K]^T.

    ``a_major``, ``b_major``: the direction in which an operand is contiguous, "k" or, in bf16, "mn".
    ``activation``: gate and up rows of B are interleaved by 8 and D has N / 2 columns; ``out`` "e4m3" then casts them.
    ``block_m`` 16 or 32 (so many of an MMA's 64 rows are loaded and stored), 64, 128, 192 (three math warpgroups), 256;
    ``block_n`` a multiple of 16 (32 up to block_m 64), at most 256;
    ``async_store``: D leaves through the copy engine while the next tile is computed; takes staging for the whole tile.
    ``evict_first``: B is read once and should leave L2 before anything else.
    ``band``: units of M that run before the next units of N.
    """

    elem: Elem
    scaling: Scaling
    grouping: Grouping
    out: Out
    accumulate: bool
    block_m: int
    block_n: int
    cluster: int
    share: Share
    a_major: Major = "k"
    b_major: Major = "k"
    activation: Activation = Activation.NONE
    async_store: bool = False
    evict_first: bool = False
    band: int = 8

    def __post_init__(self) -> None:
        assert self.block_m in (16, 32, 64, 128, 192, 256)
        assert self.block_n % (32 if self.block_m <= 64 else 16) == 0
        assert self.block_m >= 64 or (self.share is Share.NONE and not self.async_store and self.a_major == "k")
        assert self.block_m <= 128 or (self.block_n <= 128 and self.share is not Share.SPLIT_K and self.elem == "e4m3")
        assert 0 < self.block_n <= 256
        assert (self.elem == "bf16") == (self.scaling is Scaling.NONE)
        assert self.cluster == 1 if self.share is Share.NONE else self.cluster > 1
        assert self.cluster == 2 or self.share in (Share.NONE, Share.SPLIT_K)
        assert not self.accumulate or self.out == "f32"
        assert not self.async_store or (self.out_bf16 and self.out_cols % 64 == 0 and self.share is not Share.SPLIT_K)
        assert self.elem == "bf16" or (self.a_major, self.b_major) == ("k", "k")
        # Chunks of 64 columns, also in the half that one of two CTAs loads.
        assert self.b_major == "k" or self.cols % 64 == 0 == self.block_n // (2 if self.share is Share.B else 1) % 64
        assert self.a_major == "k" or self.block_m // (2 if self.share is Share.A else 1) % 64 == 0
        # A tile may start at any row of A, a copy only at 16 bytes of its contiguous dimension.
        assert self.a_major == "k" or not self._any_row
        if self.grouping == "k":
            assert self.scaling is Scaling.VECTOR or (self.a_major, self.b_major) == ("mn", "mn")
            assert self.share is not Share.SPLIT_K
        if self.scaling is Scaling.VECTOR:
            # Scales of B in a stage, too, begin and end at 128 bytes.
            assert self.grouping in ("dense", "k") and self.block_n <= 128 and self.block_n % 32 == 0
        if self.activation is not Activation.NONE:
            assert self.scaling in (Scaling.NONE, Scaling.BLOCK) and not self.accumulate
            assert self.share is not Share.SPLIT_K and self.cols in (128, 256) and self.block_m == 128
        assert self.out != "e4m3" or self.out_cols == 128
        assert self.num_stages >= 3

    @property
    def stage_bytes(self) -> int:
        """Bytes that one stage of the ring takes from shared memory, scales included."""
        scales = 0
        if self.scaling in (Scaling.BLOCK, Scaling.VECTOR):
            rows = max(self.block_m, 64)
            scales = rows * 4
            if self._any_row:
                scales = self._row_blocks * (-(-(rows // self._row_blocks + 4) * 4 // 128) * 128)
            scales += self.block_n * 4 if self.scaling is Scaling.VECTOR else 0
        return (max(self.block_m, 64) + self.block_n) * K_BLOCK_BYTES + scales

    @property
    def scale_box(self) -> int:
        """Rows of one copy of the scales of A: copies start at 16 bytes, so up to 3 rows come along before any tile."""
        return self.block_m // self._row_blocks + 4 if self._any_row else self.block_m

    @property
    def copies_a(self) -> int:
        """Copies in which A's rows of a k-block come: the second of two is left out where a group ends before it."""
        return 2 if self._any_row and self.share is Share.NONE and self.block_m >= 32 else 1

    @property
    def rows_a(self) -> int:
        """Rows of one copy of A."""
        return self.block_m // (2 if self.share is Share.A else self.copies_a)

    @property
    def threads(self) -> int:
        """Threads of a CTA: its math warpgroups, and one whose first warp loads."""
        return (4 if self.block_m == 192 else 3) * _WARPGROUP

    @property
    def _row_blocks(self) -> int:
        """Blocks of 64 rows that a math warpgroup takes."""
        return 2 if self.block_m == 256 else 1

    @property
    def _any_row(self) -> bool:
        """Whether a tile may start at any row of A."""
        return self.grouping in ("contiguous", "masked")

    @property
    def cols(self) -> int:
        """Columns of one math warpgroup."""
        return self.block_n // 2 if self.block_m <= 64 else self.block_n

    @property
    def tickets(self) -> bool:
        """Whether each CTA draws its next unit from a counter; else it strides through them.

        Pays where groups have room for more rows than they have: 5% at 32 x 192, 1% at few rows; elsewhere nothing.
        """
        return self.grouping == "masked" and self.share is Share.NONE

    @property
    def told(self) -> bool:
        """Whether the loader tells the math warps their tiles; else they walk the groups as it does.

        Pays where tiles are many and take long; what a warp then waits for costs tiles of few rows 1%. Tickets are
        drawn once for all.
        """
        return self.tickets or (self._any_row and self.block_m >= 128 and self.share is Share.NONE)

    @property
    def out_cols(self) -> int:
        """Columns of D of one math warpgroup."""
        return self.cols if self.activation is Activation.NONE else self.cols // 2

    @property
    def out_bf16(self) -> bool:
        """Whether D is bf16."""
        return self.out == "bf16"

    @property
    def out_e4m3(self) -> bool:
        """Whether D is e4m3 with scales."""
        return self.out == "e4m3"

    @property
    def a_mn(self) -> bool:
        """Whether A is contiguous along M."""
        return self.a_major == "mn"

    @property
    def b_mn(self) -> bool:
        """Whether B is contiguous along N."""
        return self.b_major == "mn"

    @property
    def staging_bytes(self) -> int:
        """Where D is staged, or where split K collects sums: fp32, every CTA's, of a share of the 8-column groups."""
        warps = (self.threads - _WARPGROUP) // 32
        if self.share is Share.SPLIT_K:
            return -(-self.cols // 8 // self.cluster) * self.cluster * 32 * warps * 16
        return warps * _CHUNK_BYTES * (self._row_blocks * self.out_cols // 64 if self.async_store else 1)

    @property
    def _stage_words(self) -> int:
        """Bytes that each stage takes besides: two barriers, what the loader tells of the tile that begins there."""
        return 16 + (_NOTE_BYTES if self.told else 0)

    @property
    def num_stages(self) -> int:
        """As many as fit, at most 12: beyond that nothing is left to hide.

        Where tiles of few rows are drawn, fewer: a loader far ahead draws units that another CTA would begin sooner.
        """
        room = SMEM_LIMIT - self.staging_bytes - 16
        if self.tickets and self.block_m < 64:
            room = min(room, _DRAWN_RING_BYTES)
        return min(12, room // (self.stage_bytes + self._stage_words))

    @property
    def smem_bytes(self) -> int:
        """Shared memory of a CTA; the kernel asserts that its own sum is the same."""
        return self.num_stages * (self.stage_bytes + self._stage_words) + self.staging_bytes + 16

    @property
    def block_k(self) -> int:
        """Elements of K in one k-block."""
        return K_BLOCK_BYTES if self.elem == "e4m3" else K_BLOCK_BYTES // 2

    @property
    def opcodes(self) -> tuple[str, ...]:
        """What its machine code must hold: tensor cores of its type, and tensor copies."""
        return ("QGMMA" if self.elem == "e4m3" else "HGMMA", "UTMALDG")

    @property
    def name(self) -> str:
        """What files and logs call the kernel."""
        out = self.out + ("acc" if self.accumulate else "")
        if self.activation is not Activation.NONE:
            out = f"{self.activation.name.lower()}_{out}"
        share = self.share.name.lower() + (str(self.cluster) if self.cluster > 1 else "")
        share += "_async" * self.async_store + "_stream" * self.evict_first
        # N, T as BLAS has them: A [M, K] and B [N, K] are "nt".
        layout = "" if not (self.a_mn or self.b_mn) else f"_{'t' if self.a_mn else 'n'}{'n' if self.b_mn else 't'}"
        return (
            f"gemm_{self.elem}_{self.scaling.name.lower()}_{self.grouping}{layout}_{out}"
            f"_{self.block_m}x{self.block_n}_{share}_band{self.band}"
        )

    def source(self) -> KernelSource:
        """The kernel's text: arguments, configuration, and an entry of one line."""
        facts = _Facts(**{f.name: getattr(self, f.name) for f in dataclasses.fields(_Facts)})
        code = f"""#include "megamoe/common/args.cuh"
namespace megamoe::gemm {{
{cuda_args("Args", Args)}}}
#include "megamoe/gemm/kernel.cuh"
namespace megamoe::gemm {{
{
            cuda_struct(
                "Facts",
                facts,
                share=self.share,
                scaling=self.scaling,
                activation=self.activation,
                num_stages=self.num_stages,
                smem_bytes=self.smem_bytes,
            )
        }
struct Config : Facts {{
  using Elem = {_ELEM_TYPE[self.elem]};
  using Grouping = {_GROUPING_TYPE[self.grouping]};
  using Act = {self.activation.value};
}};
}}
extern "C" __global__ void __launch_bounds__({self.threads}, 1)
megamoe_gemm(const __grid_constant__ megamoe::gemm::Args args) {{
  megamoe::gemm::entry<megamoe::gemm::Config>(args);
}}
"""
        return KernelSource(name=self.name, code=code, entry="megamoe_gemm")


@dataclass(frozen=True)
class _Facts:
    out_bf16: bool
    out_e4m3: bool
    a_mn: bool
    b_mn: bool
    block_k: int
    accumulate: bool
    block_m: int
    block_n: int
    threads: int
    cluster: int
    async_store: bool
    evict_first: bool
    band: int
    tickets: bool
    told: bool
    copies_a: int


class Args(ctypes.Structure):
    """Run-time arguments, one layout for Python and CUDA."""

    _fields_ = (
        ("map_a", TensorMap),  # [M, K], or [1, K, M]
        ("map_b", TensorMap),  # [G N, K], or [G, K, N]
        ("map_d", TensorMap),  # when async_store
        ("map_sfa", TensorMap),  # scales of A, [K / 128, M], when Scaling.BLOCK or VECTOR
        ("map_sfb", TensorMap),  # scales of B, [K / 128, N], when Scaling.VECTOR
        ("table", ctypes.c_void_p),  # int32: offsets [G + 1] or counts [G]; null when dense
        ("scales_a", ctypes.c_void_p),  # fp32 [M] when Scaling.ROW
        ("scales_b", ctypes.c_void_p),  # fp32 [G, ceil(N / 128), scales_b_ld] or [G, N]
        ("scales_d", ctypes.c_void_p),  # fp32 [ceil(N / 256), scales_d_ld] when out is e4m3
        ("row_weight", ctypes.c_void_p),  # fp32 [M] or null, when gated
        ("d", ctypes.c_void_p),
        ("tickets", ctypes.c_void_p),  # uint32: units drawn, CTAs that have drawn their last; 0 between launches
        ("record", ctypes.c_void_p),  # WaitRecord, host-mapped
        ("limit_ns", ctypes.c_uint64),
        ("d_ld", ctypes.c_int64),
        ("scales_d_ld", ctypes.c_int64),
        ("act_limit", ctypes.c_float),
        ("act_alpha", ctypes.c_float),
        ("m", ctypes.c_int32),  # rows of A
        ("n", ctypes.c_int32),
        ("num_kb", ctypes.c_int32),
        ("num_groups", ctypes.c_int32),
        ("max_m", ctypes.c_int32),  # rows between groups when masked
        ("scales_b_ld", ctypes.c_int32),
        ("pad", ctypes.c_uint8 * 8),
    )
