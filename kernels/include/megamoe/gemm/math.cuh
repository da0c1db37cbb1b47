// The math warpgroups: multiply, scale, and hand the sums to the epilogue.
#pragma once
#include "megamoe/epilogue/cast.cuh"
#include "megamoe/epilogue/gated.cuh"
#include "megamoe/gemm/layout.cuh"
#include "megamoe/mma/mainloop.cuh"
#include "megamoe/mma/scale_kinds.cuh"

namespace megamoe::gemm {

constexpr u32 kTailBarrier = 1;  // named barrier of the math warps

// The sum of one warpgroup's 64 rows by L::kCols columns over this CTA's k-blocks, then through `store`.
template <class C>
struct Math {
    using L = Layout<C>;
    Context<C>& x;
    u32 group, warp, lane;  // math warpgroup, warp in it, lane

    MM_DEVICE i32 first_row() const { return L::kHalves ? 0 : group * 64; }
    MM_DEVICE u32 a() const { return x.smem + first_row() * kRowBytes; }
    MM_DEVICE u32 b() const { return x.smem + L::kA + first_col() * kRowBytes; }
    MM_DEVICE i32 first_col() const { return L::kHalves ? group * L::kCols : 0; }

    MM_DEVICE void run() {
        if constexpr (C::scaling == C::Scaling::NONE) {
            DirectSum<typename C::Elem, L::kCols, L::kMajorA, L::kMajorB> sum;
            Tile t, next;
            bool more = x.sched.next(t);
            while (more) {
                if (idle(t)) skip(t);
                auto prepare = [&](i32 kb, u32 offset) {
                    if constexpr (C::Grouping::kByK) {
                        if (kb == t.num_kb - 1 && t.k_tail != 0) clear_beyond(x.smem + offset, t.k_tail);
                    }
                };
                sum.run(x.pipe, x.limit, a(), b(), L::kStage, t.num_kb, lane, prepare,
                        [&] { more = x.sched.next(next); });
                if (C::async_store && lane == 0) ptx::bulk_wait_read();
                finish(t, 0, [&](int i) { return sum.d[i]; });
                t = next;
            }
        } else if constexpr (C::scaling == C::Scaling::BLOCK && L::kGated) {
            GatedBlockScale<L::kCols> scale;
            scale.stage_bytes = L::kScales;
            scale.block_bytes = L::kScalePitch;
            promoted(scale, [&](const Tile& t) {
                const i32 halves = ceil_div(x.args.n / 2, 128);
                scale.sfa = scales_of_rows(t);
                scale.b.start_rows(scales_b(t, 2 * halves), x.args.scales_b_ld, (t.n0 + first_col()) / 256, halves,
                                   t.kb0, t.num_kb, lane);
            });
        } else if constexpr (C::scaling == C::Scaling::BLOCK) {
            BlockScale<L::kCols, L::kColAlign> scale;
            scale.stage_bytes = L::kScales;
            scale.block_bytes = L::kScalePitch;
            promoted(scale, [&](const Tile& t) {
                const i32 col = t.n0 + first_col(), n_blocks = ceil_div(x.args.n, 128);
                scale.sfa = scales_of_rows(t);
                scale.first = 128 - col % 128;
                scale.b.start(scales_b(t, n_blocks), x.args.scales_b_ld, n_blocks, col, t.kb0, t.num_kb, lane);
            });
        } else if constexpr (L::kVectors) {
            VectorScale scale;
            scale.stage_bytes = L::kScales;
            scale.block_bytes = L::kScalePitch;
            scale.sfb = x.smem + L::kScalesAt + L::kScalesA + (first_col() + lane % 4 * 2) * 4;
            promoted(scale, [&](const Tile& t) { scale.sfa = scales_of_rows(t); });
        } else {
            NoScale scale;
            promoted(scale, [](const Tile&) {});
        }
    }

    // Whether none of this warpgroup's rows exist: where groups of rows end inside a tile, the other one then has the
    // tensor cores to itself.
    MM_DEVICE bool idle(const Tile& t) const { return L::kAnyRow && !L::kHalves && t.rows <= first_row(); }

    // Gives back the k-blocks of an idle tile: nothing to sum, and no row to store.
    MM_DEVICE void skip(Tile& t) const {
        x.pipe.skip(t.num_kb, x.limit, lane);
        t.num_kb = 0;
    }

    // Shared address of the scale of this thread's first row in stage 0.
    MM_DEVICE u32 scales_of_rows(const Tile& t) const {
        return x.smem + L::kScalesAt + ((L::kAnyRow ? t.m0 % 4 : 0) + first_row() + warp * 16 + lane / 4) * 4;
    }

    // Scales of the tile's group, of `rows` blocks of N.
    MM_DEVICE const float* scales_b(const Tile& t, i32 rows) const {
        return static_cast<const float*>(x.args.scales_b) + static_cast<i64>(t.group) * rows * x.args.scales_b_ld;
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
        PromotedSum<L::kRowBlocks, L::kCols> sum;
        Tile t, next;
        bool more = x.sched.next(t);
        if (more) begin(t);
        while (more) {
            if (idle(t)) skip(t);
            sum.clear();
            sum.run(x.pipe, x.limit, a(), b(), L::kStage, t.num_kb, lane, scale);
            more = x.sched.next(next);
            if (more) begin(next);
            if (C::async_store && lane == 0) ptx::bulk_wait_read();
#pragma unroll
            for (int r = 0; r < L::kRowBlocks; ++r) {
                auto at = [&](int i) { return sum.d[r][i / (sum.kPart / 2)][i % (sum.kPart / 2)]; };
                if constexpr (C::scaling == C::Scaling::ROW) {
                    const float scale_a[2] = {row_scale(t, r, 0), row_scale(t, r, 1)};
                    finish(t, r, [&](int i) { return at(i) * (scale_a[i / 2 % 2] * col_scale(t, i)); });
                } else {
                    finish(t, r, at);
                }
            }
            t = next;
        }
    }

    // Per-token times per-channel scales of accumulator i of a row block, fetched as it is stored. Rows and columns
    // that do not exist are scaled by whatever is in range and never stored.
    MM_DEVICE float row_scale(const Tile& t, int row_block, int h) const {
        const i32 row = t.m0 + first_row() + row_block * 128 + warp * 16 + lane / 4 + 8 * h;
        return static_cast<const float*>(x.args.scales_a)[min_of(row, x.args.m - 1)];
    }

    MM_DEVICE float col_scale(const Tile& t, int i) const {
        const i32 col = min_of(t.n0 + first_col() + i / 4 * 8 + static_cast<i32>(lane % 4) * 2 + i % 2, x.args.n - 1);
        // A volatile load stays where it is used: gathered up front, a tile's scales would not fit into registers.
        return ptx::ld_global_nc_f32(static_cast<const float*>(x.args.scales_b) + static_cast<i64>(t.group) * x.args.n +
                                     col);
    }

    // Accumulators, scaled, to D: as they are, or gate and up columns paired through the activation.
    template <class At>
    MM_DEVICE void finish(const Tile& t, int row_block, At&& at) const {
        if constexpr (!L::kGated) {
            store(t, row_block, at);
        } else {
            const i32 row = first_row() + row_block * 128 + warp * 16 + lane / 4;
            float weight[2] = {1.f, 1.f};
            if (x.args.row_weight != nullptr) {
#pragma unroll
                for (int h = 0; h < 2; ++h)
                    weight[h] =
                        __ldg(static_cast<const float*>(x.args.row_weight) + min_of(t.m0 + row + 8 * h, x.args.m - 1));
            }
            store(t, row_block, [&](int i) {
                return weight[i / 2 % 2] * gated<typename C::Act>(at(gate_index(i)), at(gate_index(i) + 4),
                                                                  x.args.act_limit, x.args.act_alpha);
            });
        }
    }

    template <class At>
    MM_DEVICE void store(const Tile& t, int row_block, At&& at) const {
        const i32 row = first_row() + row_block * 128 + warp * 16, rows = min_of(t.rows, C::block_m) - row;
        const i32 col = (t.n0 + first_col()) / (L::kGated ? 2 : 1), cols = x.args.n / (L::kGated ? 2 : 1) - col;
        const i64 ld = x.args.d_ld, row_d = static_cast<i64>(first_row_of_d(t)) + row, offset = row_d * ld + col;
        const u32 staging = x.smem + L::kStagingAt + (group * 4 + warp) * L::kStaging +
                            (C::async_store ? row_block * L::kOut / kChunkCols * kChunkBytes : 0);
        if constexpr (L::kSplitK) {
            reduce_and_store(t, at);
        } else if constexpr (C::out_e4m3) {
            float* scales = static_cast<float*>(x.args.scales_d) + static_cast<i64>(col / 128) * x.args.scales_d_ld;
            store_rows_cast<L::kOut>(CastRows{static_cast<u8*>(x.args.d) + offset, ld, scales + row_d, rows, cols},
                                     staging, lane, at);
        } else if constexpr (!C::out_bf16) {
            store_rows_f32<L::kOut, C::accumulate>(
                WarpRows<float>{static_cast<float*>(x.args.d) + offset, ld, rows, cols}, lane, at);
        } else {
            const WarpRows<u16> out{static_cast<u16*>(x.args.d) + offset, ld, rows, cols};
            if constexpr (!C::async_store)
                store_rows<L::kOut>(out, staging, lane, at);
            else if constexpr (C::Grouping::kGrouped)
                store_rows_async<L::kOut>(out, &x.args.map_d, static_cast<i32>(row_d), col, staging, lane, at);
            else
                store_rows_async<L::kOut>(&x.args.map_d, static_cast<i32>(row_d), col, staging, lane, at);
        }
    }

    // Row of D where the tile's rows start.
    MM_DEVICE i32 first_row_of_d(const Tile& t) const { return (C::Grouping::kByK ? t.group * x.args.m : 0) + t.m0; }

    // Split K: CTA q of the cluster collects the sums of every q-th group of 8 columns from all CTAs, itself included,
    // and adds them in CTA order: the same order, so the same bits, every time.
    template <class At>
    MM_DEVICE void reduce_and_store(const Tile& t, At&& at) const {
        constexpr int kColumns8 = L::kCols / 8;
        constexpr u32 kPitch = L::kMathThreads * 16;
        const u32 mine = x.smem + L::kStagingAt + (group * kWarpgroupSize + warp * kWarpSize + lane) * 16;
        const u32 bar = x.smem + L::kSumsBarrierAt;
#pragma unroll
        for (int j = 0; j < kColumns8; ++j) {
            const u32 slot = mine + (x.cta * L::kMine + j / C::cluster) * kPitch;
            ptx::st_async_v4_f32(ptx::map_to_cta(slot, j % C::cluster), at(4 * j), at(4 * j + 1), at(4 * j + 2),
                                 at(4 * j + 3), ptx::map_to_cta(bar, j % C::cluster));
        }
        wait_phase(bar, 0, WaitCode::kSums, 0, x.limit);
        const i32 row = first_row() + warp * 16 + lane / 4;
        const i32 col = t.n0 + first_col() + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < L::kMine; ++i) {
            const i32 j = i * C::cluster + x.cta;
            if (j >= kColumns8) break;
            float4 s = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
            for (int q = 0; q < C::cluster; ++q) {
                const uint4 v = ptx::ld_shared_v4(mine + (q * L::kMine + i) * kPitch);
                s.x += __uint_as_float(v.x), s.y += __uint_as_float(v.y);
                s.z += __uint_as_float(v.z), s.w += __uint_as_float(v.w);
            }
            put(t, row, col + 8 * j, s.x, s.y);
            put(t, row + 8, col + 8 * j, s.z, s.w);
        }
    }

    MM_DEVICE void put(const Tile& t, i32 row, i32 col, float u, float v) const {
        if (row >= t.rows || col >= x.args.n) return;
        const i64 at = static_cast<i64>(first_row_of_d(t) + row) * x.args.d_ld + col;
        if constexpr (C::out_bf16) {
            *reinterpret_cast<u32*>(static_cast<u16*>(x.args.d) + at) = ptx::pack_bf16(u, v);
        } else {
            float2* p = reinterpret_cast<float2*>(static_cast<float*>(x.args.d) + at);
            if constexpr (C::accumulate) u += p->x, v += p->y;
            *p = make_float2(u, v);
        }
    }
};

}  // namespace megamoe::gemm
