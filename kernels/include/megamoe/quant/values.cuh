// Sixteen consecutive values of a row: what one thread loads, holds and encodes. Scales from largest magnitudes.
//
// The rules are those of kernels/quant/reference.py, bit for bit: amax over finite values, scale = amax / 448 (1 for
// zeros), q = e4m3(x * (1 / scale)), NaN and infinities to NaN.
#pragma once
#include "megamoe/ptx/quant.cuh"

namespace megamoe::quant {

constexpr int kValues = 16;  // per thread: 16 bytes of E4M3
constexpr int kBlock = 128;
constexpr int kLanes = kBlock / kValues;  // threads that share one 1x128 scale
constexpr float kE4M3Max = 448.f;

MM_DEVICE float infinity() {
    return __uint_as_float(0x7f800000u);
}
MM_DEVICE bool is_finite(float x) {
    return fabsf(x) < infinity();
}

// Larger magnitude; NaN if either is NaN, or with kKeepNan = false the other.
template <bool kKeepNan>
MM_DEVICE float max_abs(float a, float b) {
    return kKeepNan ? ptx::max_nan(fabsf(a), fabsf(b)) : fmaxf(fabsf(a), fabsf(b));
}

// Sixteen values as loaded. get(v): in fp32; repair(): infinities become NaN; amax<kKeepNan>(): largest magnitude, NaN
// if one is NaN or, with kKeepNan = false, over the others. On single words: larger(a, b), the larger magnitudes with
// any sign, a NaN giving way to the other; first_four(words), the first magnitudes in fp32.
template <class T>
struct Held;

template <>
struct Held<BF16> {
    static constexpr int kLoads = 2, kWords = 8;
    u32 bits[kWords];  // two values each, the even one in the low half

    MM_DEVICE void get(float (&v)[kValues]) const {
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
            v[2 * i] = __uint_as_float(bits[i] << 16);
            v[2 * i + 1] = __uint_as_float(bits[i] & 0xffff0000u);
        }
    }

    MM_DEVICE void repair() {
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
            if ((bits[i] & 0x7f80u) == 0x7f80u) bits[i] |= 0x7fffu;
            if ((bits[i] & 0x7f800000u) == 0x7f800000u) bits[i] |= 0x7fff0000u;
        }
    }

    template <bool kKeepNan>
    MM_DEVICE float amax() const {
        u32 m = 0;
#pragma unroll
        for (int i = 0; i < kWords; ++i) m = ptx::max_magnitude_bf16x2<kKeepNan>(m, bits[i]);
        return max_abs<kKeepNan>(__uint_as_float(m << 16), __uint_as_float(m & 0xffff0000u));
    }

    static MM_DEVICE u32 larger(u32 a, u32 b) { return ptx::max_magnitude_bf16x2<false>(a, b); }
    static MM_DEVICE float4 first_four(const u32* words) {
        return make_float4(__uint_as_float((words[0] & 0x7fffu) << 16), __uint_as_float(words[0] & 0x7fff0000u),
                           __uint_as_float((words[1] & 0x7fffu) << 16), __uint_as_float(words[1] & 0x7fff0000u));
    }
};

template <>
struct Held<float> {
    static constexpr int kLoads = 4, kWords = 16;
    u32 bits[kWords];

    MM_DEVICE void get(float (&v)[kValues]) const {
#pragma unroll
        for (int i = 0; i < kWords; ++i) v[i] = __uint_as_float(bits[i]);
    }

    MM_DEVICE void repair() {
#pragma unroll
        for (int i = 0; i < kWords; ++i)
            if ((bits[i] & 0x7f800000u) == 0x7f800000u) bits[i] = 0x7fc00000u;
    }

    template <bool kKeepNan>
    MM_DEVICE float amax() const {
        float m = 0.f;
#pragma unroll
        for (int i = 0; i < kWords; ++i) m = max_abs<kKeepNan>(m, __uint_as_float(bits[i]));
        return m;
    }

    static MM_DEVICE u32 larger(u32 a, u32 b) {
        return __float_as_uint(max_abs<false>(__uint_as_float(a), __uint_as_float(b)));
    }
    static MM_DEVICE float4 first_four(const u32* words) {
        return make_float4(__uint_as_float(words[0]), __uint_as_float(words[1]), __uint_as_float(words[2]),
                           __uint_as_float(words[3]));
    }
};

// Loads p[0 .. 16) where `valid` of them lie in the row (may be <= 0 or > 16); the rest are zeros. p is 16-byte aligned
// and `valid` a multiple of 16 bytes.
template <class T>
MM_DEVICE void load(Held<T>& held, const void* p, i32 valid) {
    constexpr int kPerLoad = kValues / Held<T>::kLoads;
#pragma unroll
    for (int i = 0; i < Held<T>::kLoads; ++i) {
        uint4 v = make_uint4(0, 0, 0, 0);
        if (i * kPerLoad < valid) v = ptx::ld_global_nc_v4(static_cast<const uint4*>(p) + i);
        held.bits[4 * i] = v.x, held.bits[4 * i + 1] = v.y, held.bits[4 * i + 2] = v.z, held.bits[4 * i + 3] = v.w;
    }
}

// Maximum over `kSpan` lanes that differ in the lowest bits of the lane; NaN if one is NaN. `mask`: the lanes that
// call.
template <int kSpan>
MM_DEVICE float lanes_max(float x, u32 mask = 0xffffffffu) {
#pragma unroll
    for (int step = kSpan / 2; step > 0; step /= 2) x = ptx::max_nan(x, __shfl_xor_sync(mask, x, step));
    return x;
}

struct Scale {
    float value, inverse;
};

// How a scale follows from an amax, which is finite. Both divisions are rounded to nearest, but without the branches of
// __fdiv_rn and __frcp_rn: the quotient by a constant is corrected by its remainder (Markstein), the reciprocal by one
// step of Newton's, which is what __frcp_rn does where neither number is denormal.
struct AnyScale {
    static MM_DEVICE Scale from(float amax) {
        constexpr float kInverse = 1.f / kE4M3Max;
        const float q = amax * kInverse, exact = fmaf(fmaf(-kE4M3Max, q, amax), kInverse, q);
        const float s = amax == 0.f ? 1.f : fmaxf(exact, 0x1p-126f);
        const float r = ptx::rcp_approx(s);
        return {s, fmaf(fmaf(-s, r, 1.f), r, r)};
    }
};

// Rounded up to a power of two: with amax = m * 2^k and 448 = 1.75 * 2^8 the exponent is k - 8, one more if m > 1.75.
struct PowerOfTwoScale {
    static MM_DEVICE Scale from(float amax) {
        const i32 exponent = static_cast<i32>((__float_as_uint(amax) + 0x1fffffu) >> 23) - 8;
        const u32 code = amax == 0.f ? 127u : static_cast<u32>(exponent < 1 ? 1 : exponent);
        return {__uint_as_float(code << 23), __uint_as_float((254u - code) << 23)};
    }
};

template <class H>
MM_DEVICE uint4 encode(const H& held, float inverse) {
    float v[kValues];
    held.get(v);
    u32 word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
        word[i] = ptx::cvt_e4m3x2(v[4 * i] * inverse, v[4 * i + 1] * inverse) |
                  ptx::cvt_e4m3x2(v[4 * i + 2] * inverse, v[4 * i + 3] * inverse) << 16;
    return make_uint4(word[0], word[1], word[2], word[3]);
}

}  // namespace megamoe::quant
