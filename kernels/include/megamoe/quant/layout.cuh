// Where a scale goes. Rows and blocks count within one of a batch of matrices; a layout is a type with put().
#pragma once
#include "megamoe/quant/values.cuh"

namespace megamoe::quant {

// fp32 [batch, rows, blocks], row-major.
struct RowMajorScales {
    float* p;
    i64 rows;
    i32 blocks;
    i64 ld;  // unused here: the other layouts' stride between blocks

    MM_DEVICE void put(i64 batch, i64 row, i32 block, Scale s) const {
        p[(batch * rows + row) * blocks + block] = s.value;
    }
};

// fp32, rows next to each other: what a tensor copy brings to shared memory as one box. ld = rows rounded up to 16
// bytes.
struct Sm90Scales {
    float* p;
    i64 rows;
    i32 blocks;
    i64 ld;

    MM_DEVICE void put(i64 batch, i64 row, i32 block, Scale s) const {
        p[(batch * blocks + block) * ld + row] = s.value;
    }
};

// UE8M0, four blocks of a row to an int32 (the first in the lowest byte), rows next to each other; missing blocks are
// 0.
struct Sm100Scales {
    u8* p;
    i64 rows;
    i32 blocks;
    i64 ld;

    MM_DEVICE void put(i64 batch, i64 row, i32 block, Scale s) const {
        u8* word = p + ((batch * ceil_div(blocks, 4) + block / 4) * ld + row) * 4;
        word[block % 4] = static_cast<u8>(__float_as_uint(s.value) >> 23);
        if (block == blocks - 1)
#pragma unroll 1
            for (int i = block % 4 + 1; i < 4; ++i) word[i] = 0;
    }
};

}  // namespace megamoe::quant
