// A ring of shared-memory stages between loaders and the math warps, possibly of every CTA of a cluster.
#pragma once
#include "megamoe/sync/wait.cuh"

namespace megamoe {

// full[s]: each loader arrives once, with the bytes it has asked for if copies complete them.
// empty[s]: each math warp of each CTA that receives the loader's copies arrives once.
template <int kStages, int kReaders>
struct Pipeline {
    static constexpr u32 kBytes = 2 * kStages * 8;
    u32 base;  // shared address of the barriers
    u32 stage = 0;
    u32 parity = 0;

    explicit MM_DEVICE Pipeline(u32 smem) : base(smem) {}

    MM_DEVICE u32 full(u32 s) const { return base + s * 8; }
    MM_DEVICE u32 empty(u32 s) const { return base + (kStages + s) * 8; }

    MM_DEVICE void init(u32 arrivals_per_reader, u32 loaders = 1) const {
        for (u32 s = 0; s < kStages; ++s) {
            ptx::mbarrier_init(full(s), loaders);
            ptx::mbarrier_init(empty(s), arrivals_per_reader * kReaders);
        }
    }

    MM_DEVICE void advance() {
        if (++stage == kStages) {
            stage = 0;
            parity ^= 1;
        }
    }

    // Whether the current stage is full by now; false may also mean "ask again".
    MM_DEVICE bool is_full() const { return ptx::mbarrier_test(full(stage), parity); }

    MM_DEVICE void wait_full(const WaitLimit& limit) const {
        wait_phase(full(stage), parity, WaitCode::kFull, stage, limit);
    }

    // The loader's first pass over the ring finds every stage empty: it waits for the phase before the first.
    MM_DEVICE void wait_empty(const WaitLimit& limit) const {
        wait_phase(empty(stage), parity ^ 1, WaitCode::kEmpty, stage, limit);
    }

    // The next `count` stages, given back unread, by all lanes of a math warp.
    MM_DEVICE void skip(i32 count, const WaitLimit& limit, u32 lane) {
        for (i32 i = 0; i < count; ++i) {
            wait_full(limit);
            release(stage, lane);
            advance();
        }
    }

    // By all lanes of a math warp that has finished reading stage s.
    MM_DEVICE void release(u32 s, u32 lane) const {
        if constexpr (kReaders == 1) {
            if (lane == 0) ptx::mbarrier_arrive(empty(s));
        } else {
            if (lane < kReaders) ptx::mbarrier_arrive_cluster(ptx::map_to_cta(empty(s), lane));
        }
    }
};

}  // namespace megamoe
