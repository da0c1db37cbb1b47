// Scales from one layout to another, a tile of 64 rows at a time, through shared memory where rows turn.
#pragma once
#include "megamoe/ptx/quant.cuh"

namespace megamoe::quant {

constexpr int kTileRows = 64, kTileBlocks = 32, kTileStride = kTileBlocks + 1;  // odd: both orders without conflicts
constexpr int kConvertThreads = 256;

// One matrix of a batch, and where the CTA's tile begins in it.
struct ScaleTile {
    i64 batch, rows, ld;  // ld: stride between (words of) blocks where rows stand next to each other
    i32 blocks;
    i64 row0;
    i32 block0;
};

MM_DEVICE u32 to_ue8m0(u32 bits) {  // fp32 powers of two from 2^-126 up, 2^-127 -> 0, all else -> 255, NaN
    if (bits == 0x00400000u) return 0u;
    return (bits & 0x807fffffu) == 0u && bits != 0u ? bits >> 23 : 255u;
}

MM_DEVICE u32 from_ue8m0(u32 code) {
    return code == 0u ? 0x00400000u : code == 255u ? 0x7fc00000u : code << 23;
}

// A layout reads and writes tile[row][block], bits of fp32. `each` walks a thread's kWords words of it in its own
// order.
struct Fp32RowMajor {
    static constexpr bool kPacked = false, kAdjacent = false;
    static constexpr int kWords = kTileRows / 8;
    template <class F>
    static MM_DEVICE void each(const ScaleTile& t, F&& f) {
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
            const i32 row = static_cast<i32>(threadIdx.x / 32) + 8 * i, block = static_cast<i32>(threadIdx.x % 32);
            f(i, row, block, (t.batch * t.rows + t.row0 + row) * t.blocks + t.block0 + block);
        }
    }
};

struct Fp32RowsAdjacent {
    static constexpr bool kPacked = false, kAdjacent = true;
    static constexpr int kWords = kTileBlocks / 4;
    template <class F>
    static MM_DEVICE void each(const ScaleTile& t, F&& f) {
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
            const i32 row = static_cast<i32>(threadIdx.x % 64), block = static_cast<i32>(threadIdx.x / 64) + 4 * i;
            f(i, row, block, (t.batch * t.blocks + t.block0 + block) * t.ld + t.row0 + row);
        }
    }
};

// Four UE8M0 codes to a word, block 4 w in the lowest byte; `block` is the word's first.
struct PackedRowMajor {
    static constexpr bool kPacked = true, kAdjacent = false;
    static constexpr int kWords = kTileRows / 32;
    template <class F>
    static MM_DEVICE void each(const ScaleTile& t, F&& f) {
        const i32 words = ceil_div(t.blocks, 4);
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
            const i32 row = static_cast<i32>(threadIdx.x / 8) + 32 * i, word = static_cast<i32>(threadIdx.x % 8);
            f(i, row, 4 * word, (t.batch * t.rows + t.row0 + row) * words + t.block0 / 4 + word);
        }
    }
};

struct PackedRowsAdjacent {
    static constexpr bool kPacked = true, kAdjacent = true;
    static constexpr int kWords = kTileBlocks / 16;
    template <class F>
    static MM_DEVICE void each(const ScaleTile& t, F&& f) {
        const i32 words = ceil_div(t.blocks, 4);
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
            const i32 row = static_cast<i32>(threadIdx.x % 64), word = static_cast<i32>(threadIdx.x / 64) + 4 * i;
            f(i, row, 4 * word, (t.batch * words + t.block0 / 4 + word) * t.ld + t.row0 + row);
        }
    }
};

MM_DEVICE u32 to_packed(uint4 v) {
    return to_ue8m0(v.x) | to_ue8m0(v.y) << 8 | to_ue8m0(v.z) << 16 | to_ue8m0(v.w) << 24;
}

// Any layout to any other.
struct ConvertScales {
    // Grid (block tiles, row tiles, batch). Codes of blocks beyond the last are 0.
    template <class From, class To>
    static MM_DEVICE void run(const u32* from, u32* to, i64 rows, i32 blocks, i64 ld) {
        __shared__ u32 tile[kTileRows][kTileStride];
        const ScaleTile t{blockIdx.z,
                          rows,
                          ld,
                          blocks,
                          static_cast<i64>(blockIdx.y) * kTileRows,
                          static_cast<i32>(blockIdx.x) * kTileBlocks};
        auto inside = [&](i32 row, i32 block) { return t.row0 + row < t.rows && t.block0 + block < t.blocks; };
        // All loads first: the compiler would not move one before the store of another to shared memory.
        u32 held[From::kWords];
        From::each(t, [&](int i, i32 row, i32 block, i64 at) { held[i] = inside(row, block) ? __ldg(from + at) : 0u; });
        From::each(t, [&](int i, i32 row, i32 block, i64) {
            if (!inside(row, block)) return;
            const u32 v = held[i];
            if constexpr (From::kPacked) {
#pragma unroll
                for (int j = 0; j < 4; ++j) tile[row][block + j] = from_ue8m0(v >> (8 * j) & 0xffu);
            } else {
                tile[row][block] = v;
            }
        });
        __syncthreads();
        To::each(t, [&](int, i32 row, i32 block, i64 at) {
            if (!inside(row, block)) return;
            u32 v = 0;
            if constexpr (To::kPacked) {
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    if (t.block0 + block + j < t.blocks) v |= to_ue8m0(tile[row][block + j]) << (8 * j);
            } else {
                v = tile[row][block];
            }
            to[at] = v;
        });
    }
};

// From fp32 in rows where a row is whole pieces of four scales and starts at 16 bytes. A tile is 64 rows by at most 16
// pieces: read as it lies, four pieces a thread in flight, and stored by rows through shared memory where the target's
// rows are adjacent. Grid (tiles of 64 blocks, tiles of 64 rows, batch).
struct ConvertPieces {
    static constexpr int kTilePieces = 16, kEach = kTileRows * kTilePieces / kConvertThreads;
    static constexpr int kPitch = kTileRows + 1;  // odd, as above

    // A tile of height rows by width pieces. Piece i of it stands in row i / width; a thread's next one is
    // kConvertThreads further.
    struct Pieces {
        i32 height, width;
        template <class F>
        MM_DEVICE void each(F&& f) const {
            const i32 thread = static_cast<i32>(threadIdx.x);
            i32 row = thread / width, piece = thread % width;
            const i32 rows_on = kConvertThreads / width, pieces_on = kConvertThreads % width;
#pragma unroll
            for (int i = 0; i < kEach; ++i) {
                if (row < height) f(i, row, piece);
                row += rows_on, piece += pieces_on;
                if (piece >= width) ++row, piece -= width;
            }
        }
    };

    template <class To>
    static MM_DEVICE void run(const u32* from, u32* to, i64 rows, i32 blocks, i64 ld) {
        const i32 pieces = blocks / 4, piece0 = static_cast<i32>(blockIdx.x) * kTilePieces;
        const i64 batch = blockIdx.z, row0 = static_cast<i64>(blockIdx.y) * kTileRows;
        const Pieces tile{static_cast<i32>(min_of(rows - row0, static_cast<i64>(kTileRows))),
                          min_of(pieces - piece0, kTilePieces)};
        const i64 first = (batch * rows + row0) * pieces + piece0;  // piece of all where the tile starts
        uint4 held[kEach];
        tile.each([&](int i, i32 row, i32 piece) {
            held[i] = ptx::ld_global_nc_v4(from + 4 * (first + row * pieces + piece));
        });
        if constexpr (!To::kAdjacent) {
            static_assert(To::kPacked);
            tile.each([&](int i, i32 row, i32 piece) { to[first + row * pieces + piece] = to_packed(held[i]); });
        } else {
            constexpr int kWords = To::kPacked ? 1 : 4;  // of a piece
            __shared__ u32 turned[kTilePieces * kWords * kPitch];
            tile.each([&](int i, i32 row, i32 piece) {
                u32* at = turned + piece * kWords * kPitch + row;
                if constexpr (To::kPacked) {
                    at[0] = to_packed(held[i]);
                } else {
                    at[0] = held[i].x, at[kPitch] = held[i].y, at[2 * kPitch] = held[i].z, at[3 * kPitch] = held[i].w;
                }
            });
            __syncthreads();
            const i32 row = static_cast<i32>(threadIdx.x % kTileRows);
            u32* out = to + (batch * pieces + piece0) * kWords * ld + row0 + row;
#pragma unroll
            for (int i = 0; i < kEach * kWords; ++i) {
                const i32 word = static_cast<i32>(threadIdx.x / kTileRows) + i * (kConvertThreads / kTileRows);
                if (row < tile.height && word < tile.width * kWords) out[word * ld] = turned[word * kPitch + row];
            }
        }
    }
};

}  // namespace megamoe::quant
