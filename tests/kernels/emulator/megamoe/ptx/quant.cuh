// The instructions of kernels/include/megamoe/ptx/quant.cuh in plain C++, from their description in the PTX manual.
#pragma once
#include "megamoe/common/types.cuh"

namespace megamoe::ptx {

inline u32 e4m3(float x) {
    if (x != x) return 0x7f;
    const u32 sign = __float_as_uint(x) >> 31 << 7;
    const float a = std::fmin(std::fabs(x), 448.f);
    int exponent = a > 0 ? std::ilogb(a) : -9;
    if (exponent < -6) exponent = -6;  // subnormals share the exponent of 2^-6
    const u32 steps = static_cast<u32>(std::nearbyint(std::ldexp(a, 3 - exponent)));  // 8 to 16; under 8 if subnormal
    return sign | (static_cast<u32>(exponent + 6) * 8 + steps);
}

inline u32 cvt_e4m3x2(float lo, float hi) {
    return e4m3(hi) << 8 | e4m3(lo);
}
inline float max_nan(float a, float b) {
    return a != a || b != b ? NAN : std::fmax(a, b);
}
inline float min_nan(float a, float b) {
    return a != a || b != b ? NAN : std::fmin(a, b);
}

template <bool kKeepNan>
u32 max_magnitude_bf16x2(u32 a, u32 b) {
    auto one = [](u32 x, u32 y) {
        const float p = std::fabs(__uint_as_float(x << 16)), q = std::fabs(__uint_as_float(y << 16));
        return __float_as_uint(kKeepNan ? max_nan(p, q) : std::fmax(p, q)) >> 16 | ((x ^ y) & 0x8000u);
    };
    return one(a >> 16, b >> 16) << 16 | one(a & 0xffff, b & 0xffff);
}

inline float ex2_approx(float x) {
    return std::exp2(x);
}
inline float rcp_approx(float x) {
    return 1.f / x;
}

inline uint4 ld_global_nc_v4(const void* p) {
    if (reinterpret_cast<size_t>(p) % 16) std::fprintf(stderr, "misaligned 16-byte load\n"), std::abort();
    uint4 v;
    std::memcpy(&v, p, 16);
    return v;
}

}  // namespace megamoe::ptx
