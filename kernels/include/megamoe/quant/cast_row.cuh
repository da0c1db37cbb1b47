// E4M3 with one scale a row. A CTA of kThreads takes kThreads / kRowThreads rows.
#pragma once
#include "megamoe/quant/source.cuh"

namespace megamoe::quant {

template <int kThreads, int kRowThreads>
struct CastRow {
    static constexpr int kWarps = kThreads / kWarpSize, kRowWarps = kRowThreads / kWarpSize;
    static_assert(kThreads % kRowThreads == 0 && kRowThreads % kWarpSize == 0);

    static MM_DEVICE constexpr int power_of_two_from(int n) { return n <= 1 ? 1 : 2 * power_of_two_from((n + 1) / 2); }

    // Maximum over the threads of each row; `bad`: whether any row of the CTA met NaN or infinity.
    static MM_DEVICE float row_max(float x, float (&shared)[kWarps], bool& bad) {
        x = lanes_max<kWarpSize>(x);
        const u32 warp = threadIdx.x / kWarpSize;
        if (threadIdx.x % kWarpSize == 0) shared[warp] = x;
        bad = __syncthreads_or(!is_finite(x));
        // (Of a number of warps that is no power of two some are looked at twice.)
        return lanes_max<power_of_two_from(kRowWarps)>(
            shared[warp / kRowWarps * kRowWarps + threadIdx.x % kWarpSize % kRowWarps]);
    }

    // q [rows, ldq], columns from source.cols on written as zeros; scale [rows]. With kOneRead a row has at most
    // kSteps * kRowThreads * 16 columns; longer ones are read twice, the second time mostly from L2.
    template <class Rule, int kSteps, bool kOneRead, class Source>
    static MM_DEVICE void run(const Source& source, float* scale, u8* q, i64 ldq, i64 rows) {
        __shared__ float shared[2][kWarps];
        constexpr i32 step = kRowThreads * kValues;
        const i64 row = static_cast<i64>(blockIdx.x) * (kThreads / kRowThreads) + threadIdx.x / kRowThreads;
        const i32 first = static_cast<i32>(threadIdx.x % kRowThreads) * kValues;
        const i32 length = kOneRead ? 1 : static_cast<i32>(ldq);

        typename Source::Kept kept[kSteps];
        auto load = [&](i32 base) {
            typename Source::Raw raw[kSteps];
#pragma unroll
            for (int i = 0; i < kSteps; ++i)
                source.load(raw[i], row, row < rows ? base + first + i * step : source.cols);
#pragma unroll
            for (int i = 0; i < kSteps; ++i) kept[i] = source.hold(raw[i]);
        };

        float amax = 0.f;
        if (kOneRead) load(0);
        for (i32 base = 0; base < length; base += kSteps * step) {
            if (!kOneRead) load(base);
#pragma unroll
            for (int i = 0; i < kSteps; ++i) amax = ptx::max_nan(amax, kept[i].template amax<true>());
        }
        bool bad;
        amax = row_max(amax, shared[0], bad);
        if (bad) {  // rare; the whole CTA comes here
            amax = 0.f;
            for (i32 base = 0; base < length; base += kSteps * step) {
                if (!kOneRead) load(base);
#pragma unroll
                for (int i = 0; i < kSteps; ++i) {
                    kept[i].repair();
                    amax = fmaxf(amax, kept[i].template amax<false>());
                }
            }
            bool still;
            amax = row_max(amax, shared[1], still);
        }

        const Scale s = Rule::from(amax);
        if (row >= rows) return;
        if (first == 0) scale[row] = s.value;
        for (i32 base = 0; base < length; base += kSteps * step) {
            if (!kOneRead) load(base);
#pragma unroll
            for (int i = 0; i < kSteps; ++i) {
                const i32 col = base + first + i * step;
                if (!kOneRead && bad) kept[i].repair();
                if (col < ldq) *reinterpret_cast<uint4*>(q + row * ldq + col) = encode(kept[i], s.inverse);
            }
        }
    }
};

}  // namespace megamoe::quant
