"""Which configuration a GEMM runs with: candidates, a predicted time for each, the least wins. Pure, runs anywhere.

The model counts what bounds a configuration (tensor-core cycles, bytes through L2, bytes from memory, latencies) with
constants measured on an H200 (docs/performance.md). ``MEGAMOE_PRINT_HEURISTICS=1`` prints candidates and scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from megamoe import env
from megamoe.kernels.gemm.config import Activation, GemmConfig, Grouping, Major, Out, Scaling, Share

# H200, measured in whole kernels. Clocks settle near this under dense FP8 load.
_GHZ = 1.55
_DRAM_BYTES_PER_US = 4.1e6
_L2_BYTES_PER_US = 1.0e7  # many SMs that ask for the same lines are served together
_SM_BYTES_PER_CYCLE = 70  # what one SM takes in through TMA from L2
_FIXED_US = 4.4  # launch, first load, last store
_SPLIT_US = 1.0  # sums across a cluster
# Weights that are read once and leave L2 first spare what stands there, up to so many. More push it out anyway, and the
# hint costs 3%.
_L2_STAYS_BYTES = 256e6
_SHORT_K = 512
# CTAs that run at once: clusters of 4 and 8 do not fill every GPC (32 clusters of 4 took two waves, 28 took one).
_MAX_SPLIT_CTAS = {2: 132, 4: 112, 8: 112}


@dataclass(frozen=True, kw_only=True)
class GemmDesc:
    """What is to be computed: D [m, n] (+)= A [m, k] x B [groups, n, k]^T; ``m`` counts the rows of all groups.

    Grouping "k": D [groups, m, n] (+)= A x B^T over each group's part of K; ``k`` is the mean of a part.
    """

    scaling: Scaling
    grouping: Grouping
    m: int
    n: int
    k: int
    groups: int = 1
    out: Out = "bf16"
    accumulate: bool = False
    a_major: Major = "k"
    b_major: Major = "k"
    activation: Activation = Activation.NONE
    num_sms: int = 132

    @property
    def elem_bytes(self) -> int:
        return 2 if self.scaling is Scaling.NONE else 1

    @property
    def rows(self) -> float:
        """Expected rows of one group."""
        return self.m if self.grouping == "k" else self.m / self.groups

    @property
    def weight_bytes(self) -> int:
        """Bytes of B."""
        return self.groups * self.n * self.k * self.elem_bytes

    @property
    def out_bytes(self) -> float:
        """Bytes that a column of the product takes in a row of D."""
        size = {"bf16": 2, "f32": 4, "e4m3": 1}[self.out]
        return size / (1 if self.activation is Activation.NONE else 2)


def candidates(desc: GemmDesc) -> Iterator[GemmConfig]:
    """Every configuration worth a score for ``desc``."""
    for block_m in _block_ms(desc):
        for block_n in _block_ns(desc, block_m):
            plain = GemmConfig(
                elem="bf16" if desc.scaling is Scaling.NONE else "e4m3",
                scaling=desc.scaling,
                grouping=desc.grouping,
                out=desc.out,
                accumulate=desc.accumulate,
                a_major=desc.a_major,
                b_major=desc.b_major,
                activation=desc.activation,
                block_m=block_m,
                block_n=block_n,
                cluster=1,
                share=Share.NONE,
                evict_first=desc.rows <= block_m and desc.weight_bytes <= _L2_STAYS_BYTES,
                band=_band(desc, block_m),
            )
            async_store = plain.out_bf16 and plain.out_cols % 64 == 0 and desc.rows > block_m
            plain = replace(plain, async_store=async_store)
            yield plain
            # (With an activation, and where rows of FP8 are grouped, sharing is not ahead, and reads register
            # banks twice.)
            plain_only = desc.activation is not Activation.NONE or (
                desc.scaling is Scaling.BLOCK and desc.grouping in ("contiguous", "masked")
            )
            if desc.rows > 128 and not plain_only:
                # Two tiles below each other share the larger operand; groups of few rows have no second tile.
                if block_m > 128 or desc.grouping not in ("dense", "k"):
                    yield replace(plain, cluster=2, share=Share.A)
                # (128 x 176 with scales of blocks takes every register, and spills when it also shares B.)
                spills = desc.scaling is Scaling.BLOCK and block_n == 176
                enough = block_m if desc.grouping in ("dense", "k") else 4 * block_m
                if desc.rows > enough and not spills and (desc.b_major == "k" or block_n % 128 == 0):
                    yield replace(plain, cluster=2, share=Share.B)
            elif desc.grouping == "dense" and desc.activation is Activation.NONE and block_m >= 64 and desc.rows <= 128:
                yield from _splits(desc, plain)


def _band(desc: GemmDesc, block_m: int) -> int:
    """Units of M in a band: what runs at one time should be about as tall as it is wide (2048 rows), in FP8.

    Where K is short, D's columns are written from top to bottom as far as possible (5% at K = 512).
    """
    if desc.scaling is Scaling.NONE or desc.grouping == "k" or desc.rows <= 8 * block_m:
        return 8
    return 16 if block_m <= 128 or desc.k <= _SHORT_K else 8


def _block_ms(desc: GemmDesc) -> tuple[int, ...]:
    if desc.activation is not Activation.NONE:
        return (128,)
    if desc.rows <= 64:
        few = tuple(rows for rows in (16, 32) if desc.rows <= rows)[:1] if desc.a_major == "k" else ()
        return (*few, 64)
    # (Registers are left for neither a third math warpgroup where each column has a scale, nor for a second row block
    # where columns are scaled at the end.)
    tall = {Scaling.BLOCK: (128, 192, 256), Scaling.ROW: (128, 192), Scaling.VECTOR: (128, 256)}
    return tall.get(desc.scaling, (128,)) if desc.rows > 128 else (128,)


def _block_ns(desc: GemmDesc, block_m: int) -> tuple[int, ...]:
    if desc.activation is not Activation.NONE:
        return (256,) if desc.out == "e4m3" else (128, 256)
    if block_m > 128:
        return (128,)
    sizes: tuple[int, ...] = (32, 64, 96, 128, 192, 256) if desc.rows <= 128 else (128, 144, 176, 192, 256)
    if block_m < 64:
        sizes = sizes[:4]
    if desc.scaling is Scaling.VECTOR:
        return tuple(size for size in sizes if size <= 128)
    if desc.b_major == "mn":
        columns = 128 if block_m <= 64 else 64  # of both warpgroups, whole chunks of 64 for each
        return tuple(size for size in sizes if size % columns == 0)
    # Scales per row and column are multiplied in at the end; with 256 columns they do not fit into registers.
    return sizes[:-1] if desc.scaling is Scaling.ROW else sizes


def _splits(desc: GemmDesc, plain: GemmConfig) -> Iterator[GemmConfig]:
    tiles = math.ceil(desc.n / plain.block_n)
    blocks = math.ceil(desc.k / plain.block_k)
    for split, most in _MAX_SPLIT_CTAS.items():
        if (
            tiles * split <= min(most, desc.num_sms)
            and blocks >= 2 * split
            and plain.block_m * plain.block_n <= 128 * 160
        ):
            yield replace(plain, cluster=split, share=Share.SPLIT_K, async_store=False)


def microseconds(desc: GemmDesc, config: GemmConfig) -> float:
    """Predicted time of ``desc`` with ``config``."""
    unit_m = config.block_m * (2 if config.share is Share.B else 1)
    unit_n = config.block_n * (2 if config.share is Share.A else 1)
    units = desc.groups * math.ceil(desc.rows / unit_m) * math.ceil(desc.n / unit_n)
    clusters = max(1, desc.num_sms // config.cluster)
    waves = math.ceil(units / clusters)
    split = config.cluster if config.share is Share.SPLIT_K else 1
    blocks = math.ceil(math.ceil(desc.k / config.block_k) / split)

    busy = min(units * config.cluster, desc.num_sms)
    cycles = _block_cycles(config)
    # What a CTA fetches for a k-block: its own tiles, less what a neighbour multicasts.
    fetched = 128 * (
        config.block_m / (2 if config.share is Share.A else 1) + config.block_n / (2 if config.share is Share.B else 1)
    )
    landed = 128 * (config.block_m + config.block_n)
    per_block = max(cycles, landed / _SM_BYTES_PER_CYCLE)
    tensor_us = waves * (blocks * per_block + _epilogue_cycles(config)) / _GHZ / 1e3
    l2_us = waves * busy * blocks * fetched / _L2_BYTES_PER_US
    weights = desc.weight_bytes
    other = desc.m * (desc.k * desc.elem_bytes + desc.n * desc.out_bytes * (2 if desc.accumulate else 1))
    other *= desc.groups if desc.grouping == "k" else 1
    # Fewer CTAs than SMs draw less than the whole bandwidth; what is read once leaves L2 alone.
    share = min(1.0, busy / (0.95 * desc.num_sms)) * _streaming(desc, config)
    dram_us = (weights * (1.0 if desc.rows <= config.block_m else 1.25) + other) / (_DRAM_BYTES_PER_US * share)
    if config.share in (Share.A, Share.B) and config.scaling is not Scaling.VECTOR:
        tensor_us *= 1.02  # was behind on all but a few shapes, by 1 to 3%
    body = max(tensor_us, l2_us, dram_us) + 0.12 * min(tensor_us, dram_us)
    return _FIXED_US + (_SPLIT_US if split > 1 else 0.0) + body


def _block_cycles(config: GemmConfig) -> float:
    """Cycles of one k-block of one tile."""
    ideal = max(config.block_m, 64) * config.block_n / 32
    if config.elem == "bf16":
        factor = 1.02 + 0.09 * (256 - config.cols) / 128 if config.cols <= 256 else 1.0
    else:
        tall = 1.135 if config.grouping in ("dense", "k") else 1.16
        factor = {256: tall, 192: 1.17}.get(config.block_m, {256: 1.12, 192: 1.08}.get(config.cols, 1.2))
        if config.scaling is Scaling.VECTOR:
            factor += 0.15  # a multiplication more for each promoted sum
        if config.scaling is Scaling.BLOCK and config.cols % 128:
            factor += 0.08 if config.cols % 64 == 0 else 0.22  # scales are selected by column
    latency = 330 if config.block_m <= 64 else 0  # one part a k-block: issue, wait, promote in turn
    return max(ideal * factor, latency)


def _epilogue_cycles(config: GemmConfig) -> float:
    area = config.block_m * config.block_n / 32768
    return 500 + (1000 if config.async_store else 1900) * area * (0.9 if config.block_m == 256 else 1.0)


def _streaming(desc: GemmDesc, config: GemmConfig) -> float:
    """Share of the memory's bandwidth that groups of few rows reach, by tile."""
    if config.block_m > 64 or desc.grouping not in ("contiguous", "masked"):
        return 1.0
    by_columns = {32: 0.85, 64: 0.92, 96: 0.98, 128: 1.0, 192: 0.945}.get(config.block_n, 0.97)
    return by_columns * (0.98 if desc.rows <= 32 < config.block_m else 1.0)  # rows that are loaded in vain


@lru_cache(maxsize=4096)
def choose(desc: GemmDesc) -> GemmConfig:
    """The candidate with the least predicted time."""
    scored = sorted(((microseconds(desc, c), c) for c in candidates(desc)), key=lambda pair: (pair[0], pair[1].name))
    if env.get("MEGAMOE_PRINT_HEURISTICS"):
        print(f"{desc}")
        for us, config in scored:
            print(f"  {us:9.1f} us  {config.name}")
    return scored[0][1]
