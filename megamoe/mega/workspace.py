"""``Workspace``: what one rank of a mega-kernel needs in memory. Fields and offsets, pure, the same on every rank.

Bounds are worst cases: any routing fits, all tokens of all ranks to one expert too. ``explain()`` prints every field
before anything is allocated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from megamoe.dispatch.capacity import padded_blocks
from megamoe.mega.config import BLOCK_ROWS, HALF_COLS, K_BLOCK_BYTES, TILE_COLS, MegaConfig
from megamoe.problem import Problem
from megamoe.symm_mem.arena import Arena, Field

_ROUTE_BYTES = _PUSH_BYTES = 16
_CONTROL_WORDS = 12
_BAND_BLOCKS = 32  # kBand of mega/context.cuh
_RING_BLOCKS = 128  # at least a band (docs/protocol.md); more lets copies run further ahead
_SCALE_BLOCK = 128
_SECTOR_FLOATS = 8  # scales of one row never share a 32-byte sector with another's


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """Fields of one rank for ``problem`` with S = ``slots`` local experts, run by kernels of ``config``.

    Shared experts of the config are the first of the S.
    """

    problem: Problem
    config: MegaConfig
    slots: int

    @property
    def total_slots(self) -> int:
        """R * S."""
        return self.problem.world_size * self.slots

    @property
    def max_copies(self) -> int:
        """Ranks that one token can go to: shared experts are on its own."""
        return min(self.problem.world_size, self.problem.top_k + (self.config.num_shared > 0))

    @property
    def max_routes(self) -> int:
        """Routes that one rank's experts can get in one call."""
        p = self.problem
        return p.max_tokens * (p.world_size * p.top_k + self.config.num_shared)

    @property
    def max_blocks(self) -> int:
        """Blocks of rows that they fill at most, each expert's last one padded."""
        return max(1, padded_blocks(self.max_routes, self.slots, BLOCK_ROWS))

    @property
    def ring_blocks(self) -> int:
        """Blocks of copied rows held at a time. One is free again when the first GEMM's tiles of it are all computed.

        All blocks, or at least a band of them: a copy then waits only for tiles of an earlier band or expert."""
        assert _RING_BLOCKS >= _BAND_BLOCKS, (_RING_BLOCKS, _BAND_BLOCKS)
        return min(self.max_blocks, _RING_BLOCKS)

    @property
    def row_pitch(self) -> int:
        """Bytes of a pushed row: whole k-blocks, padded with zeros."""
        return _round_up(self.problem.hidden * self.config.element_bytes, K_BLOCK_BYTES)

    @property
    def scale_pitch(self) -> int:
        """Floats of a pushed row's scales."""
        return _round_up(self.row_scales, _SECTOR_FLOATS)

    @property
    def row_scales(self) -> int:
        """Scales of one row of x."""
        if self.config.block_scaled:
            return math.ceil(self.problem.hidden / _SCALE_BLOCK)
        return 1 if self.config.row_scaled else 0

    @property
    def mid_columns(self) -> int:
        """Columns between two rows of activations: I, on 16 bytes."""
        return _round_up(self.problem.intermediate, 16 // self.config.element_bytes)

    @property
    def up_kb(self) -> int:
        """k-blocks of the first GEMM."""
        return math.ceil(self.problem.hidden / self.config.block_k)

    @property
    def down_kb(self) -> int:
        """k-blocks of the second."""
        return math.ceil(self.problem.intermediate / self.config.block_k)

    @property
    def up_tiles(self) -> int:
        """Column tiles of the first GEMM."""
        return math.ceil(self.problem.intermediate / self.config.up_cols)

    @property
    def mid_blocks(self) -> int:
        """Blocks of 128 columns of activations."""
        return math.ceil(self.problem.intermediate / HALF_COLS)

    @property
    def down_tiles(self) -> int:
        """Column tiles of the second."""
        return math.ceil(self.problem.hidden / TILE_COLS)

    @cached_property
    def arena(self) -> Arena:
        """The layout. Peers write the fields up to ``results``; the others are this rank's alone."""
        p, R, S = self.problem, self.problem.world_size, self.slots
        T, i32 = max(p.max_tokens, 1), torch.int32
        ring_rows, mid_rows = self.ring_blocks * BLOCK_ROWS, self.max_blocks * BLOCK_ROWS
        scaled = self.row_scales > 0
        fields = [
            Field("abort", (4,), i32),
            Field("header_flags", (R,), i32),
            Field("done_flags", (R,), i32),
            Field("offsets", (R, S + 1), i32),
            Field("targets", (R, S), i32),
            Field("arrived", (R, S), i32),
            Field("routes", (R, T * self.config.routes, _ROUTE_BYTES)),
            Field("rows", (R, T, self.row_pitch)),
            Field("row_scales", (R, T, self.scale_pitch), torch.float32),
            Field("results", (T, self.config.routes, p.hidden), torch.bfloat16),
            Field("control", (_CONTROL_WORDS,), i32),
            Field("histogram", (2, 2, self.total_slots), i32),
            Field("sent", (self.total_slots,), i32),
            Field("tiles_done", (2, self.max_blocks), i32),
            Field("copied", (2, self.max_blocks), i32),
            Field("casts_done", (2, self.max_blocks if self.config.row_scaled else 0), i32),
            Field("pushes", (T, self.max_copies, _PUSH_BYTES)),
            Field("pool", (ring_rows, self.row_pitch)),
            Field("pool_scales", (self.row_scales, ring_rows), torch.float32),
            Field("mid", (mid_rows, self.mid_columns), self.config.mid_dtype),
            Field("mid_scales", (self.mid_blocks if scaled else 0, mid_rows), torch.float32),
            Field("returns", (mid_rows if self.config.partial_sums else 0, p.hidden), torch.bfloat16),
        ]
        return Arena(*fields)

    def physical(self, topk_idx: torch.Tensor, rank: int) -> torch.Tensor:
        """What the kernel makes of topk_idx [T, K] on ``rank``: int64 [T, K + shared], slots of the R * S, -1 = none.

        Example: 2 ranks of 1 shared expert and 2 others, S = 3, on rank 1: [[0, 3, -1]] -> [[1, 5, -1, 3]].
        """
        shared = self.config.num_shared
        own = self.slots - shared
        idx = topk_idx.long()
        routed = torch.where(idx >= 0, idx.div(own, rounding_mode="floor") * self.slots + shared + idx % own, -1)
        first = torch.arange(shared, device=idx.device) + rank * self.slots
        return torch.cat([routed, first.expand(len(idx), shared)], dim=1)

    def explain(self) -> str:
        """Each field and its bytes."""
        return self.arena.explain()


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
