// Scales of FP8 operands, as the promotion sees them.
#pragma once
#include "megamoe/ptx/memory.cuh"

namespace megamoe {

// Scales of B, one per 128 x 128 block, for the columns c0 .. c0 + kCols of one warpgroup. Each lane loads them itself,
// a k-block ahead: a line of L1 serves 32 of them, and all lines of a tile are asked for at its start.
template <int kCols, int kAlign>  // kAlign: c0 is a multiple of it
struct BlockScalesB {
    static constexpr int kMaxOffset = kAlign >= 128 ? 0 : 128 - kAlign;
    static constexpr int kBlocks = (kMaxOffset + kCols + 127) / 128;
    const float* row[kBlocks];  // scale of k-block 0
    float ahead[kBlocks];
    i32 num_kb;

    // `scales` [n_blocks, num_kb] row-major with row stride `ld`; rows beyond the last are clamped (their columns are
    // masked).
    MM_DEVICE void start(const float* scales, i32 ld, i32 n_blocks, i32 c0, i32 kb0, i32 blocks, u32 lane) {
#pragma unroll
        for (int b = 0; b < kBlocks; ++b)
            row[b] = scales + static_cast<i64>(min_of(c0 / 128 + b, n_blocks - 1)) * ld + kb0;
        begin(blocks, lane);
    }

    // The same for two rows of scales, `first` and `first + distance`.
    MM_DEVICE void start_rows(const float* scales, i32 ld, i32 first, i32 distance, i32 kb0, i32 blocks, u32 lane) {
        static_assert(kBlocks == 2);
        row[0] = scales + static_cast<i64>(min_of(first, distance - 1)) * ld + kb0;
        row[1] = row[0] + static_cast<i64>(distance) * ld;
        begin(blocks, lane);
    }

    // NOTE: the same for all lanes, the scales would go to uniform registers, and the wait for that stands between
    // MMAs.
    MM_DEVICE void begin(i32 blocks, u32 lane) {
        num_kb = blocks;
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
            if (const i32 kb = static_cast<i32>(lane * 32); kb < blocks) ptx::prefetch_l2(row[b] + kb);
            ahead[b] = 0.f;
        }
        fetch(0);
    }

    MM_DEVICE void fetch(i32 kb) {
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) ahead[b] = ptx::ld_global_nc_f32_if(kb < num_kb, row[b] + kb, ahead[b]);
    }

    // Those of k-block kb; the next are asked for.
    MM_DEVICE void get(i32 kb, float (&s)[kBlocks]) {
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) s[b] = ahead[b];
        fetch(kb + 1);
    }
};

}  // namespace megamoe
