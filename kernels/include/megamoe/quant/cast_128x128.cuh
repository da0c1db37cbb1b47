// Weights: E4M3 with one scale per 128 x 128 block, and in the same pass the transposed copy, which has the same
// values.
#pragma once
#include "megamoe/quant/tile.cuh"

namespace megamoe::quant {

struct Cast128x128 {
    // Grid (column blocks, row blocks of a part, batch * parts). w, q [batch, parts * rows, ...]; scale [batch, parts *
    // row blocks, column blocks]. If kTransposed, qt [batch, cols, ldqt] with part p's rows at column p * rows, and
    // scale_t [batch, column blocks, parts * row blocks].
    struct Out {
        u8* q;
        i64 ldq;
        float* scale;
        u8* qt;
        i64 ldqt;
        float* scale_t;
        i32 rows, parts;
    };

    template <class Rule, bool kTransposed, class Source>
    static MM_DEVICE void run(const Source& source, const Out& out) {
        __shared__ float warp_max[2][Tile<Source>::kWarps];
        __shared__ __align__(16) u32 columns[kTransposed ? kBlock * 32 : 1];
        const i32 col0 = static_cast<i32>(blockIdx.x) * kBlock, row0 = static_cast<i32>(blockIdx.y) * kBlock;
        const i32 num_rows = out.rows - row0, num_cols = source.cols - col0;
        const i64 part_row = static_cast<i64>(blockIdx.z) * out.rows + row0;

        Tile<Source> tile;
        tile.load(source, part_row, num_rows, col0);
        float amax = 0.f;
#pragma unroll
        for (int i = 0; i < tile.kRows; ++i) amax = ptx::max_nan(amax, tile.held[i].template amax<true>());
        bool bad;
        amax = cta_max(amax, warp_max[0], bad);
        if (bad) {
            tile.repair();
            amax = 0.f;
#pragma unroll
            for (int i = 0; i < tile.kRows; ++i) amax = fmaxf(amax, tile.held[i].template amax<false>());
            bool still;
            amax = cta_max(amax, warp_max[1], still);
        }

        const Scale s = Rule::from(amax);
        if (threadIdx.x == 0) {
            const i64 blocks = gridDim.x, batch = blockIdx.z / out.parts;
            const i64 row_blocks = static_cast<i64>(gridDim.y) * out.parts;
            const i64 row_block = static_cast<i64>(blockIdx.z % out.parts) * gridDim.y + blockIdx.y;
            out.scale[(batch * row_blocks + row_block) * blocks + blockIdx.x] = s.value;
            if (kTransposed) out.scale_t[(batch * blocks + blockIdx.x) * row_blocks + row_block] = s.value;
        }
        u8* q = out.q + part_row * out.ldq + col0;
#pragma unroll
        for (int i = 0; i < tile.kRows; ++i)
            tile.store_row(q, out.ldq, i, num_rows, static_cast<i32>(out.ldq) - col0, s.inverse);
        if constexpr (kTransposed) {
            tile.put_columns(columns, [&](int) { return s.inverse; });
            __syncthreads();
            const i64 batch = blockIdx.z / out.parts, part = blockIdx.z % out.parts;
            tile.store_columns(columns, out.qt + (batch * source.cols + col0) * out.ldqt + part * out.rows + row0,
                               out.ldqt, num_rows, num_cols);
        }
    }

    template <int kWarps>
    static MM_DEVICE float cta_max(float x, float (&shared)[kWarps], bool& bad) {
        x = lanes_max<kWarpSize>(x);
        if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = x;
        bad = __syncthreads_or(!is_finite(x));
        return lanes_max<kWarps>(shared[threadIdx.x % kWarps]);
    }
};

}  // namespace megamoe::quant
