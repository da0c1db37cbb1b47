// E4M3 with one scale per 128 values of a row. Eight threads share a block of 128, a CTA takes kSteps * 32 blocks in a
// row.
#pragma once
#include "megamoe/quant/layout.cuh"
#include "megamoe/quant/source.cuh"

namespace megamoe::quant {

struct Cast1x128 {
    static constexpr int kThreads = 256;

    // q [rows, ldq] with cols <= ldq, ldq a multiple of 16; columns from cols on are written as zeros. scales.rows is
    // the height of one matrix of the batch.
    template <class Rule, int kSteps, class Source, class Scales>
    static MM_DEVICE void run(const Source& source, const Scales& scales, u8* q, i64 ldq, i64 rows) {
        constexpr int kBlocksPerStep = kThreads / kLanes;
        const u32 blocks = static_cast<u32>(scales.blocks);
        const u32 lane = threadIdx.x % kLanes;
        const u32 first = blockIdx.x * (kSteps * kBlocksPerStep) + threadIdx.x / kLanes;
        const u32 end = static_cast<u32>(rows) * blocks;  // the host keeps this under 2^32

        typename Source::Raw raw[kSteps];
        u32 row[kSteps], block[kSteps];
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {  // all loads before the first use
            const u32 at = min_of(first + i * kBlocksPerStep, end - 1);
            row[i] = at / blocks;
            block[i] = at - row[i] * blocks;
            source.load(raw[i], row[i], static_cast<i32>(block[i] * kBlock + lane * kValues));
        }
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
            auto held = source.hold(raw[i]);
            float amax = lanes_max<kLanes>(held.template amax<true>());
            if (!is_finite(
                    amax)) {  // rare; all eight threads of the block come here, other blocks of the warp need not
                held.repair();
                amax = lanes_max<kLanes>(held.template amax<false>(),
                                         0xffu << (threadIdx.x % kWarpSize / kLanes * kLanes));
            }
            if (first + i * kBlocksPerStep >= end) continue;  // not return: the next step's shuffles want all lanes
            const Scale s = Rule::from(amax);
            const i64 col = block[i] * kBlock + lane * kValues;
            if (col < ldq) *reinterpret_cast<uint4*>(q + row[i] * ldq + col) = encode(held, s.inverse);
            if (lane == 0) {
                const u32 batch = row[i] / static_cast<u32>(scales.rows);
                scales.put(batch, row[i] - batch * scales.rows, block[i], s);
            }
        }
    }
};

}  // namespace megamoe::quant
