"""From checked operands to a launched kernel: arguments, tensor maps, grid, and the record of waits that expired."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import cache

import torch

from megamoe import env
from megamoe.errors import MegaMoEError
from megamoe.kernels.gemm.config import THREADS, Args, GemmConfig, Scaling, Share
from megamoe.kernels.gemm.heuristics import GemmDesc, choose
from megamoe.kernels.gemm.knobs import current
from megamoe.kernels.jit.kernel import LaunchShape, load
from megamoe.kernels.jit.tensor_map import Swizzle, encode

_WAITS = {1: "a stage to be filled", 2: "a stage to be read", 3: "the partial sums of its cluster"}


@dataclass(frozen=True, kw_only=True)
class Operands:
    """Checked operands as the kernels see them: a [M, K], b [G, N, K], d [M, N], 2-D or 3-D with unit inner stride."""

    a: torch.Tensor
    b: torch.Tensor
    d: torch.Tensor
    a_scale: torch.Tensor | None
    b_scale: torch.Tensor | None
    table: torch.Tensor | None  # offsets [G + 1] or counts [G], int32
    max_m: int = 0


def run(operands: Operands, desc: GemmDesc, config: GemmConfig | None = None) -> None:
    """Queue the GEMM on the current stream of the operands' device; ``config`` overrides the heuristics."""
    device = operands.a.device.index
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return run(operands, desc, config)
    record = _record(device)
    _raise_if_expired(record)
    config = config or choose(desc)
    shape = LaunchShape(threads=THREADS, smem_bytes=config.smem_bytes, cluster=config.cluster, pdl=current().pdl)
    load(config.source(), shape).launch(_arguments(operands, desc, config, record), grid(desc, config))


def grid(desc: GemmDesc, config: GemmConfig) -> int:
    """CTAs: one persistent cluster for each that fits on the allowed SMs, fewer if there is less work."""
    clusters = max(1, desc.num_sms // config.cluster)
    if desc.grouping == "dense":
        unit_m = config.block_m * (2 if config.share is Share.B else 1)
        unit_n = config.block_n * (2 if config.share is Share.A else 1)
        clusters = min(clusters, math.ceil(desc.m / unit_m) * math.ceil(desc.n / unit_n))
    return clusters * config.cluster


def _arguments(operands: Operands, desc: GemmDesc, config: GemmConfig, record: torch.Tensor) -> Args:
    a, b, d = operands.a, operands.b, operands.d
    rows_a = config.block_m // (2 if config.share is Share.A else 1)
    rows_b = config.block_n // (2 if config.share is Share.B else 1)
    args = Args()
    args.map_a = encode(
        a.data_ptr(), dtype=a.dtype, shape=tuple(a.shape), strides=a.stride(), box=(rows_a, config.block_k)
    )
    weights = (desc.groups * desc.n, desc.k)
    args.map_b = encode(
        b.data_ptr(), dtype=b.dtype, shape=weights, strides=(b.stride(-2), 1), box=(rows_b, config.block_k)
    )
    if config.async_store:
        args.map_d = encode(d.data_ptr(), dtype=d.dtype, shape=tuple(d.shape), strides=d.stride(), box=(16, 64))
    if config.scaling is Scaling.BLOCK:
        assert operands.a_scale is not None and operands.b_scale is not None
        scale = operands.a_scale
        blocks = scale.shape[1]
        pitch = scale.stride(1) if blocks > 1 else -(-scale.shape[0] // 4) * 4
        args.map_sfa = encode(
            scale.data_ptr(),
            dtype=scale.dtype,
            shape=(blocks, scale.shape[0]),
            strides=(pitch, 1),
            box=(1, config.scale_box),
            swizzle=Swizzle.NONE,
        )
        args.scales_b_ld = operands.b_scale.shape[-1]
    elif config.scaling is Scaling.ROW:
        assert operands.a_scale is not None
        args.scales_a = operands.a_scale.data_ptr()
    if operands.b_scale is not None:
        args.scales_b = operands.b_scale.data_ptr()
    if operands.table is not None:
        args.table = operands.table.data_ptr()
    args.d = d.data_ptr()
    args.record = record.data_ptr()
    args.limit_ns = int(env.get("MEGAMOE_TIMEOUT_S") * 1e9)
    args.d_ld = d.stride(0)
    args.m, args.n, args.max_m = a.shape[0], desc.n, operands.max_m
    args.num_kb = -(-desc.k // config.block_k)
    args.num_groups = desc.groups
    return args


@cache
def num_sms(device: int) -> int:
    """Multiprocessors of a device."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def _record(device: int) -> torch.Tensor:
    """WaitRecord (sync/wait.cuh) of a device: pinned; kernels write it and the host reads it without waiting."""
    return torch.zeros(4, dtype=torch.int32).pin_memory()


def _raise_if_expired(record: torch.Tensor) -> None:
    words = (ctypes.c_uint32 * 4).from_address(record.data_ptr())
    if words[0] == 0:
        return
    code, block, stage, parity = words
    words[0] = 0
    limit = env.get("MEGAMOE_TIMEOUT_S")
    raise MegaMoEError(
        f"an earlier GEMM gave up: block {block} waited longer than MEGAMOE_TIMEOUT_S ({limit:g} s)"
        f" for {_WAITS.get(code, f'wait {code}')} (stage {stage}, parity {parity}); "
        "its result is void. This is a defect of the kernel or of the device, not of the call."
    )
