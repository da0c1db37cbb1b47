// From accumulators to D in global memory. Each warp stores its own 16 rows and waits for no other.
#pragma once
#include "megamoe/ptx/memory.cuh"
#include "megamoe/ptx/tma.cuh"

namespace megamoe {

// Where a warp's 16 rows of D go. `rows` of them, and columns below `cols`, exist.
template <class Out>
struct WarpRows {
    Out* d;  // row 0, column 0 of the warp's part
    i64 ld;
    i32 rows, cols;
};

// Staging of a warp: 16 rows x 64 columns of bf16 (2 KB) a chunk, 16-byte pieces xor-swizzled by row: the same order in
// which the copy engine reads a box with 128-byte swizzle.
constexpr u32 kChunkBytes = 2048, kChunkCols = 64;

MM_DEVICE u32 chunk_piece(u32 chunk, u32 row, u32 piece) {
    return chunk + row * 128 + ((piece ^ (row % 8)) * 16);
}

// Columns c0 .. c0 + 64 (or to the last) of the warp's accumulators into the chunk at `staging`. `at(i)` gives
// accumulator i (layout in ptx/wgmma.cuh), finished.
template <int kCols, class At>
MM_DEVICE void stage_chunk(u32 staging, int c0, u32 lane, At&& at) {
    static_assert(kCols % 16 == 0);
#pragma unroll
    for (int c = c0; c < (c0 + 64 < kCols ? c0 + 64 : kCols); c += 16) {
        const int i = c / 2;
        ptx::st_matrix_x4(chunk_piece(staging, lane % 16, (c - c0) / 8 + lane / 16), ptx::pack_bf16(at(i), at(i + 1)),
                          ptx::pack_bf16(at(i + 2), at(i + 3)), ptx::pack_bf16(at(i + 4), at(i + 5)),
                          ptx::pack_bf16(at(i + 6), at(i + 7)));
    }
}

// A staged chunk, columns c0 on, by the warp's own stores of whole 128-byte lines; masks rows and columns.
template <int kCols>
MM_DEVICE void copy_chunk(const WarpRows<u16>& out, u32 staging, int c0, u32 lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const u32 row = i * 4 + lane / 8, piece = lane % 8;
        const i32 col = c0 + piece * 8;
        if (static_cast<i32>(row) < out.rows && col < out.cols && col < kCols)
            ptx::st_global_v4(out.d + row * out.ld + col, ptx::ld_shared_v4(chunk_piece(staging, row, piece)));
    }
}

// bf16 through one chunk of staging, by the warp's own stores of whole 128-byte lines; masks rows and columns.
template <int kCols, class At>
MM_DEVICE void store_rows(const WarpRows<u16>& out, u32 staging, u32 lane, At&& at) {
#pragma unroll
    for (int c0 = 0; c0 < kCols; c0 += kChunkCols) {
        __syncwarp();
        stage_chunk<kCols>(staging, c0, lane, at);
        __syncwarp();
        copy_chunk<kCols>(out, staging, c0, lane);
    }
}

// bf16 by the copy engine, which goes on while the warp turns to its next tile. Needs kCols / 64 chunks of staging, all
// 16 rows valid (or the tensor's last), and bulk_wait_read by lane 0 before the call if the staging was used, and
// before the CTA ends.
template <int kCols, class At>
MM_DEVICE void store_rows_async(const TensorMap* map, i32 row, i32 col, u32 staging, u32 lane, At&& at) {
    static_assert(kCols % kChunkCols == 0);
    __syncwarp();
#pragma unroll
    for (int c0 = 0; c0 < kCols; c0 += kChunkCols) stage_chunk<kCols>(staging + c0 / 64 * kChunkBytes, c0, lane, at);
    ptx::fence_proxy_async_shared();
    __syncwarp();
    if (lane == 0) {
#pragma unroll
        for (int c0 = 0; c0 < kCols; c0 += kChunkCols)
            ptx::tma_store_2d(map, staging + c0 / 64 * kChunkBytes, col + c0, row);
        ptx::bulk_commit();
    }
}

// The same where another group's rows may follow: fewer than 16 rows leave by the warp's own stores. Both ways read
// what was staged once: two epilogues that read the accumulators would cost the main loop its choice of registers.
template <int kCols, class At>
MM_DEVICE void store_rows_async(const WarpRows<u16>& out, const TensorMap* map, i32 row, i32 col, u32 staging, u32 lane,
                                At&& at) {
    static_assert(kCols % kChunkCols == 0);
    __syncwarp();
#pragma unroll
    for (int c0 = 0; c0 < kCols; c0 += kChunkCols) stage_chunk<kCols>(staging + c0 / 64 * kChunkBytes, c0, lane, at);
    ptx::fence_proxy_async_shared();
    __syncwarp();
    if (out.rows < 16) {
#pragma unroll 1
        for (int c0 = 0; c0 < kCols; c0 += kChunkCols)
            copy_chunk<kCols>(out, staging + c0 / 64 * kChunkBytes, c0, lane);
    } else if (lane == 0) {
#pragma unroll
        for (int c0 = 0; c0 < kCols; c0 += kChunkCols)
            ptx::tma_store_2d(map, staging + c0 / 64 * kChunkBytes, col + c0, row);
        ptx::bulk_commit();
    }
}

// fp32 straight from registers, 16 bytes a lane: neighbours exchange a pair, so that the even lane holds four columns
// of row r and the odd one of row r + 8. Storing pairs as they are would want accumulators in aligned register pairs,
// where promotion reads one register bank twice. kAdd: D += instead of D =.
template <int kCols, bool kAdd, class At>
MM_DEVICE void store_rows_f32(const WarpRows<float>& out, u32 lane, At&& at) {
    const bool odd = lane % 2 != 0;
    const i32 row = lane / 4 + (odd ? 8 : 0), col = lane % 4 / 2 * 4;
#pragma unroll
    for (int j = 0; j < kCols / 8; ++j) {
        const float u0 = at(4 * j), u1 = at(4 * j + 1), v0 = at(4 * j + 2), v1 = at(4 * j + 3);
        const float x = __shfl_xor_sync(0xffffffffu, odd ? u0 : v0, 1),
                    y = __shfl_xor_sync(0xffffffffu, odd ? u1 : v1, 1);
        float4 v = odd ? make_float4(x, y, v0, v1) : make_float4(u0, u1, x, y);
        if (row < out.rows && j * 8 + col < out.cols) {
            float4* p = reinterpret_cast<float4*>(out.d + row * out.ld + j * 8 + col);
            if constexpr (kAdd) {
                const float4 old = *p;
                v.x += old.x, v.y += old.y, v.z += old.z, v.w += old.w;
            }
            *p = v;
        }
    }
}

}  // namespace megamoe
