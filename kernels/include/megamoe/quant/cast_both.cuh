// One pass over x [rows, cols]: E4M3 with 1x128 scales, and the transposed copy [cols, ...] with 1x128 scales of its
// own, along the tokens: the operands of a forward GEMM and of a weight gradient.
#pragma once
#include "megamoe/quant/layout.cuh"
#include "megamoe/quant/tile.cuh"

namespace megamoe::quant {

// Which rows are transposed together. One group: all of them.
struct AllRows {
    i64 rows;

    struct Span {
        i64 row0;      // first row of the source
        i32 num_rows;  // 0 to 128
        i32 pad_to;    // columns of the transposed copy to write, those from num_rows on as zeros
    };
    MM_DEVICE Span span(i32 block, i64 ldqt, i32&) const {
        const i64 row0 = static_cast<i64>(block) * kBlock;
        return {row0, static_cast<i32>(min_of<i64>(rows - row0, kBlock)),
                static_cast<i32>(min_of<i64>(ldqt - row0, kBlock))};
    }
};

// Rows offsets[g] .. offsets[g + 1] are group g (offsets[0] is 0). Each group starts a block of the transposed copy,
// block offsets[g] / 128 + g, and fills its last block up with zeros: a GEMM over its tokens needs no masks, and no
// count is read on the host. Blocks of no group (at most one before each) are zeros with scale 1.
struct GroupedRows {
    const i32* offsets;
    i32 num_groups;

    MM_DEVICE AllRows::Span span(i32 block, i64, i32& shared) const {
        if (threadIdx.x == 0) shared = -1;
        __syncthreads();
        for (i32 g = static_cast<i32>(threadIdx.x); g < num_groups; g += static_cast<i32>(blockDim.x)) {
            const i32 begin = __ldg(offsets + g), end = __ldg(offsets + g + 1);
            const i32 start = begin / kBlock + g;
            if (block >= start && block < start + ceil_div(end - begin, kBlock)) shared = g;
        }
        __syncthreads();
        if (shared < 0) return {0, 0, kBlock};
        const i32 begin = __ldg(offsets + shared), end = __ldg(offsets + shared + 1);
        const i32 row0 = begin + (block - begin / kBlock - shared) * kBlock;
        return {row0, min_of(end - row0, kBlock), kBlock};
    }
};

struct CastBoth {
    template <class Scales>
    struct Out {
        u8* q;
        i64 ldq;
        Scales scales;
        u8* qt;
        i64 ldqt;
        Scales scales_t;
    };

    // Grid (column blocks, row blocks of the transposed copy).
    template <class Rule, class Source, class Rows, class Scales>
    static MM_DEVICE void run(const Source& source, const Rows& rows, const Out<Scales>& out) {
        __shared__ __align__(16) float warp_max[Tile<Source>::kWarps][kBlock];
        __shared__ __align__(16)
            float4 inverse[kLanes * 5];  // four of a thread's sixteen each; the fifth keeps banks apart
        __shared__ __align__(16) u32 columns[kBlock * 32];
        __shared__ i32 group;
        const i32 col0 = static_cast<i32>(blockIdx.x) * kBlock;
        const auto span = rows.span(static_cast<i32>(blockIdx.y), out.ldqt, group);

        Tile<Source> tile;
        tile.load(source, span.row0, span.num_rows, col0);
        // The rows leave before anybody waits: only their own threads are needed for that. Should one hold NaN or
        // infinity, which is rare, the whole CTA comes back to them.
        const bool bad = store_rows<true, Rule>(tile, span.row0, span.num_rows, col0, out);
        column_max(tile, warp_max);
        if (__syncthreads_or(bad)) {
            tile.repair();
            store_rows<false, Rule>(tile, span.row0, span.num_rows, col0, out);
            column_max(tile, warp_max);
            __syncthreads();
        }
        if (threadIdx.x < kBlock) {
            float amax = 0.f;
#pragma unroll
            for (int warp = 0; warp < tile.kWarps; ++warp) amax = fmaxf(amax, warp_max[warp][threadIdx.x]);
            const Scale s = Rule::from(amax);
            reinterpret_cast<float*>(inverse)[threadIdx.x + threadIdx.x / kValues * 4] = s.inverse;
            const i32 col = col0 + static_cast<i32>(threadIdx.x);
            if (col < source.cols) out.scales_t.put(0, col, static_cast<i32>(blockIdx.y), s);
        }
        __syncthreads();
        tile.put_columns(columns, [&](int j) {
            const float4 v = inverse[threadIdx.x % kLanes * 5 + j / 4];
            return j % 4 == 0 ? v.x : j % 4 == 1 ? v.y : j % 4 == 2 ? v.z : v.w;
        });
        __syncthreads();
        tile.store_columns(columns, out.qt + col0 * out.ldqt + static_cast<i64>(blockIdx.y) * kBlock, out.ldqt,
                           span.pad_to, source.cols - col0);
    }

    // The tile's rows and their scales; returns whether a row of this thread's holds NaN or infinity, whose results are
    // then void. kKeepNan = false: of a repaired tile.
    template <bool kKeepNan, class Rule, class Source, class Scales>
    static MM_DEVICE bool store_rows(const Tile<Source>& tile, i64 row0, i32 num_rows, i32 col0,
                                     const Out<Scales>& out) {
        u8* q = out.q + row0 * out.ldq + col0;
        bool bad = false;
#pragma unroll
        for (int i = 0; i < tile.kRows; ++i) {
            const float amax = lanes_max<kLanes>(tile.held[i].template amax<kKeepNan>());
            bad |= !is_finite(amax);
            const Scale s = Rule::from(amax);
            tile.store_row(q, out.ldq, i, num_rows, static_cast<i32>(out.ldq) - col0, s.inverse);
            if (threadIdx.x % kLanes == 0 && tile.row() + i < num_rows)
                out.scales.put(0, row0 + tile.row() + i, static_cast<i32>(blockIdx.x), s);
        }
        return bad;
    }

    // Largest magnitude but for NaN of each column over the rows of each warp. Lanes 8 and 16 apart hold the same
    // columns: each step they trade halves of them, until a lane is left with four.
    template <class Source>
    static MM_DEVICE void column_max(const Tile<Source>& tile, float (&warp_max)[Tile<Source>::kWarps][kBlock]) {
        using Kept = typename Source::Kept;
        u32 max[Kept::kWords];
#pragma unroll
        for (int j = 0; j < Kept::kWords; ++j) {
            max[j] = Kept::larger(0u, tile.held[0].bits[j]);
#pragma unroll
            for (int i = 1; i < tile.kRows; ++i) max[j] = Kept::larger(max[j], tile.held[i].bits[j]);
        }
        const bool upper8 = threadIdx.x & 8u, upper16 = threadIdx.x & 16u;
        keep_half<Kept, Kept::kWords / 2>(max, upper8, 8);
        keep_half<Kept, Kept::kWords / 4>(max, upper16, 16);
        const i32 col = tile.col() + (upper8 ? 8 : 0) + (upper16 ? 4 : 0);
        *reinterpret_cast<float4*>(warp_max[threadIdx.x / kWarpSize] + col) = Kept::first_four(max);
    }

    template <class Kept, int kHalf>
    static MM_DEVICE void keep_half(u32 (&max)[Kept::kWords], bool upper, int lane_mask) {
#pragma unroll
        for (int j = 0; j < kHalf; ++j) {
            const u32 kept = upper ? max[j + kHalf] : max[j], given = upper ? max[j] : max[j + kHalf];
            max[j] = Kept::larger(kept, __shfl_xor_sync(0xffffffffu, given, lane_mask));
        }
    }
};

}  // namespace megamoe::quant
