// What a math warp does with its sums: scales of rows and columns, the activation, and the way to D.
#pragma once
#include "megamoe/epilogue/cast.cuh"
#include "megamoe/epilogue/gated.cuh"
#include "megamoe/gemm/layout.cuh"

namespace megamoe::gemm {

// Which rows and columns of a tile are this warp's, and where they leave to.
template <class C>
struct Finish {
    using L = Layout<C>;
    Context<C>& x;
    u32 group, warp, lane;  // math warpgroup, warp in it, lane

    MM_DEVICE i32 first_row() const { return L::kHalves ? 0 : group * 64; }
    MM_DEVICE i32 first_col() const { return L::kHalves ? group * L::kCols : 0; }

    // kN columns of a row block, from part p on, to D.
    template <int kN, class Sum>
    MM_DEVICE void leave(const Sum& sum, const Tile& t, int p) const {
        constexpr int kPerPart = Sum::kPart / 2;
        const int r = p / Sum::kColParts, c = p % Sum::kColParts * Sum::kPart;
        auto at = [&](int i) { return sum.d[p + i / kPerPart][i % kPerPart]; };
        if constexpr (C::scaling == C::Scaling::ROW) {
            const float scale_a[2] = {row_scale(t, r, 0), row_scale(t, r, 1)};
            finish<kN>(t, r, c, [&](int i) { return at(i) * (scale_a[i / 2 % 2] * col_scale(t, c, i)); });
        } else {
            finish<kN>(t, r, c, at);
        }
    }

    // Per-token times per-channel scales of accumulator i of a row block, fetched as it is stored. Rows and columns
    // that do not exist are scaled by whatever is in range and never stored.
    MM_DEVICE float row_scale(const Tile& t, int row_block, int h) const {
        const i32 row = t.m0 + first_row() + row_block * 128 + warp * 16 + lane / 4 + 8 * h;
        return static_cast<const float*>(x.args.scales_a)[min_of(row, x.args.m - 1)];
    }

    MM_DEVICE float col_scale(const Tile& t, int c, int i) const {
        const i32 col =
            min_of(t.n0 + first_col() + c + i / 4 * 8 + static_cast<i32>(lane % 4) * 2 + i % 2, x.args.n - 1);
        // A volatile load stays where it is used: gathered up front, a tile's scales would not fit into registers.
        return ptx::ld_global_nc_f32(static_cast<const float*>(x.args.scales_b) + static_cast<i64>(t.group) * x.args.n +
                                     col);
    }

    // Until the copy engine has read what an earlier call left in this warp's staging.
    MM_DEVICE void wait_for_staging() const {
        if (C::async_store && lane == 0) ptx::bulk_wait_read();
    }

    // kN columns of the warpgroup's, from c on, to D: as they are, or gate and up columns paired through the
    // activation.
    template <int kN, class At>
    MM_DEVICE void finish(const Tile& t, int row_block, int c, At&& at) const {
        if constexpr (!L::kGated) {
            store<kN>(t, row_block, c, at);
        } else {
            const i32 row = first_row() + row_block * 128 + warp * 16 + lane / 4;
            float weight[2] = {1.f, 1.f};
            if (x.args.row_weight != nullptr) {
#pragma unroll
                for (int h = 0; h < 2; ++h)
                    weight[h] =
                        __ldg(static_cast<const float*>(x.args.row_weight) + min_of(t.m0 + row + 8 * h, x.args.m - 1));
            }
            store<kN / 2>(t, row_block, c / 2, [&](int i) {
                return weight[i / 2 % 2] * gated<typename C::Act>(at(gate_index(i)), at(gate_index(i) + 4),
                                                                  x.args.act_limit, x.args.act_alpha);
            });
        }
    }

    // kN columns of D from column c of the warpgroup's on.
    template <int kN, class At>
    MM_DEVICE void store(const Tile& t, int row_block, int c, At&& at) const {
        const i32 row = first_row() + row_block * 128 + warp * 16, rows = min_of(t.rows, C::block_m) - row;
        const i32 col = (t.n0 + first_col()) / (L::kGated ? 2 : 1) + c, cols = x.args.n / (L::kGated ? 2 : 1) - col;
        const i64 ld = x.args.d_ld, row_d = static_cast<i64>(first_row_of_d(t)) + row, offset = row_d * ld + col;
        const u32 staging = x.smem + L::kStagingAt + (group * 4 + warp) * L::kStaging +
                            (C::async_store ? (row_block * L::kOut + c) / kChunkCols * kChunkBytes : 0);
        if constexpr (L::kSplitK) {
            reduce_and_store(t, at);
        } else if constexpr (C::out_e4m3) {
            float* scales = static_cast<float*>(x.args.scales_d) + static_cast<i64>(col / 128) * x.args.scales_d_ld;
            store_rows_cast<kN>(CastRows{static_cast<u8*>(x.args.d) + offset, ld, scales + row_d, rows, cols}, staging,
                                lane, at);
        } else if constexpr (!C::out_bf16) {
            store_rows_f32<kN, C::accumulate>(WarpRows<float>{static_cast<float*>(x.args.d) + offset, ld, rows, cols},
                                              lane, at);
        } else {
            const WarpRows<u16> out{static_cast<u16*>(x.args.d) + offset, ld, rows, cols};
            if constexpr (!C::async_store)
                store_rows<kN>(out, staging, lane, at);
            else if constexpr (C::Grouping::kGrouped)
                store_rows_async<kN>(out, &x.args.map_d, static_cast<i32>(row_d), col, staging, lane, at);
            else
                store_rows_async<kN>(&x.args.map_d, static_cast<i32>(row_d), col, staging, lane, at);
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
