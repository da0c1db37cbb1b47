// What one math warpgroup does with the k-blocks of a tile: 64 rows by kCols columns.
#pragma once
#include "megamoe/mma/operand.cuh"
#include "megamoe/mma/scales.cuh"
#include "megamoe/sync/pipeline.cuh"

namespace megamoe {

// BF16, and FP8 without scales: the tensor core keeps the running sum in fp32.
template <class Elem, int kCols>
struct DirectSum {
    float d[kCols / 2];

    template <class Pipe>
    MM_DEVICE void run(Pipe& pipe, const WaitLimit& limit, u32 a, u32 b, u32 stage_bytes, i32 num_kb, u32 lane) {
        u32 previous = 0;
        if (num_kb == 0) {
#pragma unroll
            for (int i = 0; i < kCols / 2; ++i) d[i] = 0.f;
        }
        for (i32 kb = 0; kb < num_kb; ++kb) {
            pipe.wait_full(limit);
            const u32 at = pipe.stage * stage_bytes;
            issue_block<Elem, kCols>(d, a + at, b + at, kb == 0);
            if (kb > 0) {
                ptx::wgmma_wait<1>();
                pipe.release(previous, lane);
            }
            previous = pipe.stage;
            pipe.advance();
        }
        ptx::wgmma_wait<0>();
        pin(d);
        if (num_kb > 0) pipe.release(previous, lane);
    }
};

// FP8 with true fp32 accumulation: Hopper's FP8 tensor cores keep about 13 mantissa bits of a running sum, so each
// k-block of 128 is summed alone, `kPart` columns at a time, and promoted into fp32 registers with its scales.
template <int kCols>
struct PromotedSum {
    static constexpr int kParts = kCols > 160 ? 2 : 1;
    static constexpr int kPart = kCols / kParts;
    float d[kParts][kPart / 2];

    MM_DEVICE void clear() {
#pragma unroll
        for (int p = 0; p < kParts; ++p)
#pragma unroll
            for (int i = 0; i < kPart / 2; ++i) d[p][i] = 0.f;
    }

    // `scale` says how a part's sums t of one k-block enter d: load(kb, stage), then promote<kPart>(d, t, first
    // column).
    template <class Pipe, class Scale>
    MM_DEVICE void run(Pipe& pipe, const WaitLimit& limit, u32 a, u32 b, u32 stage_bytes, i32 num_kb, u32 lane,
                       Scale&& scale) {
        float t[kPart / 2];
        for (i32 kb = 0; kb < num_kb; ++kb) {
            pipe.wait_full(limit);
            const u32 at = pipe.stage * stage_bytes;
            scale.load(kb, pipe.stage);
#pragma unroll
            for (int p = 0; p < kParts; ++p) {
                issue_block<E4M3, kPart>(t, a + at, b + at + p * kPart * kRowBytes, true);
                ptx::wgmma_wait<0>();
                pin(t);
                if (p == kParts - 1) pipe.release(pipe.stage, lane);
                scale.template promote<kPart>(d[p], t, p * kPart);
            }
            pipe.advance();
        }
    }
};

// 1x128 scales of A (in shared memory, one float a row and stage) times 128x128 scales of B.
template <int kCols, int kAlign>
struct BlockScale {
    BlockScalesB<kCols, kAlign> b;
    u32 sfa;          // shared address of this thread's first row's scale in stage 0
    u32 stage_bytes;  // from one stage's scales of A to the next
    i32 first;        // columns until the first 128-boundary
    float sa[2], sb[BlockScalesB<kCols, kAlign>::kBlocks];

    MM_DEVICE void load(i32 kb, u32 stage) {
        sa[0] = ptx::ld_shared_f32(sfa + stage * stage_bytes);
        sa[1] = ptx::ld_shared_f32(sfa + stage * stage_bytes + 32);
        b.get(kb, sb);
    }

    template <int kPart, int N>
    MM_DEVICE void promote(float (&d)[N], const float (&t)[N], int c0) const {
        constexpr int kBlocks = BlockScalesB<kCols, kAlign>::kBlocks;
        float s[2][kBlocks];
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) s[0][i] = sa[0] * sb[i], s[1][i] = sa[1] * sb[i];
#pragma unroll
        for (int j = 0; j < kPart / 8; ++j) {
            float s0, s1;
            const int c = c0 + 8 * j;
            if constexpr (kAlign >= 128) {
                s0 = s[0][c / 128], s1 = s[1][c / 128];
            } else {
                // Column c lies `first` or more behind the tile's start: one block further, or two.
                s0 = s[0][0], s1 = s[1][0];
#pragma unroll
                for (int i = 1; i < kBlocks; ++i) {
                    // A boundary can stand only where some aligned start puts it.
                    if (c >= (i - 1) * 128 + kAlign && c < i * 128 + 128) {
                        const bool beyond = c >= i * 128 || c >= first + (i - 1) * 128;
                        s0 = beyond ? s[0][i] : s0, s1 = beyond ? s[1][i] : s1;
                    }
                }
            }
            d[4 * j + 0] = fmaf(t[4 * j + 0], s0, d[4 * j + 0]);
            d[4 * j + 1] = fmaf(t[4 * j + 1], s0, d[4 * j + 1]);
            d[4 * j + 2] = fmaf(t[4 * j + 2], s1, d[4 * j + 2]);
            d[4 * j + 3] = fmaf(t[4 * j + 3], s1, d[4 * j + 3]);
        }
    }
};

// Per-token times per-channel scales wait for the epilogue: promotion only adds.
struct NoScale {
    MM_DEVICE void load(i32, u32) {}

    template <int kPart, int N>
    MM_DEVICE void promote(float (&d)[N], const float (&t)[N], int) const {
#pragma unroll
        for (int i = 0; i < N; ++i) d[i] += t[i];
    }
};

}  // namespace megamoe
