// A warp on the CPU, or whole CTAs: threads that meet where the device's lanes do, and plain C++ for the instructions
// that some headers (mega/dispatch.cuh, push.cuh, pieces.cuh, cast_rows.cuh, combine.cuh) use. Between two meetings
// lanes run in any order.
#pragma once
#include <algorithm>
#include <array>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <limits>
#include <thread>
#include <vector>

#include "megamoe/common/types.cuh"

using namespace megamoe;

struct uint2 {
    u32 x, y;
};
struct uint4 {
    u32 x, y, z, w;
};
struct float4 {
    float x, y, z, w;
};

inline uint2 make_uint2(u32 x, u32 y) {
    return {x, y};
}
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) {
    return {x, y, z, w};
}
inline float4 make_float4(float x, float y, float z, float w) {
    return {x, y, z, w};
}

template <class To, class From>
To bits_of(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
inline float __uint_as_float(u32 v) {
    return bits_of<float>(v);
}
inline u32 __float_as_uint(float v) {
    return bits_of<u32>(v);
}
struct Warp {
    std::barrier<> all{32};
    std::array<std::barrier<>, 4> eighths{std::barrier<>(8), std::barrier<>(8), std::barrier<>(8), std::barrier<>(8)};
    std::array<u64, 32> box{};
};
inline thread_local Warp* warp_here = nullptr;
inline thread_local u32 lane_here = 0;
inline thread_local std::barrier<>* cta_here = nullptr;  // none: the role is a warp
struct ThreadIndex {
    u32 x;
};
inline thread_local ThreadIndex threadIdx{0};

// `body(lane)` by 32 threads.
template <class Body>
void run_warp(const Body& body) {
    Warp warp;
    std::vector<std::thread> lanes;
    for (u32 lane = 0; lane < 32; ++lane)
        lanes.emplace_back([&, lane] {
            warp_here = &warp;
            lane_here = threadIdx.x = lane;
            body(lane);
        });
    for (auto& lane : lanes) lane.join();
}

// `body(cta, thread)` by all `threads` of `ctas` CTAs.
template <class Body>
void run_ctas(u32 ctas, u32 threads, const Body& body) {
    std::deque<Warp> warps(ctas * threads / 32);
    std::deque<std::barrier<>> meet;
    for (u32 c = 0; c < ctas; ++c) meet.emplace_back(threads);
    std::vector<std::thread> all;
    for (u32 i = 0; i < ctas * threads; ++i)
        all.emplace_back([&, i] {
            cta_here = &meet[i / threads], warp_here = &warps[i / 32];
            lane_here = i % 32, threadIdx.x = i % threads;
            body(i / threads, i % threads);
        });
    for (auto& thread : all) thread.join();
}

inline void __syncwarp() {
    warp_here->all.arrive_and_wait();
}
inline void __syncthreads() {
    if (cta_here == nullptr) std::abort();
    cta_here->arrive_and_wait();
}

// Lane `from`'s value, among all lanes or the eight of a mask.
template <class T>
T exchange(u32 mask, T value, u32 from) {
    std::barrier<>& meet = mask == 0xffffffffu ? warp_here->all : warp_here->eighths[lane_here / 8];
    if (mask != 0xffffffffu && mask != 0xffu << (lane_here / 8 * 8)) std::abort();
    if constexpr (sizeof(T) == 4) {
        warp_here->box[lane_here] = bits_of<u32>(value);
    } else {
        warp_here->box[lane_here] = static_cast<u64>(value);
    }
    meet.arrive_and_wait();
    const u64 got = warp_here->box[from % 32];
    meet.arrive_and_wait();
    if constexpr (sizeof(T) == 4) {
        return bits_of<T>(static_cast<u32>(got));
    } else {
        return static_cast<T>(got);
    }
}
template <class T>
T __shfl_sync(u32 mask, T value, u32 from) {
    return exchange(mask, value, from);
}
template <class T>
T __shfl_xor_sync(u32 mask, T value, u32 step) {
    return exchange(mask, value, lane_here ^ step);
}
template <class T>
T __shfl_up_sync(u32 mask, T value, u32 step) {
    return exchange(mask, value, lane_here - step);
}
inline u32 __ballot_sync(u32 mask, bool mine) {
    u32 all = 0;
    for (u32 lane = 0; lane < 32; ++lane) all |= exchange(mask, static_cast<u32>(mine), lane) << lane;
    return all;
}
inline u32 __popc(u32 v) {
    return __builtin_popcount(v);
}
inline u32 __ffs(u32 v) {
    return __builtin_ffs(v);
}
inline u32 atomicAdd(u32* p, u32 v) {
    return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}

// Numbers. E4M3 as arXiv:2209.05433 has it: 448 is the largest, 0x7f is NaN.
inline float from_e4m3(u32 code) {
    const int exponent = code >> 3 & 15, fraction = code & 7;
    const float v = exponent == 0 ? std::ldexp(fraction / 8.f, -6) : std::ldexp(1 + fraction / 8.f, exponent - 7);
    return code & 0x80 ? -v : v;
}
inline u32 to_e4m3(float v) {
    if (std::isnan(v)) return 0x7f;
    const float a = std::min(std::fabs(v), 448.f);
    u32 best = 0;
    for (u32 code = 0; code < 0x7f; ++code) {
        const float d = std::fabs(from_e4m3(code) - a), least = std::fabs(from_e4m3(best) - a);
        if (d < least || (d == least && code % 2 == 0)) best = code;
    }
    return best | (std::signbit(v) ? 0x80 : 0);
}
inline float from_bf16(u32 bits) {
    return __uint_as_float(bits << 16);
}
inline u16 to_bf16(float v) {
    const u32 bits = __float_as_uint(v);
    return std::isnan(v) ? 0x7fc1 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

namespace megamoe {

struct WaitLimit {};  // nobody waits here but for copies (copies.hpp), which are there

namespace ptx {

inline void named_barrier_sync(u32, u32) {
    std::abort();  // these roles are warps
}
inline u32 cvt_e4m3x2(float lo, float hi) {
    return to_e4m3(lo) | to_e4m3(hi) << 8;
}
inline float rcp_approx(float v) {
    return 1.f / v;
}
inline float max_nan(float a, float b) {
    return std::isnan(a) || std::isnan(b) ? std::numeric_limits<float>::quiet_NaN() : std::max(a, b);
}
template <bool kKeepNan>
u32 max_magnitude_bf16x2(u32 a, u32 b) {
    u32 both = 0;
    for (int shift = 0; shift < 32; shift += 16) {
        const u32 x = a >> shift & 0xffff, y = b >> shift & 0xffff;
        const float u = std::fabs(from_bf16(x)), v = std::fabs(from_bf16(y));
        u32 larger = (u > v ? x : y) & 0x7fff;
        if (std::isnan(u) || std::isnan(v))
            larger = kKeepNan || (std::isnan(u) && std::isnan(v)) ? 0x7fff : (std::isnan(u) ? y : x) & 0x7fff;
        both |= (larger | ((x ^ y) & 0x8000)) << shift;
    }
    return both;
}

template <class T>
T load(const void* p) {
    if (reinterpret_cast<std::uintptr_t>(p) % sizeof(T)) std::abort();
    T v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <class T>
void store(void* p, T v) {
    if (reinterpret_cast<std::uintptr_t>(p) % sizeof(T)) std::abort();
    std::memcpy(p, &v, sizeof v);
}
inline uint4 ld_global_nc_v4(const void* p) {
    return load<uint4>(p);
}
inline uint4 ld_global_cg_v4(const void* p) {
    return load<uint4>(p);
}
inline uint2 ld_global_nc_v2(const void* p) {
    return load<uint2>(p);
}
inline float ld_global_nc_f32(const float* p) {
    return *p;
}
inline u32 ld_global_cg_u32(const u32* p) {
    return *p;
}
inline void st_global_v2(void* p, uint2 v) {
    store(p, v);
}
inline void st_global_v4(void* p, uint4 v) {
    store(p, v);
}
inline void st_global_v4_if(void* p, uint4 v, bool valid) {
    if (valid) store(p, v);
}
inline void prefetch_l2(const void*) {}
inline void st_global_u32(void* p, u32 v) {
    store(p, v);
}
inline u32 atom_add_relaxed_gpu(u32* p, u32 v) {
    return atomicAdd(p, v);
}

}  // namespace ptx
}  // namespace megamoe
