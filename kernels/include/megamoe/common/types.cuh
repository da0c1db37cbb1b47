// Integer names and small helpers that every device header may use. No other include, no assembly.
#pragma once

// Headers without PTX are also compiled as host C++, by tests.
#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define MM_DEVICE __device__ __forceinline__
#else
#define MM_DEVICE inline
#endif

namespace megamoe {

using i32 = int;
using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;
using u64 = unsigned long long;

template <class T>
MM_DEVICE constexpr T ceil_div(T a, T b) {
    return (a + b - 1) / b;
}

template <class T>
MM_DEVICE constexpr T min_of(T a, T b) {
    return a < b ? a : b;
}

template <class T>
MM_DEVICE constexpr T max_of(T a, T b) {
    return a < b ? b : a;
}

constexpr int kWarpSize = 32;
constexpr int kWarpgroupSize = 128;

// Element types of operands. A type is the variant: name, bytes, and which WGMMA takes it.
struct E4M3 {
    static constexpr int kBytes = 1;
};
struct BF16 {
    static constexpr int kBytes = 2;
};

}  // namespace megamoe
