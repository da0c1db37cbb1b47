// Scales of FP8 operands, as the promotion sees them.
#pragma once
#include "megamoe/ptx/memory.cuh"

namespace megamoe {

// Scales of B, one per 128 x 128 block, for the columns c0 .. c0 + kCols of one warpgroup. Lane l of a warp keeps the
// scales of k-block 32 i + l, so that one load serves 32 k-blocks and a shuffle brings them to all lanes.
template <int kCols, int kAlign>  // kAlign: c0 is a multiple of it
struct BlockScalesB {
    static constexpr int kMaxOffset = kAlign >= 128 ? 0 : 128 - kAlign;
    static constexpr int kBlocks = (kMaxOffset + kCols + 127) / 128;
    const float* row[kBlocks];  // this lane's next load
    float now[kBlocks], later[kBlocks];
    i32 left;  // k-blocks of the tile from this lane's next load on

    // `scales` [n_blocks, num_kb] row-major with row stride `ld`; rows beyond the last are clamped (their columns are
    // masked).
    MM_DEVICE void start(const float* scales, i32 ld, i32 n_blocks, i32 c0, i32 kb0, i32 num_kb, u32 lane) {
#pragma unroll
        for (int b = 0; b < kBlocks; ++b)
            row[b] = scales + static_cast<i64>(min_of(c0 / 128 + b, n_blocks - 1)) * ld + kb0 + lane;
        left = num_kb - static_cast<i32>(lane);
        fetch();
    }

    // The same for two rows of scales, `first` and `first + distance`.
    MM_DEVICE void start_rows(const float* scales, i32 ld, i32 first, i32 distance, i32 kb0, i32 num_kb, u32 lane) {
        static_assert(kBlocks == 2);
        row[0] = scales + static_cast<i64>(min_of(first, distance - 1)) * ld + kb0 + lane;
        row[1] = row[0] + static_cast<i64>(distance) * ld;
        left = num_kb - static_cast<i32>(lane);
        fetch();
    }

    MM_DEVICE void fetch() {
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
            later[b] = left > 0 ? ptx::ld_global_nc_f32(row[b]) : 0.f;
            row[b] += kWarpSize;
        }
        left -= kWarpSize;
    }

    // The fetched scales become the current ones and the next 32 are asked for.
    MM_DEVICE void turn() {
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) now[b] = later[b];
        fetch();
    }

    MM_DEVICE void get(i32 kb, float (&s)[kBlocks]) {
        if (kb % kWarpSize == 0) turn();
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) s[b] = __shfl_sync(0xffffffffu, now[b], kb % kWarpSize);
    }
};

}  // namespace megamoe
