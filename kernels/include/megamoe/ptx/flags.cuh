// Words that ranks and CTAs signal with: order and scope are in the name (gpu: this device, sys: every device).
#pragma once
#include "megamoe/ptx/thread.cuh"

namespace megamoe::ptx {

MM_DEVICE u32 ld_acquire_gpu(const u32* p) {
    u32 v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
MM_DEVICE u32 ld_acquire_sys(const u32* p) {
    u32 v;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
MM_DEVICE u32 ld_relaxed_sys(const u32* p) {
    u32 v;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
MM_DEVICE void st_release_gpu(u32* p, u32 v) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
MM_DEVICE void st_relaxed_sys(u32* p, u32 v) {
    asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
MM_DEVICE void red_add_relaxed_sys(u32* p, u32 v) {
    asm volatile("red.relaxed.sys.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
MM_DEVICE void red_add_relaxed_gpu(u32* p, u32 v) {
    asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
MM_DEVICE void red_add_release_gpu(u32* p, u32 v) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
// Adds 1, by a lane that does not need the result yet. Additions ptxas gathers from the lanes of a warp, even if there
// is but one, and awaits what it then has to tell them; increments up to a limit it does not.
MM_DEVICE u32 atom_increment_relaxed_gpu(u32* p) {
    u32 old;
    asm volatile("atom.relaxed.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(~lane_zero()) : "memory");
    return old;
}
MM_DEVICE u32 atom_add_relaxed_gpu(u32* p, u32 v) {
    u32 old;
    asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
    return old;
}
MM_DEVICE u32 atom_add_acq_rel_gpu(u32* p, u32 v) {
    u32 old;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
    return old;
}
MM_DEVICE u32 atom_exchange_sys(u32* p, u32 v) {
    u32 old;
    asm volatile("atom.acq_rel.sys.global.exch.b32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
    return old;
}
MM_DEVICE void fence_acq_rel_sys() {
    asm volatile("fence.acq_rel.sys;" ::: "memory");
}

// Orders this thread's ordinary accesses with those of the copy engine and the tensor cores, in every memory.
MM_DEVICE void fence_proxy_async() {
    asm volatile("fence.proxy.async;" ::: "memory");
}

}  // namespace megamoe::ptx
