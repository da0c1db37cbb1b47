// A 128 x 128 tile in the registers of a CTA: thread t holds kRows rows from kRows (t / 8) on, of columns 16 (t % 8) ..
// + 16, so that its values of a column are neighbouring bytes of the transposed copy.
#pragma once
#include "megamoe/quant/source.cuh"

namespace megamoe::quant {

template <class Source>
struct Tile {
    using Kept = typename Source::Kept;
    static constexpr int kRows = 32 / Kept::kWords;  // 32 registers of values: 4 rows of bf16, 2 of fp32
    static constexpr int kThreads = kBlock / kRows * kLanes;
    static constexpr int kWarps = kThreads / kWarpSize;

    Kept held[kRows];

    static MM_DEVICE i32 row() { return static_cast<i32>(threadIdx.x / kLanes) * kRows; }
    static MM_DEVICE i32 col() { return static_cast<i32>(threadIdx.x % kLanes) * kValues; }

    // Rows row0 .. row0 + num_rows of the source are the tile's first; the rest are zeros.
    MM_DEVICE void load(const Source& source, i64 row0, i32 num_rows, i32 col0) {
        typename Source::Raw raw[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i)
            source.load(raw[i], row0 + row() + i, row() + i < num_rows ? col0 + col() : source.cols);
#pragma unroll
        for (int i = 0; i < kRows; ++i) held[i] = source.hold(raw[i]);
    }

    MM_DEVICE void repair() {
#pragma unroll
        for (int i = 0; i < kRows; ++i) held[i].repair();
    }

    // q [rows, ldq] at the tile's first element.
    MM_DEVICE void store_row(u8* q, i64 ldq, int i, i32 num_rows, i32 num_cols, float inverse) const {
        if (row() + i < num_rows && col() < num_cols)
            *reinterpret_cast<uint4*>(q + (row() + i) * ldq + col()) = encode(held[i], inverse);
    }

    // This thread's values, each column times its inverse scale, to the 16 KB at `shared`: 128 columns of 32 words of
    // four rows, word w at w ^ (4 (column / 16)), which is free of bank conflicts here (the lanes of a warp differ in
    // the low two bits of w and in column / 16) and below (whole columns).
    template <class Inverse>
    MM_DEVICE void put_columns(u32* shared, Inverse&& inverse) const {
        const u32 w = row() / 4, c16 = threadIdx.x % kLanes;
        float v[kRows][kValues];
#pragma unroll
        for (int i = 0; i < kRows; ++i) held[i].get(v[i]);
#pragma unroll
        for (int j = 0; j < kValues; ++j) {
            const float s = inverse(j);
            u32* word = shared + (c16 * kValues + j) * 32 + (w ^ (4 * c16));
            const u32 first = ptx::cvt_e4m3x2(v[0][j] * s, v[1][j] * s);
            if constexpr (kRows == 4)
                *word = first | ptx::cvt_e4m3x2(v[2][j] * s, v[3][j] * s) << 16;
            else
                reinterpret_cast<u16*>(word)[row() / 2 % 2] = static_cast<u16>(first);
        }
    }

    // From `shared` to the transposed copy qt [columns, ldqt] at the tile's first element, 16 rows' bytes at a time.
    static MM_DEVICE void store_columns(const u32* shared, u8* qt, i64 ldqt, i32 num_rows, i32 num_cols) {
        const i32 chunk = static_cast<i32>(threadIdx.x % 8), first = static_cast<i32>(threadIdx.x / 8);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            const i32 c = first + kThreads / 8 * i;
            const uint4 v = *reinterpret_cast<const uint4*>(shared + c * 32 + 4 * (chunk ^ (c / kValues)));
            if (c < num_cols && chunk * 16 < num_rows) *reinterpret_cast<uint4*>(qt + c * ldqt + chunk * 16) = v;
        }
    }
};

}  // namespace megamoe::quant
