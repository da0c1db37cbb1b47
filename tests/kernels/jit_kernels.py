"""Kernels that the JIT's tests share."""

from __future__ import annotations

import ctypes
from pathlib import Path

from megamoe.kernels.jit.source import KernelSource
from megamoe.kernels.jit.structs import TensorMap, cuda_args


class SaxpyArgs(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("n", ctypes.c_int32),
        ("alpha", ctypes.c_float),
    )


class TileArgs(ctypes.Structure):
    _fields_ = (
        ("a", TensorMap),
        ("b", TensorMap),
        ("d", ctypes.c_void_p),
        ("k", ctypes.c_int32),
        ("pad", ctypes.c_uint8 * 52),
    )


def saxpy(name: str = "saxpy", comment: str = "") -> KernelSource:
    """y += alpha * x over n floats; ``comment`` makes another source of it."""
    body = """
extern "C" __global__ void saxpy(const __grid_constant__ SaxpyArgs args) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < args.n) static_cast<float*>(args.y)[i] += args.alpha * static_cast<const float*>(args.x)[i];
}
"""
    return KernelSource(name, f"{cuda_args('SaxpyArgs', SaxpyArgs)}{body}// {comment}\n", "saxpy")


def tile() -> KernelSource:
    """D [64, 64] fp32 = A [64, K] @ B [64, K]^T in e4m3, by TMA and WGMMA of 128 threads, 16400 bytes of smem."""
    code = Path(__file__).with_name("jit_tile.cu").read_text()
    return KernelSource("tile", cuda_args("Args", TileArgs) + code, "tile")


def spilling() -> KernelSource:
    """Holds 64 values a thread, indexed at run time, with room for fewer."""
    code = """
extern "C" __global__ void __launch_bounds__(1024) spilling(float* x, int n) {
  float v[64];
  for (int i = 0; i < 64; ++i) v[i] = x[i * n + threadIdx.x];
  for (int k = 0; k < n; ++k) {
#pragma unroll
    for (int i = 0; i < 64; ++i) v[i] = v[i] * v[(i + 7) % 64] + x[k];
  }
  for (int i = 0; i < 64; ++i) x[i * n + threadIdx.x] = v[i];
}
"""
    return KernelSource("spilling", code, "spilling")


def serialised() -> KernelSource:
    """Issues WGMMA under a divergent branch, which makes ptxas wait for each one and say so (C7520)."""
    code = tile().code.replace("step < kBlockK;", "step < (int)threadIdx.x;")
    return KernelSource("serialised", code, "tile")


def register_clash() -> KernelSource:
    """setmaxnreg in a kernel without a known number of registers: ptxas ignores it and says so (C7508)."""
    code = """
extern "C" __global__ void register_clash(float* x) {
  if (threadIdx.x < 128) { asm volatile("setmaxnreg.dec.sync.aligned.u32 40;"); x[threadIdx.x] = 1; }
  else { asm volatile("setmaxnreg.inc.sync.aligned.u32 232;"); x[threadIdx.x] = 2; }
}
"""
    return KernelSource("register_clash", code, "register_clash")
