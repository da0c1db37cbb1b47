// A group of rows from the regions to where they lie one behind the other, by a copying warp.
#pragma once
#include "megamoe/mega/context.cuh"

namespace megamoe::mega {

template <class C>
struct RowMover {
    // Pieces of rows, and scales, of a lane that are asked for before the first is used: what registers have room for.
    static constexpr u32 kInFlight = C::row_scaled ? 6 : 4, kScales = C::row_scaled ? 1 : 2;
    static constexpr u32 kPieceBytes = kWarpSize / 2 * 16;
    static constexpr u32 kScaleLanes = kWarpSize / kCopyRowsOf;

    const Context<C>& x;

    // n rows, row r from number `mine` of lane r in the regions to to_row + r of the pool. Scales are asked for first,
    // to be there when rows are.
    MM_DEVICE void move(u32 mine, u32 to_row, u32 n) const {
        float scales[kScales];
        if constexpr (kScaled) load_scales(scales, mine, n, 0);
        move_codes(mine, to_row, n);
        if constexpr (kScaled) {
            store_scales(scales, to_row, n, 0);
#pragma unroll 1
            for (u32 first = kScales * kScaleLanes; first < num_scales(); first += kScales * kScaleLanes) {
                load_scales(scales, mine, n, first);
                store_scales(scales, to_row, n, first);
            }
        }
    }

  private:
    static constexpr bool kScaled = C::block_scaled || C::row_scaled;

    // Two at a time, one by each half of the warp; the halves share a lone one.
    MM_DEVICE void move_codes(u32 mine, u32 to_row, u32 n) const {
        constexpr u32 kTurn = kInFlight * kPieceBytes;
        const u32 pitch = x.args.row_pitch, half = x.lane / (kWarpSize / 2), col = x.lane % (kWarpSize / 2) * 16;
        const bool lone = n == 1;
        u32 to = (to_row + (lone ? 0 : half)) * pitch + col;
#pragma unroll 1
        for (u32 r = half; r < max_of(n, 1u) + half; r += 2, to += 2 * pitch) {
            const u8* from = x.template own<u8>(x.args.rows) +
                             static_cast<i64>(__shfl_sync(0xffffffffu, mine, min_of(r, n - 1))) * pitch + col;
#pragma unroll 1
            for (u32 at = lone ? half * kTurn : 0; at < pitch; at += lone ? 2 * kTurn : kTurn) {
                const i32 left =
                    r < n || lone ? static_cast<i32>(pitch - at - col) : 0;  // from this lane's first piece on
                uint4 v[kInFlight];
#pragma unroll
                for (u32 j = 0; j < kInFlight; ++j)
                    if (static_cast<i32>(j * kPieceBytes) < left)
                        v[j] = ptx::ld_global_cg_v4(from + at + j * kPieceBytes);
                u8* pool = x.template own<u8>(x.args.pool) + to + at;
#pragma unroll
                for (u32 j = 0; j < kInFlight; ++j)
                    if (static_cast<i32>(j * kPieceBytes) < left) ptx::st_global_v4(pool + j * kPieceBytes, v[j]);
            }
        }
    }

    // Of a row.
    MM_DEVICE u32 num_scales() const { return C::row_scaled ? 1 : u32(x.args.up_kb); }

    // Transposed on the way, so that a k-block's scales lie together: lane l has row l % 4, k-blocks l / 4 + 8 i.
    MM_DEVICE void load_scales(float (&v)[kScales], u32 mine, u32 n, u32 first) const {
        const i64 row = __shfl_sync(0xffffffffu, mine, x.lane % kCopyRowsOf);
        const u32* from = x.template own<u32>(x.args.row_scales) + row * x.args.scale_pitch;
        each_scale(n, first, [&](u32 i, u32 kb) { v[i] = __uint_as_float(ptx::ld_global_cg_u32(from + kb)); });
    }
    MM_DEVICE void store_scales(const float (&v)[kScales], u32 to_row, u32 n, u32 first) const {
        float* to = x.template own<float>(x.args.pool_scales) + to_row + x.lane % kCopyRowsOf;
        const i64 rows = static_cast<i64>(x.args.ring_blocks) * kBlockRows;
        each_scale(n, first, [&](u32 i, u32 kb) { to[kb * rows] = v[i]; });
    }
    template <class F>
    MM_DEVICE void each_scale(u32 n, u32 first, F&& f) const {
        const u32 kb = first + x.lane / kCopyRowsOf;
        if (x.lane % kCopyRowsOf >= n) return;
#pragma unroll
        for (u32 i = 0; i < kScales; ++i)
            if (kb + i * kScaleLanes < num_scales()) f(i, kb + i * kScaleLanes);
    }
};

}  // namespace megamoe::mega
