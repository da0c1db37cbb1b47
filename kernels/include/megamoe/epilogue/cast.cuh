// From accumulators to e4m3 with one scale per 1x128, by the rules of quant/values.cuh.
#pragma once
#include "megamoe/epilogue/store.cuh"
#include "megamoe/quant/values.cuh"

namespace megamoe {

// Where a warp's 16 rows of q and of their scales go. Rows from `rows` on and columns from `cols` (a multiple of 8, may
// be <= 0) on do not exist; q's rows are padded to 16 bytes and the padding is written as zeros.
struct CastRows {
    u8* q;
    i64 ld;
    float* scale;  // of row 0 of this block of 128 columns; rows are adjacent
    i32 rows, cols;
};

// One block of 128 columns, of which the warp's quads of lanes hold a row each. `at(i)` gives accumulator i (layout in
// ptx/wgmma.cuh), finished.
template <int kCols, class At>
MM_DEVICE void store_rows_cast(const CastRows& out, u32 staging, u32 lane, At&& at) {
    static_assert(kCols == quant::kBlock, "a row's scale is found among four lanes");
    float v[kCols / 2], amax[2] = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < kCols / 2; ++i) {
        v[i] = i / 4 * 8 < out.cols ? at(i) : 0.f;
        amax[i / 2 % 2] = quant::max_abs<true>(amax[i / 2 % 2], v[i]);
    }
    amax[0] = quant::lanes_max<4>(amax[0]), amax[1] = quant::lanes_max<4>(amax[1]);
    if (__any_sync(0xffffffffu, !quant::is_finite(amax[0]) || !quant::is_finite(amax[1]))) {  // rare
        amax[0] = amax[1] = 0.f;
#pragma unroll
        for (int i = 0; i < kCols / 2; ++i) {
            if (!quant::is_finite(v[i])) v[i] = __uint_as_float(0x7fc00000u);
            amax[i / 2 % 2] = quant::max_abs<false>(amax[i / 2 % 2], v[i]);
        }
        amax[0] = quant::lanes_max<4>(amax[0]), amax[1] = quant::lanes_max<4>(amax[1]);
    }
    const quant::Scale s[2] = {quant::AnyScale::from(amax[0]), quant::AnyScale::from(amax[1])};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const i32 row = lane / 4 + 8 * h;
        if (lane % 4 == 0 && row < out.rows && out.cols > 0) out.scale[row] = s[h].value;
    }
    // Sixteen columns are a 16-byte piece: each lane's four bytes of it, two of either 8 columns, travel as one word of
    // an 8x8 matrix and are put in order when the piece is read back.
    auto word = [&](int i, int h) {
        const float inverse = s[h].inverse;
        return ptx::cvt_e4m3x2(v[i + 2 * h] * inverse, v[i + 2 * h + 1] * inverse) |
               ptx::cvt_e4m3x2(v[i + 4 + 2 * h] * inverse, v[i + 5 + 2 * h] * inverse) << 16;
    };
    __syncwarp();
#pragma unroll
    for (int c = 0; c < kCols; c += 32) {
        const int i = c / 2;
        ptx::st_matrix_x4(chunk_piece(staging, lane % 16, c / 16 + lane / 16), word(i, 0), word(i, 1), word(i + 8, 0),
                          word(i + 8, 1));
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const u32 row = i * 4 + lane / 8, piece = lane % 8;
        if (static_cast<i32>(row) < out.rows && static_cast<i32>(piece * 16) < out.cols) {
            const uint4 w = ptx::ld_shared_v4(chunk_piece(staging, row, piece));
            ptx::st_global_v4(out.q + row * out.ld + piece * 16,
                              make_uint4(__byte_perm(w.x, w.y, 0x5410), __byte_perm(w.z, w.w, 0x5410),
                                         __byte_perm(w.x, w.y, 0x7632), __byte_perm(w.z, w.w, 0x7632)));
        }
    }
}

}  // namespace megamoe
