// fp8_row: activations in e4m3 with one scale a row, over all of I, which no tile of the first GEMM sees. Tiles leave
// fp32 and, of each row, the largest magnitude of 128 columns. The warp that stores the last of a strip's columns, on
// whichever CTA, casts the strip's rows in place: codes take the first quarter of a row's bytes. No wait is added: the
// second GEMM awaits the tile in which that happens.
#pragma once
#include "megamoe/mega/context.cuh"
#include "megamoe/quant/values.cuh"

namespace megamoe::mega {

template <class C>
struct RowCaster {
    static constexpr int kInFlight = 16;                   // pieces asked for before the first is used
    static constexpr i32 kPieceColumns = kWarpSize * 4;    // of a row: 16 bytes a lane
    static constexpr u32 kPieceBytes = kPieceColumns * 4;  // before the cast

    const Context<C>& x;

    // By all lanes of a math warp that has stored its strip of a tile, or its share of it, row `first` of the block on;
    // `rows` of the block exist. shares: warps that a tile's strip is shared by.
    MM_DEVICE void settle(i32 block, u32 first, i32 rows, u32 shares) const {
        __syncwarp();
        bool last = false;
        if (x.lane == 0 && !x.waits.aborted())
            last = comm::count_strip(x.waits.mem,
                                     x.template own<u32>(x.args.strips_done) + block * kMathWarps + first / kStripRows,
                                     x.args.up_tiles * shares);
        if (!__shfl_sync(0xffffffffu, last, 0)) return;
        const i32 n = min_of(rows - static_cast<i32>(first), kStripRows);
        const i64 row = static_cast<i64>(block) * kBlockRows + first;
        if (n > 0) cast(row, n, row_scale(row));
    }

  private:
    // A piece of a row that a warp casts at a time.
    struct Piece {
        i32 row, index;
        MM_DEVICE void next(i32 pieces) {
            const bool end = ++index == pieces;
            index = end ? 0 : index;
            row += end;
        }
    };

    // Lanes r and r + 16: the scale of row r, which takes the place of the first of its magnitudes.
    MM_DEVICE quant::Scale row_scale(i64 row) const {
        const i32 pieces = ceil_div(x.args.intermediate, kPieceColumns);
        float* scales = x.template own<float>(x.args.mid_scales) + row + x.lane % kStripRows;
        const u32* from = reinterpret_cast<const u32*>(scales);
        float amax = 0.f;
#pragma unroll 4
        for (i32 p = x.lane / kStripRows; p < pieces; p += kWarpSize / kStripRows)
            amax = fmaxf(amax, __uint_as_float(ptx::ld_global_cg_u32(from + static_cast<i64>(p) * x.args.mid_rows)));
        amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, kStripRows));
        const quant::Scale scale = quant::AnyScale::from(amax);
        if (x.lane < kStripRows) *scales = scale.value;
        return scale;
    }

    MM_DEVICE void cast(i64 first_row, i32 n, const quant::Scale& scale) const {
        const i32 inter = x.args.intermediate, pieces = ceil_div(inter, kPieceColumns), items = n * pieces;
        u8* mid = x.template own<u8>(x.args.mid) + first_row * x.args.mid_pitch;
        Piece piece{0, 0};
        for (i32 i0 = 0; i0 < items; i0 += kInFlight) {
            uint4 v[kInFlight];
            Piece ahead = piece;
#pragma unroll
            for (int j = 0; j < kInFlight; ++j, ahead.next(pieces)) {
                const i32 col = ahead.index * kPieceColumns + static_cast<i32>(x.lane) * 4;
                v[j] = make_uint4(0, 0, 0, 0);
                if (i0 + j < items && col < inter)
                    v[j] = ptx::ld_global_cg_v4(mid + static_cast<i64>(ahead.row) * x.args.mid_pitch + col * 4);
            }
            // Codes of piece p go where piece p / 4 stood, and that has been read by now.
            __syncwarp();
#pragma unroll
            for (int j = 0; j < kInFlight; ++j, piece.next(pieces)) {
                const i32 col = piece.index * kPieceColumns + static_cast<i32>(x.lane) * 4;
                const float s = __shfl_sync(0xffffffffu, scale.inverse, piece.row % kStripRows);
                if (i0 + j < items && col < inter)
                    ptx::st_global_u32(mid + static_cast<i64>(piece.row) * x.args.mid_pitch + col, encode(v[j], s));
            }
            __syncwarp();
        }
    }

    static MM_DEVICE u32 encode(const uint4& v, float s) {
        return ptx::cvt_e4m3x2(__uint_as_float(v.x) * s, __uint_as_float(v.y) * s) |
               ptx::cvt_e4m3x2(__uint_as_float(v.z) * s, __uint_as_float(v.w) * s) << 16;
    }
};

}  // namespace megamoe::mega
