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
MM_DEVICE void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// Until at most kPending of this thread's newest groups are on their way.
template <int kPending>
MM_DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace megamoe::ptx
