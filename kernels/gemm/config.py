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
THREADS = 384
_MATH_WARPS = 8
_SCALE_PITCH = 640  # bytes: scales of up to 128 rows of A and of 3 rows before, on 128 bytes
_CHUNK_BYTES = 2048  # 16 rows x 64 columns of bf16, see epilogue/store.cuh

Elem = Literal["e4m3", "bf16"]
Grouping = Literal["dense", "contiguous", "masked"]
_ELEM_TYPE = {"e4m3": "megamoe::E4M3", "bf16": "megamoe::BF16"}
_GROUPING_TYPE = {"dense": "megamoe::Dense", "contiguous": "megamoe::Contiguous", "masked": "megamoe::Masked"}


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


@dataclass(frozen=True, kw_only=True)
class GemmConfig:
    """One kernel: D[M, N] = A[M, K] x B[N, K]^T, both K-major.

    ``block_m`` 64, 128 or 256, ``block_n`` a multiple of 16 (32 at block_m 64), at most 256;
    ``async_store``: D leaves through the copy engine while the next tile is computed; takes staging for the whole tile.
    ``stream_b``: B is read once and should leave L2 first. ``band``: units of M that run before the next units of N.
    """

    elem: Elem
    scaling: Scaling
    grouping: Grouping
    out_bf16: bool
    accumulate: bool
    block_m: int
    block_n: int
    cluster: int
    share: Share
    async_store: bool = False
    stream_b: bool = False
    band: int = 8

    def __post_init__(self) -> None:
        assert self.block_m in (64, 128, 256)
        assert self.block_n % (32 if self.block_m == 64 else 16) == 0
        assert self.block_m < 256 or (self.block_n <= 128 and self.share is not Share.SPLIT_K and self.elem == "e4m3")
        assert 0 < self.block_n <= 256
        assert (self.elem == "bf16") == (self.scaling is Scaling.NONE)
        assert self.cluster == 1 if self.share is Share.NONE else self.cluster > 1
        assert self.cluster == 2 or self.share in (Share.NONE, Share.SPLIT_K)
        assert not (self.accumulate and self.out_bf16)
        assert not self.async_store or (self.out_bf16 and self.cols % 64 == 0 and self.share is not Share.SPLIT_K)
        assert self.num_stages >= 3

    @property
    def stage_bytes(self) -> int:
        """Bytes that one stage of the ring takes from shared memory, scales included."""
        scales = 0
        if self.scaling is Scaling.BLOCK:
            scales = self.block_m * 4 if self.grouping == "dense" else max(1, self.block_m // 128) * _SCALE_PITCH
        return (self.block_m + self.block_n) * K_BLOCK_BYTES + scales

    @property
    def scale_box(self) -> int:
        """Rows of one copy of the scales of A: copies start at 16 bytes, so up to 3 rows come along before any tile."""
        return self.block_m if self.grouping == "dense" else min(self.block_m, 128) + 4

    @property
    def cols(self) -> int:
        """Columns of one math warpgroup."""
        return self.block_n // 2 if self.block_m == 64 else self.block_n

    @property
    def staging_bytes(self) -> int:
        """Where D is staged, or where split K collects sums: fp32, every CTA's, of a share of the 8-column groups."""
        if self.share is Share.SPLIT_K:
            return -(-self.cols // 8 // self.cluster) * self.cluster * 32 * _MATH_WARPS * 16
        row_blocks = max(1, self.block_m // 128)
        return _MATH_WARPS * _CHUNK_BYTES * (row_blocks * self.cols // 64 if self.async_store else 1)

    @property
    def num_stages(self) -> int:
        """As many as fit, at most 12: beyond that nothing is left to hide."""
        return min(12, (SMEM_LIMIT - self.staging_bytes - 16) // (self.stage_bytes + 16))

    @property
    def smem_bytes(self) -> int:
        """Shared memory of a CTA; the kernel asserts that its own sum is the same."""
        return self.num_stages * (self.stage_bytes + 16) + self.staging_bytes + 16

    @property
    def block_k(self) -> int:
        """Elements of K in one k-block."""
        return K_BLOCK_BYTES if self.elem == "e4m3" else K_BLOCK_BYTES // 2

    @property
    def name(self) -> str:
        """What files and logs call the kernel."""
        out = ("bf16" if self.out_bf16 else "f32") + ("acc" if self.accumulate else "")
        share = self.share.name.lower() + (str(self.cluster) if self.cluster > 1 else "")
        share += "_async" * self.async_store + "_stream" * self.stream_b
        return (
            f"gemm_{self.elem}_{self.scaling.name.lower()}_{self.grouping}_{out}"
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
                num_stages=self.num_stages,
                smem_bytes=self.smem_bytes,
            )
        }
struct Config : Facts {{
  using Elem = {_ELEM_TYPE[self.elem]};
  using Grouping = {_GROUPING_TYPE[self.grouping]};
}};
}}
extern "C" __global__ void __launch_bounds__({THREADS}, 1)
megamoe_gemm(const __grid_constant__ megamoe::gemm::Args args) {{
  megamoe::gemm::entry<megamoe::gemm::Config>(args);
}}
"""
        return KernelSource(name=self.name, code=code, entry="megamoe_gemm")


@dataclass(frozen=True)
class _Facts:
    out_bf16: bool
    accumulate: bool
    block_m: int
    block_n: int
    cluster: int
    async_store: bool
    stream_b: bool
    band: int


class Args(ctypes.Structure):
    """Run-time arguments, one layout for Python and CUDA."""

    _fields_ = (
        ("map_a", TensorMap),
        ("map_b", TensorMap),
        ("map_d", TensorMap),  # when async_store
        ("map_sfa", TensorMap),  # scales of A, [K / 128, M], when Scaling.BLOCK
        ("table", ctypes.c_void_p),  # int32: offsets [G + 1] or counts [G]; null when dense
        ("scales_a", ctypes.c_void_p),  # fp32 [M] when Scaling.ROW
        ("scales_b", ctypes.c_void_p),  # fp32 [G, ceil(N / 128), scales_b_ld] or [G, N]
        ("d", ctypes.c_void_p),
        ("record", ctypes.c_void_p),  # WaitRecord, host-mapped
        ("limit_ns", ctypes.c_uint64),
        ("d_ld", ctypes.c_int64),
        ("m", ctypes.c_int32),  # rows of A
        ("n", ctypes.c_int32),
        ("num_kb", ctypes.c_int32),
        ("num_groups", ctypes.c_int32),
        ("max_m", ctypes.c_int32),  # rows between groups when masked
        ("scales_b_ld", ctypes.c_int32),
        ("pad", ctypes.c_uint8 * 48),
    )
