// Loads and stores with their state space, width and cache hint in the name; number conversions.
#pragma once
#include "megamoe/common/types.cuh"

namespace megamoe::ptx {

MM_DEVICE u32 smem_addr(const void* p) {
    return static_cast<u32>(__cvta_generic_to_shared(p));
}

// Address of the same shared-memory location in another CTA of the cluster.
MM_DEVICE u32 map_to_cta(u32 smem, u32 cta) {
    u32 v;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(v) : "r"(smem), "r"(cta));
    return v;
}

MM_DEVICE float ld_shared_f32(u32 a) {
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(a));
    return v;
}

// The same, computed anew: nobody keeps it in a register from one part of a kernel to the next.
MM_DEVICE u32 smem_addr_anew(const void* p) {
    u32 a;
    asm volatile("{\n .reg .u64 t;\n cvta.to.shared.u64 t, %1;\n cvt.u32.u64 %0, t;\n}\n" : "=r"(a) : "l"(p));
    return a;
}

MM_DEVICE int ld_shared_i32(u32 a) {
    int v;
    asm volatile("ld.shared.s32 %0, [%1];" : "=r"(v) : "r"(a));
    return v;
}

MM_DEVICE void st_shared_i32(u32 a, int v) {
    asm volatile("st.shared.s32 [%0], %1;" ::"r"(a), "r"(v) : "memory");
}

MM_DEVICE void st_shared_u16(u32 a, u32 v) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(a), "h"(static_cast<u16>(v)) : "memory");
}

MM_DEVICE void st_shared_v2(u32 a, u32 x, u32 y) {
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(a), "r"(x), "r"(y) : "memory");
}

MM_DEVICE void st_shared_f32(u32 a, float v) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(a), "f"(v) : "memory");
}

MM_DEVICE u64 ld_shared_u64(u32 a) {
    u64 v;
    asm volatile("ld.shared.u64 %0, [%1];" : "=l"(v) : "r"(a));
    return v;
}

MM_DEVICE uint2 ld_shared_v2(u32 a) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(a));
    return v;
}

MM_DEVICE float2 ld_shared_v2_f32(u32 a) {
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(a));
    return v;
}

MM_DEVICE void st_shared_v4(u32 a, uint4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(a), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

MM_DEVICE uint4 ld_shared_v4(u32 a) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(a));
    return v;
}

// Stores to a CTA of the cluster (address from map_to_cta) and counts the 16 bytes on a barrier of that CTA.
MM_DEVICE void st_async_v4_f32(u32 a, float x, float y, float z, float w, u32 bar) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(a),
        "f"(x), "f"(y), "f"(z), "f"(w), "r"(bar)
        : "memory");
}

// Four 8x8 matrices of 16-bit elements from registers to shared memory; lane i gives the address of row i % 8 of matrix
// i / 8.
MM_DEVICE void st_matrix_x4(u32 a, u32 r0, u32 r1, u32 r2, u32 r3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(a), "r"(r0), "r"(r1), "r"(r2),
                 "r"(r3)
                 : "memory");
}

MM_DEVICE float ld_global_nc_f32(const float* p) {
    float v;
    asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(v) : "l"(p));
    return v;
}

// A hint: the line comes into L2, its page into the TLBs, and nobody waits.
MM_DEVICE void prefetch_l2(const void* p) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p) : "memory");
}

// `otherwise` where `wanted` is false: nothing is read, and no branch taken.
MM_DEVICE float ld_global_nc_f32_if(bool wanted, const float* p, float otherwise) {
    asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %2, 0;\n @p ld.global.nc.f32 %0, [%1];\n}\n"
                 : "+f"(otherwise)
                 : "l"(p), "r"(static_cast<u32>(wanted)));
    return otherwise;
}

MM_DEVICE uint2 ld_global_nc_v2(const void* p) {
    uint2 v;
    asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}

MM_DEVICE float2 ld_global_nc_v2_f32(const float* p) {
    float2 v;
    asm volatile("ld.global.nc.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(p));
    return v;
}

// Past L1, which may hold what another device has overwritten since.
MM_DEVICE uint4 ld_global_cg_v4(const void* p) {
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
MM_DEVICE u32 ld_global_cg_u32(const u32* p) {
    u32 v;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}

// Nothing unless `valid`, without a branch.
MM_DEVICE void st_global_v4_if(void* p, uint4 v, bool valid) {
    asm volatile(
        "{\n .reg .pred p;\n setp.ne.b32 p, %5, 0;\n @p st.global.v4.u32 [%0], {%1, %2, %3, %4};\n}\n" ::"l"(p),
        "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(static_cast<u32>(valid))
        : "memory");
}
MM_DEVICE void st_global_f32_if(float* p, float v, bool valid) {
    asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %2, 0;\n @p st.global.f32 [%0], %1;\n}\n" ::"l"(p), "f"(v),
                 "r"(static_cast<u32>(valid))
                 : "memory");
}

MM_DEVICE void st_global_v4(void* p, uint4 v) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

MM_DEVICE void st_global_v2(void* p, uint2 v) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(v.x), "r"(v.y) : "memory");
}

MM_DEVICE void st_global_u32(void* p, u32 v) {
    asm volatile("st.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// Two fp32 to packed bf16, round to nearest even; lo stands in the low half.
MM_DEVICE u32 pack_bf16(float lo, float hi) {
    u32 v;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(hi), "f"(lo));
    return v;
}

}  // namespace megamoe::ptx
