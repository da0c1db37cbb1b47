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
    const float* row[kBlocks];  // this lane's scale of k-block 0
    float now[kBlocks], later[kBlocks];
    i32 left;  // k-blocks of the tile from this lane's on

    // `scales` [n_blocks, num_kb] row-major with row stride `ld`; rows beyond the last are clamped (their columns are
    // masked).
    MM_DEVICE void start(const float* scales, i32 ld, i32 n_blocks, i32 c0, i32 kb0, i32 num_kb, u32 lane) {
#pragma unroll
        for (int b = 0; b < kBlocks; ++b)
            row[b] = scales + static_cast<i64>(min_of(c0 / 128 + b, n_blocks - 1)) * ld + kb0 + lane;
        begin(num_kb, lane);
    }

    // The same for two rows of scales, `first` and `first + distance`.
    MM_DEVICE void start_rows(const float* scales, i32 ld, i32 first, i32 distance, i32 kb0, i32 num_kb, u32 lane) {
        static_assert(kBlocks == 2);
        row[0] = scales + static_cast<i64>(min_of(first, distance - 1)) * ld + kb0 + lane;
        row[1] = row[0] + static_cast<i64>(distance) * ld;
        begin(num_kb, lane);
    }

    MM_DEVICE void begin(i32 num_kb, u32 lane) {
        left = num_kb - static_cast<i32>(lane);
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) now[b] = later[b] = 0.f;
        fetch(0, true);
    }

    // Asks for the 32 scales from k-block kb on, if `wanted`.
    MM_DEVICE void fetch(i32 kb, bool wanted) {
#pragma unroll
        for (int b = 0; b < kBlocks; ++b)
            later[b] = ptx::ld_global_nc_f32_if(wanted && left > kb, row[b] + kb, later[b]);
    }

    // Every 32 k-blocks the fetched scales become the current ones and the next 32 are asked for. Without a branch: one
    // between the MMAs of a k-block and the wait for them would keep the compiler from moving work to before the wait.
    MM_DEVICE void get(i32 kb, float (&s)[kBlocks]) {
        const bool turn = kb % kWarpSize == 0;
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) now[b] = turn ? later[b] : now[b];
        fetch(kb + kWarpSize, turn);
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) s[b] = __shfl_sync(0xffffffffu, now[b], kb % kWarpSize);
    }
};

}  // namespace megamoe
