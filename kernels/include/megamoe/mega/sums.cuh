// The sums of a warpgroup's share of a tile: 64 rows by kCols columns, and how they are kept over the k-blocks.
//
// A share's columns come in groups of 64. Up: one of gate, then the same one of up; down: columns of y.
#pragma once
#include "megamoe/mma/mainloop.cuh"
#include "megamoe/ptx/quant.cuh"

namespace megamoe::mega {

// Scales of one k-block: of this thread's two rows, in the stage; of two groups of columns, in the tile's note.
struct ShareScale {
    u32 rows, stage_bytes;  // shared address of the first row's in stage 0; from one stage's to the next
    u32 weights[2];
    bool halves;  // the second scale is that of the second half of 256 columns, else of every second group
    float sa[2], sb[2];

    MM_DEVICE void load(i32 kb, u32 stage) {
        sb[0] = ptx::ld_shared_f32(weights[0] + kb * 4);
        sb[1] = ptx::ld_shared_f32(weights[1] + kb * 4);
        sa[0] = ptx::ld_shared_f32(rows + stage * stage_bytes);
        sa[1] = ptx::ld_shared_f32(rows + stage * stage_bytes + 8 * 4);
    }

    // Which of two factors belongs to group g of the share.
    MM_DEVICE float pick(int g, float first, float second) const {
        return (halves ? g >= 2 : g % 2 == 1) ? second : first;
    }
};

// BF16 has none; fp8_row's, of rows and of columns, wait for the epilogue.
struct NoShareScale {
    MM_DEVICE void load(i32, u32) {}
};

// FP8 with true fp32 accumulation, as PromotedSum (mma/mainloop.cuh) explains it: kPart columns at a time. What the
// next k-block needs is fetched while the tensor cores are busy.
template <int kCols, class Scale>
struct Promoted {
    static constexpr int kPart = 128, kParts = kCols / kPart;
    float d[kParts][kPart / 2];

    MM_DEVICE float at(int i) const { return d[i / (kPart / 2)][i % (kPart / 2)]; }

    template <class Pipe>
    MM_DEVICE void run(Pipe& pipe, const WaitLimit& limit, u32 a, u32 b, u32 stage_bytes, i32 num_kb, u32 lane,
                       Scale& scale) {
#pragma unroll
        for (int p = 0; p < kParts; ++p) clear(d[p]);
        if constexpr (kParts == 1) {
            run_in_pairs(pipe, limit, k_major_low(a), k_major_low(b), stage_bytes >> 4, num_kb, lane, scale);
            return;
        }
        float t[kPart / 2];
        const u32 low_a = k_major_low(a), low_b = k_major_low(b);
        u32 at = __shfl_sync(0xffffffffu, pipe.stage * (stage_bytes >> 4), 0);
        bool full = false;
        for (i32 kb = 0; kb < num_kb; ++kb) {
            if (!full) pipe.wait_full(limit);
            const u32 stage = pipe.stage;
            u32 next = 0;
#pragma unroll
            for (int p = 0; p < kParts; ++p) {
                issue_block_of<E4M3, kPart>(t, low_a + at, low_b + at + p * (kPart * kRowBytes >> 4), true);
                if (p == 0) scale.load(kb, stage);
                if (p == kParts - 1) {
                    pipe.advance();
                    full = pipe.is_full();
                    next = __shfl_sync(0xffffffffu, pipe.stage * (stage_bytes >> 4), 0);
                }
                ptx::wgmma_wait<0>();
                pin(t);
                if (p == kParts - 1) pipe.release(stage, lane);
                promote(p, t, scale);
            }
            at = next;
        }
    }

  private:
    // A part is all there is: registers are left for a second temporary. Two k-blocks' MMAs are queued at a time, and
    // the first block is promoted under the second's.
    template <class Pipe>
    MM_DEVICE void run_in_pairs(Pipe& pipe, const WaitLimit& limit, u32 low_a, u32 low_b, u32 stage_low, i32 num_kb,
                                u32 lane, const Scale& scale) {
        float t[2][kPart / 2];
        Scale its[2] = {scale, scale};
        u32 stages[2] = {};
        u32 at = __shfl_sync(0xffffffffu, pipe.stage * stage_low, 0);
        bool full = false;
        auto start = [&](int i, i32 kb) {
            if (!full) pipe.wait_full(limit);
            stages[i] = pipe.stage;
            issue_block_of<E4M3, kPart>(t[i], low_a + at, low_b + at, true);
            its[i].load(kb, pipe.stage);
            pipe.advance();
            full = pipe.is_full();
            at = __shfl_sync(0xffffffffu, pipe.stage * stage_low, 0);
        };
        auto finish = [&](int i) {
            pin(t[i]);
            pipe.release(stages[i], lane);
            promote(0, t[i], its[i]);
        };
        i32 kb = 0;
        for (; kb + 1 < num_kb; kb += 2) {
            start(0, kb);
            start(1, kb + 1);
            ptx::wgmma_wait<1>();
            finish(0);
            ptx::wgmma_wait<0>();
            finish(1);
        }
        if (kb < num_kb) {
            start(0, kb);
            ptx::wgmma_wait<0>();
            finish(0);
        }
    }

    // As zero_odd_pairs (mma/operand.cuh) has it, but from the last pair to the first: what leads the compiler to
    // registers of the bank that the temporary is not in.
    static MM_DEVICE void clear(float (&s)[kPart / 2]) {
#pragma unroll
        for (int i = kPart / 2 - 3; i > 0; i -= 2) ptx::zero_pair(s[i], s[i + 1]);
        s[0] = s[kPart / 2 - 1] = 0.f;
    }

    MM_DEVICE void promote(int p, const float (&t)[kPart / 2], const NoShareScale&) {
#pragma unroll
        for (int i = 0; i < kPart / 2; ++i) d[p][i] += t[i];
    }
    MM_DEVICE void promote(int p, const float (&t)[kPart / 2], const ShareScale& scale) {
        float2 f[kPart / 64];  // of both rows, for each group
#pragma unroll
        for (int g = 0; g < kPart / 64; ++g) {
            const float s = scale.pick(p * (kPart / 64) + g, scale.sb[0], scale.sb[1]);
            f[g] = make_float2(scale.sa[0] * s, scale.sa[1] * s);
        }
        promote_columns(d[p], t, [&](int offset) { return f[offset / 64]; });
    }
};

// FP8 with one accumulator for all of K, rescaled by previous / this scale before each k-block: fewer instructions, but
// the running sum keeps the tensor cores' 13 mantissa bits.
template <int kCols>
struct Chained {
    // A scale of 0 counts as this, so that ratios are finite; what it scales is 0.
    static constexpr float kLeast = 0x1p-100f;
    float d[kCols / 2];

    MM_DEVICE float at(int i) const { return d[i]; }

    template <class Pipe>
    MM_DEVICE void run(Pipe& pipe, const WaitLimit& limit, u32 a, u32 b, u32 stage_bytes, i32 num_kb, u32 lane,
                       ShareScale& scale) {
        const u32 low_a = k_major_low(a), low_b = k_major_low(b);
#pragma unroll
        for (int i = 0; i < kCols / 2; ++i) d[i] = 0.f;
        pin(d);
        if (num_kb <= 0) return;
        float now[2][2], next[2][2], factor[2][2];  // [scale of weights][row]
        pipe.wait_full(limit);
        scale.load(0, pipe.stage);
        products(scale, now);
        u32 stage = pipe.stage;
        pipe.advance();
        bool full = pipe.is_full();
        for (i32 kb = 0;;) {
            // The next k-block's scales are wanted under this one's MMAs. It is waited for before them: ptxas lets
            // another warp go first between multiplications only where they follow MMAs of the same basic block.
            const bool more = ++kb < num_kb;
            if (more && !full) pipe.wait_full(limit);
            const u32 at = __shfl_sync(0xffffffffu, stage * (stage_bytes >> 4), 0);
            issue_block_of<E4M3, kCols>(d, low_a + at, low_b + at, false);
            scale.load(kb, pipe.stage);
            products(scale, next);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                factor[i / 2][i % 2] = now[i / 2][i % 2] * (more ? ptx::rcp_approx(next[i / 2][i % 2]) : 1.f);
                now[i / 2][i % 2] = next[i / 2][i % 2];
            }
            const u32 before = stage;
            stage = pipe.stage;
            Pipe after = pipe;
            after.advance();
            full = after.is_full();
            ptx::wgmma_wait<0>();
            pin(d);
            pipe.release(before, lane);
            multiply(scale, factor);  // by the ratio, or at last by the scale itself
            if (!more) break;
            pipe = after;
        }
    }

  private:
    static MM_DEVICE void products(const ShareScale& scale, float (&s)[2][2]) {
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int h = 0; h < 2; ++h) s[j][h] = fmaxf(scale.sa[h] * scale.sb[j], kLeast);
    }

    MM_DEVICE void multiply(const ShareScale& scale, const float (&f)[2][2]) {
#pragma unroll
        for (int g = 0; g < kCols / 64; ++g) {
            const float r[2] = {scale.pick(g, f[0][0], f[1][0]), scale.pick(g, f[0][1], f[1][1])};
#pragma unroll
            for (int i = 0; i < 32; ++i) d[32 * g + i] = ptx::product_by_fma(d[32 * g + i], r[i / 2 % 2]);
        }
    }
};

// One accumulator for all of K: BF16, whose running sum the tensor cores keep in fp32, and fp8_row, whose scales wait
// for the epilogue, so that nothing stands between a tile's MMAs.
template <class Elem, int kCols>
struct Direct : DirectSum<Elem, kCols> {
    MM_DEVICE float at(int i) const { return this->d[i]; }

    template <class Pipe>
    MM_DEVICE void run(Pipe& pipe, const WaitLimit& limit, u32 a, u32 b, u32 stage_bytes, i32 num_kb, u32 lane,
                       NoShareScale&) {
        DirectSum<Elem, kCols>::run(pipe, limit, a, b, stage_bytes, num_kb, lane);
    }
};

}  // namespace megamoe::mega
