"""Worst cases, each stated once: rows a region must hold, bounds of the rings, padded blocks, bytes.

The memory these bounds are for: each source rank owns a *region* at each owner and pushes rows there, at most one per
token. Rows are needed until their last local expert is done, so the ring is one of token *chunks*, not of rows: the
tokens of every source are cut into ``chunks`` equal parts, two parts are in flight, and chunk c waits only for chunk
c - 2. Nothing overflows and nothing is dropped, whatever the routing: a chunk's worst case always has its place.
Each chunk reads the weights again, which is what bounds the number of chunks from above.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Where = Literal["symmetric", "local"]


@dataclass(frozen=True, kw_only=True)
class Field:
    """One array of the workspace: ``symmetric`` ones are written or read by peers."""

    name: str
    where: Where
    rows: int
    row_bytes: int
    meaning: str

    @property
    def bytes(self) -> int:
        return self.rows * self.row_bytes


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """Worst cases of one layer on one rank.

    Args:
        world_size: R.
        slots_per_rank: S, local expert slots.
        top_k: K.
        max_tokens: bound on T of every rank.
        chunks: parts the tokens are cut into; 1 keeps everything in flight at once.
        block_m: rows of a GEMM tile.
    """

    world_size: int
    slots_per_rank: int
    top_k: int
    max_tokens: int
    chunks: int = 1
    block_m: int = 128

    def __post_init__(self) -> None:
        for name in ("world_size", "slots_per_rank", "top_k", "chunks", "block_m"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_tokens < 0:
            raise ValueError(f"max_tokens must be at least 0, got {self.max_tokens}")

    @property
    def chunk_tokens(self) -> int:
        """Tokens of one source in one chunk."""
        return -(-self.max_tokens // self.chunks)

    @property
    def depth(self) -> int:
        """Chunks in flight: chunk c waits for c - 2."""
        return min(self.chunks, 2)

    @property
    def send_rows(self) -> int:
        """Rows one source sends in one call: each token once to each of at most min(R, K) ranks."""
        return self.max_tokens * min(self.world_size, self.top_k)

    @property
    def region_rows(self) -> int:
        """Rows of one source at one owner: every token of the chunks in flight."""
        return self.depth * self.chunk_tokens

    @property
    def received_rows(self) -> int:
        """Rows of all sources at one owner."""
        return self.world_size * self.region_rows

    @property
    def chunk_routes(self) -> int:
        """Routes of one chunk at one owner: all K of every token of every source."""
        return self.world_size * self.chunk_tokens * self.top_k

    @property
    def pool_blocks(self) -> int:
        """Blocks of ``block_m`` pool slots in flight, each expert's last one padded."""
        return self.depth * padded_blocks(self.chunk_routes, self.slots_per_rank, self.block_m)

    @property
    def pool_rows(self) -> int:
        """Pool slots in flight, padding counted."""
        return self.pool_blocks * self.block_m

    def fields(self, *, in_row_bytes: int, mid_row_bytes: int, out_row_bytes: int) -> tuple[Field, ...]:
        """The workspace's arrays.

        Args:
            in_row_bytes: a row of x as it crosses, scales included.
            mid_row_bytes: a row between the two GEMMs, scales included.
            out_row_bytes: a row of y as it crosses.
        """
        slot, weight = 2, 4  # int16 local slots, fp32 weights
        return (
            Field(
                name="regions",
                where="symmetric",
                rows=self.received_rows,
                row_bytes=in_row_bytes + self.top_k * (slot + weight),
                meaning="received rows with their local slots and weights, one region a source",
            ),
            Field(
                name="partials",
                where="symmetric",
                rows=self.send_rows,
                row_bytes=out_row_bytes,
                meaning="partial sums that owners push back, one a sent row",
            ),
            Field(
                name="headers",
                where="symmetric",
                rows=2 * self.world_size * self.chunks,
                row_bytes=4 * (self.slots_per_rank + 2),
                meaning="counts per local slot, T and epoch of each source and chunk, in two banks",
            ),
            Field(
                name="pool_index",
                where="local",
                rows=self.pool_rows,
                row_bytes=8,
                meaning="received row and k of each pool slot",
            ),
            Field(
                name="mid_pool",
                where="local",
                rows=self.pool_rows,
                row_bytes=mid_row_bytes,
                meaning="activations between the two GEMMs",
            ),
            Field(
                name="out_pool",
                where="local",
                rows=self.pool_rows,
                row_bytes=out_row_bytes,
                meaning="the second GEMM's rows until they are summed",
            ),
        )


def padded_blocks(routes: int, slots: int, block_m: int) -> int:
    """Most blocks of ``block_m`` that ``routes`` routes over ``slots`` slots can fill; some routing reaches it.

    >>> padded_blocks(5, 3, 4)  # counts 1, 1, 3 or 1, 2, 2
    3
    """
    filled = min(slots, routes)
    return filled + (routes - filled) // block_m


def chunks_for(compute_us: float, weights_us: float) -> int:
    """Most chunks whose reading of the weights, once each, stays under half the compute time; at least 1."""
    return max(int(0.5 * compute_us / weights_us), 1)
