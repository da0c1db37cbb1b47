// What one math warpgroup does with the k-blocks of a tile: 64 rows by kCols columns.
#pragma once
#include "megamoe/mma/operand.cuh"
#include "megamoe/mma/scales.cuh"
#include "megamoe/sync/pipeline.cuh"

namespace megamoe {

struct NoPreparation {
    MM_DEVICE void operator()(i32, u32) const {}
};

struct NothingElse {
    MM_DEVICE void operator()() const {}
};

// BF16, and FP8 without scales: the tensor core keeps the running sum in fp32.
template <class Elem, int kCols, Major kMajorA = Major::K, Major kMajorB = Major::K>
struct DirectSum {
    float d[kCols / 2];

    // `prepare(kb, offset)` may change a k-block that has arrived at `offset` bytes from the first stage. `meanwhile()`
    // is called once, under the first MMAs.
    template <class Pipe, class Prepare = NoPreparation, class Meanwhile = NothingElse>
    MM_DEVICE void run(Pipe& pipe, const WaitLimit& limit, u32 a, u32 b, u32 stage_bytes, i32 num_kb, u32 lane,
                       const Prepare& prepare = {}, const Meanwhile& meanwhile = {}) {
        u32 previous = 0;
#pragma unroll
        for (int i = 0; i < kCols / 2; ++i) d[i] = 0.f;
        pin(d);
        for (i32 kb = 0; kb < num_kb; ++kb) {
            pipe.wait_full(limit);
            const u32 at = pipe.stage * stage_bytes;
            prepare(kb, at);
            issue_block<Elem, kCols, kMajorA, kMajorB>(d, a + at, b + at, false);
            if (kb > 0) {
                ptx::wgmma_wait<1>();
                pipe.release(previous, lane);
            } else {
                meanwhile();
            }
            previous = pipe.stage;
            pipe.advance();
        }
        ptx::wgmma_wait<0>();
        pin(d);
        if (num_kb > 0)
            pipe.release(previous, lane);
        else
            meanwhile();
    }
};

// FP8 with true fp32 accumulation: Hopper's FP8 tensor cores keep about 13 mantissa bits of a running sum, so each
// k-block of 128 is summed alone, `kPart` columns at a time, and promoted into fp32 registers with its scales.
//
// NOTE: d must not start in the same register bank as t, or each FFMA d += t * s reads three operands from one bank and
// the tensor cores wait (a fifth of the kernel's time). `zero_odd_pairs` leads the compiler there; tests read the
// machine code.
//
// Whether Scale::promote still reads the stage, which is then released after it.
template <class Scale>
constexpr bool kPromotesFromStage = false;

// A warpgroup's tile is kRowBlocks times 64 rows (128 apart: the other warpgroup's lie between) by kCols columns.
template <int kRowBlocks, int kCols>
struct PromotedSum {
    static constexpr int kColParts = kCols > 192 ? 2 : 1;
    static constexpr int kPart = kCols / kColParts;
    static_assert(kPart % 8 == 0);
    float d[kRowBlocks][kColParts][kPart / 2];

    MM_DEVICE void clear() {
#pragma unroll
        for (int r = 0; r < kRowBlocks; ++r)
#pragma unroll
            for (int c = 0; c < kColParts; ++c) zero_odd_pairs(d[r][c]);
    }

    // `scale` says how a part's sums t of one k-block enter d: load(kb), load_rows(row block, stage), then promote(d,
    // t, first column).
    template <class Pipe, class Scale>
    MM_DEVICE void run(Pipe& pipe, const WaitLimit& limit, u32 a, u32 b, u32 stage_bytes, i32 num_kb, u32 lane,
                       Scale& scale) {
        float t[kPart / 2];
        bool full = false;
        for (i32 kb = 0; kb < num_kb; ++kb) {
            if (!full) pipe.wait_full(limit);
            const u32 stage = pipe.stage, at = stage * stage_bytes;
            scale.load(kb);
#pragma unroll
            for (int r = 0; r < kRowBlocks; ++r) {
                scale.load_rows(r, stage);
#pragma unroll
                for (int c = 0; c < kColParts; ++c) {
                    issue_block<E4M3, kPart>(t, a + at + r * 128 * kRowBytes, b + at + c * kPart * kRowBytes, true);
                    ptx::wgmma_wait<0>();
                    pin(t);
                    const bool last = r == kRowBlocks - 1 && c == kColParts - 1;
                    if (last) {
                        if constexpr (!kPromotesFromStage<Scale>) pipe.release(stage, lane);
                        pipe.advance();
                        full = pipe.is_full();  // asked early, so that the answer is there when the sums are promoted
                    }
                    scale.promote(d[r][c], t, c * kPart);
                    if (kPromotesFromStage<Scale> && last) {
                        __syncwarp();
                        pipe.release(stage, lane);
                    }
                }
            }
        }
    }
};

// d += t * s, 8 columns at a time: rows r in t[4 j], t[4 j + 1], rows r + 8 in the other two.
template <int N, class Factor>
MM_DEVICE void promote_columns(float (&d)[N], const float (&t)[N], Factor&& factor) {
#pragma unroll
    for (int j = 0; j < N / 4; ++j) {
        const float2 s = factor(8 * j);
        d[4 * j + 0] = fmaf(t[4 * j + 0], s.x, d[4 * j + 0]);
        d[4 * j + 1] = fmaf(t[4 * j + 1], s.x, d[4 * j + 1]);
        d[4 * j + 2] = fmaf(t[4 * j + 2], s.y, d[4 * j + 2]);
        d[4 * j + 3] = fmaf(t[4 * j + 3], s.y, d[4 * j + 3]);
    }
}

// 1x128 scales of A (in shared memory, one float a row and stage) times 128x128 scales of B.
template <int kCols, int kAlign>
struct BlockScale {
    static constexpr int kBlocks = BlockScalesB<kCols, kAlign>::kBlocks;
    BlockScalesB<kCols, kAlign> b;
    u32 sfa;          // shared address of this thread's first row's scale in stage 0
    u32 stage_bytes;  // from one stage's scales of A to the next
    u32 block_bytes;  // from one 128 rows' to the next
    i32 first;        // columns until the first 128-boundary
    float sa[2], sb[kBlocks];

    MM_DEVICE void load(i32 kb) { b.get(kb, sb); }

    MM_DEVICE void load_rows(int row_block, u32 stage) {
        const u32 at = sfa + stage * stage_bytes + row_block * block_bytes;
        sa[0] = ptx::ld_shared_f32(at);
        sa[1] = ptx::ld_shared_f32(at + 8 * 4);
    }

    template <int N>
    MM_DEVICE void promote(float (&d)[N], const float (&t)[N], int c0) const {
        float s[2][kBlocks];
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) s[0][i] = sa[0] * sb[i], s[1][i] = sa[1] * sb[i];
        promote_columns(d, t, [&](int offset) {
            const int c = c0 + offset;
            if constexpr (kAlign >= 128) return make_float2(s[0][c / 128], s[1][c / 128]);
            // Column c lies `first` or more behind the tile's start: one block further, or two.
            float2 f = make_float2(s[0][0], s[1][0]);
#pragma unroll
            for (int i = 1; i < kBlocks; ++i) {
                // A boundary can stand only where some aligned start puts it.
                if (c >= (i - 1) * 128 + kAlign && c < i * 128 + 128) {
                    // (Rounded down, all columns between two such places ask the same question.)
                    const bool beyond = c >= i * 128 || c / kAlign * kAlign >= first + (i - 1) * 128;
                    f = beyond ? make_float2(s[0][i], s[1][i]) : f;
                }
            }
            return f;
        });
    }
};

// Per-token times per-channel scales wait for the epilogue: promotion only adds.
struct NoScale {
    MM_DEVICE void load(i32) {}
    MM_DEVICE void load_rows(int, u32) {}

    template <int N>
    MM_DEVICE void promote(float (&d)[N], const float (&t)[N], int) const {
#pragma unroll
        for (int i = 0; i < N; ++i) d[i] += t[i];
    }
};

}  // namespace megamoe
