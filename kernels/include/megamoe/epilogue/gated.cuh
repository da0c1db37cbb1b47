// Gate and up columns, interleaved by 8 in the product, meet in one thread: accumulators 8 p .. 8 p + 3 are of eight
// gate columns, 8 p + 4 .. 8 p + 7 of the up columns that belong to them.
#pragma once
#include "megamoe/quant/source.cuh"

namespace megamoe {

// Accumulator of the gate for accumulator i of the result (layout in ptx/wgmma.cuh); the up value's is 4 further.
MM_DEVICE constexpr int gate_index(int i) {
    return i / 4 * 8 + i % 4;
}

template <class Activation>
MM_DEVICE float gated(float gate, float up, float limit, float alpha) {
    static_assert(Activation::kGated);
    return Activation::of(gate, up, limit, alpha);
}

}  // namespace megamoe
