// The math warpgroups: multiply, scale, and hand the sums to the epilogue.
#pragma once
#include "megamoe/gemm/finish.cuh"
#include "megamoe/mma/mainloop.cuh"
#include "megamoe/mma/scale_kinds.cuh"

namespace megamoe::gemm {

constexpr u32 kTailBarrier = 1;  // named barrier of the math warps

// The sum of one warpgroup's 64 rows by L::kCols columns over this CTA's k-blocks, then through `out`.
template <class C>
struct Math {
    using L = Layout<C>;
    Context<C>& x;
    u32 group, warp, lane;  // math warpgroup, warp in it, lane
    Finish<C> out{x, group, warp, lane};

    MM_DEVICE u32 a() const { return x.smem + out.first_row() * kRowBytes; }
    MM_DEVICE u32 b() const { return x.smem + L::kA + out.first_col() * kRowBytes; }

    MM_DEVICE void run() {
        if constexpr (C::scaling == C::Scaling::NONE) {
            DirectSum<typename C::Elem, L::kCols, L::kMajorA, L::kMajorB> sum;
            Tile t, next;
            bool more = x.next(t);
            while (more) {
                if (idle(t)) skip(t);
                auto prepare = [&](i32 kb, u32 offset) {
                    if constexpr (C::Grouping::kByK) {
                        if (kb == t.num_kb - 1 && t.k_tail != 0) clear_beyond(x.smem + offset, t.k_tail);
                    }
                };
                sum.run(x.pipe, x.limit, a(), b(), L::kStage, t.num_kb, lane, prepare, [&] {
                    if constexpr (!C::told) more = x.next(next);
                });
                if constexpr (C::told) more = x.next(next);
                out.wait_for_staging();
                out.template finish<L::kCols>(t, 0, 0, [&](int i) { return sum.d[i]; });
                t = next;
            }
        } else if constexpr (C::scaling == C::Scaling::BLOCK && L::kGated) {
            GatedBlockScale<L::kCols> scale;
            scale.stage_bytes = L::kScales;
            scale.block_bytes = L::kScalePitch;
            promoted(scale, [&](const Tile& t) {
                const i32 halves = ceil_div(x.args.n / 2, 128);
                scale.sfa = scales_of_rows(t);
                scale.b.start_rows(scales_b(t, 2 * halves), x.args.scales_b_ld, (t.n0 + out.first_col()) / 256, halves,
                                   t.kb0, t.num_kb, lane);
            });
        } else if constexpr (C::scaling == C::Scaling::BLOCK) {
            BlockScale<L::kCols, L::kColAlign> scale;
            scale.stage_bytes = L::kScales;
            scale.block_bytes = L::kScalePitch;
            promoted(scale, [&](const Tile& t) {
                const i32 col = t.n0 + out.first_col(), n_blocks = ceil_div(x.args.n, 128);
                scale.sfa = scales_of_rows(t);
                scale.first = 128 - col % 128;
                scale.b.start(scales_b(t, n_blocks), x.args.scales_b_ld, n_blocks, col, t.kb0, t.num_kb, lane);
            });
        } else if constexpr (L::kVectors) {
            VectorScale scale;
            scale.stage_bytes = L::kScales;
            scale.block_bytes = L::kScalePitch;
            scale.sfb = x.smem + L::kScalesAt + L::kScalesA + (out.first_col() + lane % 4 * 2) * 4;
            promoted(scale, [&](const Tile& t) { scale.sfa = scales_of_rows(t); });
        } else {
            NoScale scale;
            promoted(scale, [](const Tile&) {});
        }
    }

    // Whether none of this warpgroup's rows exist: where groups of rows end inside a tile, the other one then has the
    // tensor cores to itself.
    MM_DEVICE bool idle(const Tile& t) const { return L::kAnyRow && !L::kHalves && t.rows <= out.first_row(); }

    // Gives back the k-blocks of an idle tile: nothing to sum, and no row to store.
    MM_DEVICE void skip(Tile& t) const {
        x.pipe.skip(t.num_kb, x.limit, lane);
        t.num_kb = 0;
    }

    // Shared address of the scale of this thread's first row in stage 0.
    MM_DEVICE u32 scales_of_rows(const Tile& t) const {
        return x.smem + L::kScalesAt + ((L::kAnyRow ? t.m0 % 4 : 0) + out.first_row() + warp * 16 + lane / 4) * 4;
    }

    // Scales of the tile's group, of `rows` blocks of N.
    //
    // NOTE: the same for all lanes, they may go to uniform registers. The wait for that stands between a k-block's
    // MMAs: harmless where there are two parts, a fifth of the time where one part's MMAs are all there are.
    MM_DEVICE const float* scales_b(const Tile& t, i32 rows) const {
        const i64 at = static_cast<i64>(t.group) * rows * x.args.scales_b_ld;
        const bool one_part = PromotedSum<L::kRowBlocks, L::kCols>::kParts == 1;
        return static_cast<const float*>(x.args.scales_b) + at + (one_part ? ptx::lane_zero() : 0);
    }

    // Zeroes the rows of K beyond the group's end in the last k-block of both MN-major operands. The copy brought the
    // next group's rows there; a product with one side zero would not do, since the other may hold NaN or infinity.
    // All math warps share the work, so they meet before any of them multiplies.
    MM_DEVICE void clear_beyond(u32 stage, i32 k_tail) const {
        static_assert(C::a_mn && C::b_mn, "a row of K is 128 bytes of a chunk");
        constexpr u32 kPieces = kChunkMnBytes / 16;
        const u32 first = k_tail * (kRowBytes / 16) + group * kWarpgroupSize + warp * kWarpSize + lane;
#pragma unroll 1
        for (u32 chunk = 0; chunk < L::kStage / kChunkMnBytes; ++chunk)
            for (u32 piece = first; piece < kPieces; piece += L::kMathThreads)
                ptx::st_shared_v4(stage + chunk * kChunkMnBytes + piece * 16, make_uint4(0, 0, 0, 0));
        ptx::fence_proxy_async_shared();
        ptx::named_barrier_sync(kTailBarrier, L::kMathThreads);
    }

    // `begin(tile)` asks for a tile's scales: of the first tile before all, of each next one before the last is stored.
    template <class Scale, class Begin>
    MM_DEVICE void promoted(Scale& scale, Begin&& begin) {
        using Sum = PromotedSum<L::kRowBlocks, L::kCols>;
        Sum sum;
        // The first of two parts leaves under the MMAs of the second, where the copy engine takes it and no tile is
        // without k-blocks and yet has zeros to store. (Beside a cluster's barriers registers run out.)
        constexpr bool kEarly = Sum::kParts == 2 && C::async_store && C::cluster == 1 && !C::Grouping::kByK;
        Tile t, next;
        bool more = x.next(t);
        if (more) begin(t);
        for (; more; t = next) {
            if (idle(t)) skip(t);
            sum.clear();
            sum.run(x.pipe, x.limit, a(), b(), L::kStage, t.num_kb, lane, scale, [&] {
                if constexpr (kEarly) {
                    out.wait_for_staging();
                    out.template leave<Sum::kPart>(sum, t, 0);
                }
            });
            more = x.next(next);
            if (more) begin(next);
            if constexpr (kEarly) {
                if (t.num_kb > 0) out.template leave<Sum::kPart>(sum, t, 1);
            } else {
                out.wait_for_staging();
#pragma unroll
                for (int r = 0; r < L::kRowBlocks; ++r) out.template leave<L::kCols>(sum, t, r * Sum::kColParts);
            }
        }
    }
};

}  // namespace megamoe::gemm
