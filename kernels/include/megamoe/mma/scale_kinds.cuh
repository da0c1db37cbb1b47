// Further ways in which a k-block's sums are scaled, for PromotedSum (mma/mainloop.cuh).
#pragma once
#include "megamoe/mma/mainloop.cuh"

namespace megamoe {

// 1x128 scales of A times 128x128 scales of B whose gate and up rows, scaled apart, are interleaved by 8: columns
// 16 p .. 16 p + 7 have the gate block's scale, the next 8 the up block's. The tile lies in one block of each.
template <int kCols>
struct GatedBlockScale {
    static_assert(kCols == 128 || kCols == 256);
    BlockScalesB<256, 128> b;           // two rows of scales
    u32 sfa, stage_bytes, block_bytes;  // as in BlockScale
    float sb[2];
    float2 gate, up;

    MM_DEVICE void load(i32 kb) { b.get(kb, sb); }

    MM_DEVICE void load_rows(int row_block, u32 stage) {
        const u32 at = sfa + stage * stage_bytes + row_block * block_bytes;
        const float sa[2] = {ptx::ld_shared_f32(at), ptx::ld_shared_f32(at + 8 * 4)};
        gate = make_float2(sa[0] * sb[0], sa[1] * sb[0]), up = make_float2(sa[0] * sb[1], sa[1] * sb[1]);
    }

    template <int N>
    MM_DEVICE void promote(float (&d)[N], const float (&t)[N], int) const {
        promote_columns(d, t, [&](int offset) { return offset / 8 % 2 == 0 ? gate : up; });
    }
};

// 1x128 scales of A and of B, both from the stage: each of a thread's sums has a factor of its own. All are multiplied
// while the MMAs run, which takes a register for each; two row blocks of sums leave no room for that.
template <int kCols>
struct VectorScale {
    u32 sfa, sfb, stage_bytes;  // sfb: of this thread's first column in stage 0
    float s[kCols / 2];

    MM_DEVICE void load(i32) {}

    MM_DEVICE void load_rows(int, u32 stage) {
        const u32 at = stage * stage_bytes;
        const float sa[2] = {ptx::ld_shared_f32(sfa + at), ptx::ld_shared_f32(sfa + at + 8 * 4)};
#pragma unroll
        for (int j = 0; j < kCols / 8; ++j) {
            const float2 sb = ptx::ld_shared_v2_f32(sfb + at + j * 8 * 4);
            s[4 * j + 0] = sa[0] * sb.x, s[4 * j + 1] = sa[0] * sb.y;
            s[4 * j + 2] = sa[1] * sb.x, s[4 * j + 3] = sa[1] * sb.y;
        }
    }

    template <int N>
    MM_DEVICE void promote(float (&d)[N], const float (&t)[N], int c0) const {
#pragma unroll
        for (int i = 0; i < N; ++i) d[i] = fmaf(t[i], s[c0 / 2 + i], d[i]);
    }
};

}  // namespace megamoe
