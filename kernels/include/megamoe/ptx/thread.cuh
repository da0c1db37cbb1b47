// Special registers, election, register budgets, named barriers, clocks.
#pragma once
#include "megamoe/common/types.cuh"

namespace megamoe::ptx {

MM_DEVICE u32 cluster_cta_rank() {
    u32 v;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(v));
    return v;
}

// True in exactly one lane of a converged warp.
MM_DEVICE bool elect_one() {
    u32 p;
    asm volatile("{\n .reg .pred p;\n elect.sync _|p, 0xffffffff;\n selp.u32 %0, 1, 0, p;\n}\n" : "=r"(p));
    return p != 0;
}

template <int N>
MM_DEVICE void set_max_registers_up() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

template <int N>
MM_DEVICE void set_max_registers_down() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// Orders nothing: enough where barriers have their own fence, or where nobody reads what the other has written.
MM_DEVICE void cluster_arrive_relaxed() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
MM_DEVICE void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// `threads` threads (whole warps) meet at barrier `id`, 1 to 15; __syncthreads has 0.
MM_DEVICE void named_barrier_sync(u32 id, u32 threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// threadIdx.x, read anew: nobody keeps it in a register from one part of a kernel to the next.
MM_DEVICE u32 thread_index() {
    u32 v;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(v));
    return v;
}

MM_DEVICE u64 global_timer_ns() {
    u64 v;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(v));
    return v;
}

// Cycles of this multiprocessor, modulo 2^32.
MM_DEVICE u32 clock() {
    u32 v;
    asm volatile("mov.u32 %0, %%clock;" : "=r"(v));
    return v;
}

// Programmatic dependent launch: wait for the kernel before, let the kernel after start.
MM_DEVICE void grid_dependency_wait() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}
MM_DEVICE void grid_dependency_launch() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// 0 in every lane, which the compiler does not know: a value reached through it stays out of uniform registers.
MM_DEVICE u32 lane_zero() {
    u32 below;
    asm volatile("mov.u32 %0, %%lanemask_lt;" : "=r"(below));
    return __popc(below) / 32;
}

}  // namespace megamoe::ptx
