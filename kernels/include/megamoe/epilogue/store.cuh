// From accumulators to D in global memory. Each warp stores its own 16 rows and waits for no other.
#pragma once
#include "megamoe/ptx/memory.cuh"

namespace megamoe {

// Where a warp's 16 rows of D go. `rows` of them, and columns below `cols`, exist.
template <class Out>
struct WarpRows {
    Out* d;  // row 0, column 0 of the warp's part
    i64 ld;
    i32 rows, cols;
};

// bf16 through 2 KB of shared memory of the warp's own: 16 rows x 64 columns at a time, 16-byte chunks xor-swizzled by
// row, so that global stores are whole 128-byte lines. `at(i)` gives accumulator i (layout in ptx/wgmma.cuh), finished.
template <int kCols, class At>
MM_DEVICE void store_rows(const WarpRows<u16>& out, u32 staging, u32 lane, At&& at) {
    static_assert(kCols % 16 == 0);
    constexpr int kStagedBytes = 128;
#pragma unroll
    for (int c0 = 0; c0 < kCols; c0 += 64) {
        __syncwarp();
#pragma unroll
        for (int c = c0; c < (c0 + 64 < kCols ? c0 + 64 : kCols); c += 16) {
            const int i = c / 2;
            const u32 row = (lane / 8 % 2) * 8 + lane % 8, chunk = (c - c0) / 8 + lane / 16;
            ptx::st_matrix_x4(staging + row * kStagedBytes + ((chunk ^ (row % 8)) * 16),
                              ptx::pack_bf16(at(i), at(i + 1)), ptx::pack_bf16(at(i + 2), at(i + 3)),
                              ptx::pack_bf16(at(i + 4), at(i + 5)), ptx::pack_bf16(at(i + 6), at(i + 7)));
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const u32 row = i * 4 + lane / 8, chunk = lane % 8;
            const i32 col = c0 + chunk * 8;
            if (static_cast<i32>(row) < out.rows && col < out.cols && col < kCols)
                ptx::st_global_v4(out.d + row * out.ld + col,
                                  ptx::ld_shared_v4(staging + row * kStagedBytes + ((chunk ^ (row % 8)) * 16)));
        }
    }
}

// fp32 straight from registers: a quad of lanes writes whole 32-byte sectors. kAdd: D += instead of D =.
template <int kCols, bool kAdd, class At>
MM_DEVICE void store_rows_f32(const WarpRows<float>& out, u32 lane, At&& at) {
    const i32 row = lane / 4, col = lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < kCols / 8; ++j) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            if (row + 8 * h < out.rows && j * 8 + col < out.cols) {
                float2* p = reinterpret_cast<float2*>(out.d + (row + 8 * h) * out.ld + j * 8 + col);
                float2 v = make_float2(at(4 * j + 2 * h), at(4 * j + 2 * h + 1));
                if constexpr (kAdd) {
                    const float2 old = *p;
                    v.x += old.x, v.y += old.y;
                }
                *p = v;
            }
        }
    }
}

}  // namespace megamoe
