// Copies from global to shared memory by ordinary threads, without registers and without waiting.
#pragma once
#include "megamoe/common/types.cuh"

namespace megamoe::ptx {

// 16 bytes, past L1.
MM_DEVICE void cp_async_16(u32 smem, const void* p) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(smem), "l"(p) : "memory");
}
// 4 bytes, through L1: a sector holds eight of one row.
MM_DEVICE void cp_async_4(u32 smem, const void* p) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(smem), "l"(p) : "memory");
}
// Arrives at `bar` once all copies that this thread has asked for so far have landed; one of the arrivals it expects.
MM_DEVICE void cp_async_arrive(u32 bar) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(bar) : "memory");
}

}  // namespace megamoe::ptx
