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

// A warpgroup's tile is kRowBlocks times 64 rows (128 apart: the other warpgroup's lie between) by kCols columns, in
// parts that one temporary holds: the row blocks, or halves of the columns.
template <int kRowBlocks, int kCols>
struct PromotedSum {
    static constexpr int kColParts = kCols > 192 ? 2 : 1;
    static constexpr int kPart = kCols / kColParts, kParts = kRowBlocks * kColParts;
    static_assert(kPart % 8 == 0 && (kRowBlocks == 1 || kColParts == 1));
    float d[kParts][kPart / 2];

    MM_DEVICE void clear() {
#pragma unroll
        for (int p = 0; p < kParts; ++p) zero_odd_pairs(d[p]);
    }

    // `scale` says how a part's sums t of one k-block enter d: load(kb), load_rows(row block, stage), then promote(d,
    // t, first column). `early()` is called once, under the last MMAs: all parts but the last are whole then.
    //
    // NOTE: the tensor cores wait for whatever stands between the end of a part's MMAs and the start of the next,
    // beyond what the other warpgroup's last MMA covers. So scales are fetched while MMAs run, and the loop begins with
    // them: ptxas lets another warp go first between FFMAs only where they follow MMAs of the same basic block.
    template <class Pipe, class Scale, class Early = NothingElse>
    MM_DEVICE void run(Pipe& pipe, const WaitLimit& limit, u32 a, u32 b, u32 stage_bytes, i32 num_kb, u32 lane,
                       Scale& scale, const Early& early = {}) {
        if (num_kb <= 0) return;
        float t[kPart / 2];
        const u32 low_a = k_major_low(a), low_b = k_major_low(b), stage_low = stage_bytes >> 4;
        pipe.wait_full(limit);
        for (i32 kb = 0;; ++kb) {
            const bool more = kb + 1 < num_kb;
            const u32 stage = pipe.stage, at = stage * stage_low;
            bool full = false;
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
                const int r = part / kColParts, c = part % kColParts * kPart;
                issue_block_of<E4M3, kPart>(t, low_a + at + (r * 128 * kRowBytes >> 4),
                                            low_b + at + (c * kRowBytes >> 4), true);
                if (part == 0) scale.load(kb);
                if (c == 0) scale.load_rows(r, stage);
                if (part == 1 && __builtin_expect(!more, 0)) early();
                ptx::wgmma_wait<0>();
                pin(t);
                if (part == kParts - 1) {
                    if constexpr (!kPromotesFromStage<Scale>) pipe.release(stage, lane);
                    pipe.advance();
                    full = pipe.is_full();  // asked early, so that the answer is there when the sums are promoted
                }
                scale.promote(d[part], t, c);
                if (kPromotesFromStage<Scale> && part == kParts - 1) {
                    __syncwarp();
                    pipe.release(stage, lane);
                }
            }
            if (__builtin_expect(!(full && more), 0)) {
                if (!more) break;
                pipe.wait_full(limit);
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
