// fp8_row: activations in e4m3 with one scale a row, over all of I, which no tile of the first GEMM sees. Tiles leave
// bf16 and, of each row, the largest magnitude of 128 columns; when a block's are all there, copying warps cast its
// rows in place: codes take the first half of a row's bytes.
#pragma once
#include "megamoe/mega/context.cuh"
#include "megamoe/quant/values.cuh"

namespace megamoe::mega {

template <class C>
struct RowCaster {
    static constexpr int kInFlight = 6;                     // pieces asked for before the first is used
    static constexpr i32 kPieceColumns = kWarpSize * 8;     // of a row: 16 bytes a lane
    static constexpr i32 kLanes = kWarpSize / kCopyRowsOf;  // that share a row's magnitudes

    const Context<C>& x;

    // Rows `first` .. first + n of all blocks, n <= kCopyRowsOf, by all lanes of a warp.
    MM_DEVICE void cast(i64 first, i32 n) const {
        const float inverse = row_scale(first, n);
        const i32 lane_col = static_cast<i32>(x.lane) * 8;
        u8* row = x.template own<u8>(x.args.mid) + first * x.args.mid_pitch;
#pragma unroll 1
        for (i32 r = 0; r < n; ++r, row += x.args.mid_pitch) {
            const float s = __shfl_sync(0xffffffffu, inverse, r);
#pragma unroll 1
            for (i32 c0 = 0; c0 < x.args.intermediate; c0 += kInFlight * kPieceColumns) {
                const i32 left = x.args.intermediate - c0 - lane_col;
                u8* from = row + (c0 + lane_col) * 2;
                uint4 v[kInFlight];
#pragma unroll
                for (int j = 0; j < kInFlight; ++j)
                    if (j * kPieceColumns < left) v[j] = ptx::ld_global_cg_v4(from + j * kPieceColumns * 2);
                // Codes go where the first half of what has been read by now stood.
                __syncwarp();
                u8* to = row + c0 + lane_col;
#pragma unroll
                for (int j = 0; j < kInFlight; ++j)
                    if (j * kPieceColumns < left)
                        ptx::st_global_v2(to + j * kPieceColumns,
                                          make_uint2(encode(v[j].x, v[j].y, s), encode(v[j].z, v[j].w, s)));
                __syncwarp();
            }
        }
    }

  private:
    // Lanes r, r + kCopyRowsOf, ..: 1 / the scale of row r, which takes the place of the first of its magnitudes.
    MM_DEVICE float row_scale(i64 first, i32 n) const {
        const i32 blocks = ceil_div(x.args.intermediate, kHalfCols), r = static_cast<i32>(x.lane) % kCopyRowsOf;
        float* scales = x.template own<float>(x.args.mid_scales) + first + r;
        const u32* from = reinterpret_cast<const u32*>(scales);
        float amax = 0.f;
#pragma unroll 2
        for (i32 b = x.lane / kCopyRowsOf; b < blocks; b += kLanes)
            amax = fmaxf(amax, __uint_as_float(ptx::ld_global_cg_u32(from + static_cast<i64>(b) * x.args.mid_rows)));
#pragma unroll
        for (int step = kCopyRowsOf; step < kWarpSize; step *= 2)
            amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, step));
        const quant::Scale scale = quant::AnyScale::from(amax);
        if (static_cast<i32>(x.lane) < n) *scales = scale.value;
        return scale.inverse;
    }

    // Two words of two bf16.
    static MM_DEVICE u32 encode(u32 a, u32 b, float s) {
        return ptx::cvt_e4m3x2(low(a) * s, high(a) * s) | ptx::cvt_e4m3x2(low(b) * s, high(b) * s) << 16;
    }
    static MM_DEVICE float low(u32 v) { return __uint_as_float(v << 16); }
    static MM_DEVICE float high(u32 v) { return __uint_as_float(v & 0xffff0000u); }
};

}  // namespace megamoe::mega
