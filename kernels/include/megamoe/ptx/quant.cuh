// Instructions of the casts: conversion to E4M3, minima and maxima that keep NaN, fast exponentials, streaming
// accesses.
#pragma once
#include "megamoe/common/types.cuh"

namespace megamoe::ptx {

// Two fp32 to two E4M3 bytes, nearest even, beyond +-448 to +-448, NaN to 0x7F; lo stands in the low byte.
MM_DEVICE u32 cvt_e4m3x2(float lo, float hi) {
    u16 v;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(v) : "f"(hi), "f"(lo));
    return v;
}

// Unlike fmaxf and fminf: NaN if either is NaN.
MM_DEVICE float max_nan(float a, float b) {
    float v;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
    return v;
}

MM_DEVICE float min_nan(float a, float b) {
    float v;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
    return v;
}

// Larger magnitudes of two pairs of bf16, with the product's sign (one instruction; abs would take two more). With
// kKeepNan NaN if either is NaN, else the other.
template <bool kKeepNan>
MM_DEVICE u32 max_magnitude_bf16x2(u32 a, u32 b) {
    u32 v;
    if constexpr (kKeepNan)
        asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));
    else
        asm("max.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));
    return v;
}

// One instruction each: without .ftz five, which scale denormal arguments and results. Here a denormal is as good as 0:
// added to 1 in one case, a sigmoid below 2^-126 in the other.
MM_DEVICE float ex2_approx(float x) {
    float v;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(v) : "f"(x));
    return v;
}

MM_DEVICE float rcp_approx(float x) {
    float v;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(v) : "f"(x));
    return v;
}

// 16 bytes that this kernel only reads.
MM_DEVICE uint4 ld_global_nc_v4(const void* p) {
    uint4 v;
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

}  // namespace megamoe::ptx
