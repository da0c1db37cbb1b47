// Waits that end. A wait that lasts longer than the limit writes one record, raises the CTA's abort word, and from then
// on every wait of the CTA returns at once: the kernel runs out, its output is void, and the host raises.
#pragma once
#include "megamoe/ptx/mbarrier.cuh"
#include "megamoe/ptx/memory.cuh"
#include "megamoe/ptx/thread.cuh"

namespace megamoe {

// What the host reads after a wait has expired; `code` stays 0 while all is well.
struct WaitRecord {
    u32 code;    // which wait: a WaitCode
    u32 block;   // blockIdx.x
    u32 stage;   // pipeline stage
    u32 parity;  // phase parity that was awaited
};

// kOffsets is no wait: `block` is the index of an offset, `stage` the offset, which is not what it must be.
enum class WaitCode : u32 { kNone = 0, kFull = 1, kEmpty = 2, kSums = 3, kOffsets = 4 };

struct WaitLimit {
    u32 abort_word;  // shared address
    u64 limit_ns;
    WaitRecord* record;  // host-mapped; never null
};

MM_DEVICE void wait_phase(u32 bar, u32 parity, WaitCode code, u32 stage, const WaitLimit& limit) {
    if (ptx::mbarrier_try_wait(bar, parity)) return;
    const u64 start = ptx::global_timer_ns();
    while (!ptx::mbarrier_try_wait(bar, parity)) {
        if (ptx::ld_shared_i32(limit.abort_word) != 0) return;
        if (ptx::global_timer_ns() - start > limit.limit_ns) {
            ptx::st_shared_i32(limit.abort_word, 1);
            *limit.record = WaitRecord{static_cast<u32>(code), blockIdx.x, stage, parity};
            return;
        }
    }
}

}  // namespace megamoe
