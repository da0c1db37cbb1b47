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
// A warpgroup's tile is kRowBlocks times 64 rows (128 apart: the other warpgroup's lie between) by kCols columns.
// kSplitTail: half of a k-block's last promotion is put off until the next k-block is known to be there, so that it
// hides what the next issue takes; its code then stands there twice, which can cost the choice of registers.
template <int kRowBlocks, int kCols, bool kSplitTail = false>
struct PromotedSum {
    static constexpr int kColParts = kCols > 192 ? 2 : 1;
    static constexpr int kPart = kCols / kColParts, kParts = kRowBlocks * kColParts;
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
    //
    // NOTE: two warpgroups share the tensor cores, MMA by MMA: the other one's last MMA covers a promotion, and nothing
    // covers what else stands between the end of one part's MMAs and the start of the next's. So all that can be done
    // while the MMAs run is done there (scales, the next stage's barrier), and the loop's own branch, too: an iteration
    // begins with its first part under way.
    template <class Pipe, class Scale, class Meanwhile = NothingElse>
    MM_DEVICE void run(Pipe& pipe, const WaitLimit& limit, u32 a, u32 b, u32 stage_bytes, i32 num_kb, u32 lane,
                       Scale& scale, const Meanwhile& meanwhile = {}) {
        if (num_kb <= 0) return meanwhile();
        float t[kPart / 2];
        const u32 low_a = k_major_low(a), low_b = k_major_low(b), stage_low = stage_bytes >> 4;
        // A part's MMAs, and while they run what its promotion needs.
        auto start = [&](int part, i32 kb) {
            const u32 r = part / kColParts, c = part % kColParts, at = pipe.stage * stage_low;
            issue_fresh_block<E4M3, kPart>(t, low_a + at + (r * 128 * kRowBytes >> 4),
                                           low_b + at + (c * kPart * kRowBytes >> 4));
            if (part == 0) scale.load(kb);
            if (c == 0) scale.load_rows(r, pipe.stage);
        };
        pipe.wait_full(limit);
        start(0, 0);
        meanwhile();
        for (i32 kb = 0;; ++kb) {
            const bool more = kb + 1 < num_kb;
#pragma unroll
            for (int part = 0; part + 1 < kParts; ++part) {
                ptx::wgmma_wait<0>();
                pin(t);
                scale.promote(d[part / kColParts][part % kColParts], t, part % kColParts * kPart);
                start(part + 1, kb);
            }
            const u32 stage = pipe.stage;
            ptx::wgmma_wait<0>();
            pin(t);
            pipe.release(stage, lane);
            pipe.advance();
            const bool go = pipe.is_full() && more;
            if constexpr (kSplitTail) {
                promote_last<0>(scale, t);
                // The answer is there by now, and what is left of the promotion goes along with the next issue.
                if (__builtin_expect(!go, 0)) {
                    if (!more) {
                        promote_last<1>(scale, t);
                        break;
                    }
                    pipe.wait_full(limit);
                }
                promote_last<1>(scale, t);
            } else {
                scale.promote(d[kRowBlocks - 1][kColParts - 1], t, (kColParts - 1) * kPart);
                if (__builtin_expect(!go, 0)) {
                    if (!more) break;
                    pipe.wait_full(limit);
                }
            }
            start(0, kb + 1);
        }
    }

  private:
    // Half of the promotion of a k-block's last part.
    template <int kHalf, class Scale>
    MM_DEVICE void promote_last(const Scale& scale, const float (&t)[kPart / 2]) {
        constexpr int kFirst = kPart / 16 * 4, kAt = kHalf * kFirst, kCount = kHalf == 0 ? kFirst : kPart / 2 - kFirst;
        using Half = float[kCount];
        scale.promote(reinterpret_cast<Half&>(d[kRowBlocks - 1][kColParts - 1][kAt]),
                      reinterpret_cast<const Half&>(t[kAt]), (kColParts - 1) * kPart + 2 * kAt);
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
    float sb[kBlocks], s[2][kBlocks];

    MM_DEVICE void load(i32 kb) { b.get(kb, sb); }

    MM_DEVICE void load_rows(int row_block, u32 stage) {
        const u32 at = sfa + stage * stage_bytes + row_block * block_bytes;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float sa = ptx::ld_shared_f32(at + h * 8 * 4);
#pragma unroll
            for (int i = 0; i < kBlocks; ++i) s[h][i] = sa * sb[i];
        }
    }

    template <int N>
    MM_DEVICE void promote(float (&d)[N], const float (&t)[N], int c0) const {
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
