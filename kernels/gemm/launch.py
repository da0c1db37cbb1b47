"""From checked operands to a launched kernel: arguments, tensor maps, grid, and the record of waits that expired."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import cache

import torch

from megamoe import env
from megamoe.errors import MegaMoEError
from megamoe.kernels.gemm import tickets
from megamoe.kernels.gemm.config import CHUNK_MN, Args, GemmConfig, Major, Scaling, Share
from megamoe.kernels.gemm.heuristics import GemmDesc, choose
from megamoe.kernels.gemm.knobs import current
from megamoe.kernels.jit.kernel import LaunchShape, load
from megamoe.kernels.jit.structs import TensorMap
from megamoe.kernels.jit.tensor_map import Swizzle, encode

# WaitCode (sync/wait.cuh)
_WAITS = {1: "a stage to be filled", 2: "a stage to be read", 3: "the partial sums of its cluster"}
_ODD_OFFSET = 4


@dataclass(frozen=True, kw_only=True)
class Operands:
    """Checked operands as the kernels see them: a [M, K], b [N, K] or [G, N, K], d [M, N] or [G, M, N].

    a and b may be views with either of their last two strides 1; the description's majors say which.
    """

    a: torch.Tensor
    b: torch.Tensor
    d: torch.Tensor
    a_scale: torch.Tensor | None
    b_scale: torch.Tensor | None
    table: torch.Tensor | None  # offsets [G + 1] or counts [G], int32
    max_m: int = 0
    d_scale: torch.Tensor | None = None  # [M, blocks], adjacent rows, where D is e4m3
    row_weight: torch.Tensor | None = None
    act_limit: float = 0.0
    act_alpha: float = 0.0


def run(operands: Operands, desc: GemmDesc, config: GemmConfig | None = None) -> None:
    """Queue the GEMM on the current stream of the operands' device; ``config`` overrides the heuristics."""
    device = operands.a.device.index
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return run(operands, desc, config)
    record = _record(device)
    _raise_if_expired(record)
    config = config or choose(desc)
    shape = LaunchShape(threads=config.threads, smem_bytes=config.smem_bytes, cluster=config.cluster, pdl=current().pdl)
    load(config.source(), shape).launch(_arguments(operands, desc, config, record), grid(desc, config))


def grid(desc: GemmDesc, config: GemmConfig) -> int:
    """CTAs: one persistent cluster for each that fits on the allowed SMs, fewer if there is less work."""
    clusters = max(1, desc.num_sms // config.cluster)
    if desc.grouping in ("dense", "k"):
        unit_m = config.block_m * (2 if config.share is Share.B else 1)
        unit_n = config.block_n * (2 if config.share is Share.A else 1)
        units = math.ceil(desc.m / unit_m) * math.ceil(desc.n / unit_n)
        clusters = min(clusters, units * (desc.groups if desc.grouping == "k" else 1))
    return clusters * config.cluster


def _arguments(operands: Operands, desc: GemmDesc, config: GemmConfig, record: torch.Tensor) -> Args:
    a, b, d = operands.a, operands.b, operands.d
    rows_b = config.block_n // (2 if config.share is Share.B else 1)
    args = Args()
    args.map_a = _map(a, config.rows_a, config.block_k, config.a_major)
    args.map_b = _map(b, rows_b, config.block_k, config.b_major)
    if config.async_store:
        rows = (d.numel() // d.shape[-1], d.shape[-1])
        args.map_d = encode(d.data_ptr(), dtype=d.dtype, shape=rows, strides=(d.stride(-2), 1), box=(16, 64))
    if config.scaling in (Scaling.BLOCK, Scaling.VECTOR):
        assert operands.a_scale is not None and operands.b_scale is not None
        args.map_sfa = _scale_map(operands.a_scale, config.scale_box)
        if config.scaling is Scaling.VECTOR:
            args.map_sfb = _scale_map(operands.b_scale, config.block_n)
        args.scales_b_ld = operands.b_scale.shape[-1]
    elif config.scaling is Scaling.ROW:
        assert operands.a_scale is not None
        args.scales_a = operands.a_scale.data_ptr()
    if operands.b_scale is not None:
        args.scales_b = operands.b_scale.data_ptr()
    if operands.table is not None:
        args.table = operands.table.data_ptr()
    if operands.d_scale is not None:
        scale = operands.d_scale
        args.scales_d, args.scales_d_ld = scale.data_ptr(), _pitch(scale)
    if operands.row_weight is not None:
        args.row_weight = operands.row_weight.data_ptr()
    args.act_limit, args.act_alpha = operands.act_limit, operands.act_alpha
    args.d = d.data_ptr()
    if config.tickets:
        args.tickets = tickets.of_launch(a.device.index or 0).data_ptr()
    args.record = record.data_ptr()
    args.limit_ns = int(env.get("MEGAMOE_TIMEOUT_S") * 1e9)
    args.d_ld = d.stride(-2)
    args.m, args.n, args.max_m = a.shape[0], desc.n, operands.max_m
    args.num_kb = -(-desc.k // config.block_k)
    args.num_groups = desc.groups
    return args


def _map(x: torch.Tensor, rows: int, block_k: int, major: Major) -> TensorMap:
    """Map of an operand, ``rows`` of M or N and a k-block at a time (gemm/load.cuh)."""
    groups = x.shape[0] if x.dim() == 3 else 1
    size, k = x.shape[-2:]
    if major == "k":
        # Groups lie below each other without gaps.
        shape, strides = (groups * size, k), (x.stride(-2), 1)
        return encode(x.data_ptr(), dtype=x.dtype, shape=shape, strides=strides, box=(rows, block_k))
    step = x.stride(-1)
    apart = x.stride(0) if groups > 1 else k * step
    return encode(
        x.data_ptr(), dtype=x.dtype, shape=(groups, k, size), strides=(apart, step, 1), box=(1, block_k, CHUNK_MN)
    )


def _scale_map(scale: torch.Tensor, rows: int) -> TensorMap:
    """Map of 1x128 scales [R, blocks] with adjacent rows, ``rows`` of one block at a time."""
    return encode(
        scale.data_ptr(),
        dtype=scale.dtype,
        shape=(scale.shape[1], scale.shape[0]),
        strides=(_pitch(scale), 1),
        box=(1, rows),
        swizzle=Swizzle.NONE,
    )


def _pitch(scale: torch.Tensor) -> int:
    """Floats from one block of 1x128 scales to the next; torch may report any stride of a single block."""
    return scale.stride(1) if scale.shape[1] > 1 else -(-scale.shape[0] // 4) * 4


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
    if code == _ODD_OFFSET:
        raise ValueError(
            f"offsets of an earlier k-grouped GEMM with 1x128 scales must be multiples of 128, got {stage} at index "
            f"{block}; its result is void"
        )
    limit = env.get("MEGAMOE_TIMEOUT_S")
    raise MegaMoEError(
        f"an earlier GEMM gave up: block {block} waited longer than MEGAMOE_TIMEOUT_S ({limit:g} s)"
        f" for {_WAITS.get(code, f'wait {code}')} (stage {stage}, parity {parity}); "
        "its result is void. This is a defect of the kernel or of the device, not of the call."
    )
