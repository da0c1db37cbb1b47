// The memory that comm/protocol.cuh runs on: this GPU's and its peers'.
#pragma once
#include "megamoe/ptx/flags.cuh"
#include "megamoe/ptx/memory.cuh"
#include "megamoe/ptx/thread.cuh"

namespace megamoe::comm {

struct GpuMemory {
    // Data under a flag, past L1.
    MM_DEVICE u32 load(const u32* p) const { return ptx::ld_global_cg_u32(p); }
    MM_DEVICE void store(u32* p, u32 v) const { *p = v; }
    MM_DEVICE u32 load_acquire(const u32* p) const { return ptx::ld_acquire_gpu(p); }
    MM_DEVICE u32 load_acquire_system(const u32* p) const { return ptx::ld_acquire_sys(p); }
    MM_DEVICE u32 load_relaxed(const u32* p) const { return ptx::ld_relaxed_sys(p); }
    MM_DEVICE void store_relaxed(u32* p, u32 v) const { ptx::st_relaxed_sys(p, v); }
    MM_DEVICE void store_relaxed_system(u32* p, u32 v) const { ptx::st_relaxed_sys(p, v); }
    MM_DEVICE void store_release(u32* p, u32 v) const { ptx::st_release_gpu(p, v); }
    MM_DEVICE u32 add(u32* p, u32 v) const { return ptx::atom_add_acq_rel_gpu(p, v); }
    MM_DEVICE void add_release(u32* p, u32 v) const { ptx::red_add_release_gpu(p, v); }
    MM_DEVICE void add_relaxed_system(u32* p, u32 v) const { ptx::red_add_relaxed_sys(p, v); }
    MM_DEVICE u32 exchange(u32* p, u32 v) const { return ptx::atom_exchange_sys(p, v); }
    MM_DEVICE void fence_system() const { ptx::fence_acq_rel_sys(); }
    MM_DEVICE u64 now_ns() const { return ptx::global_timer_ns(); }
    MM_DEVICE void pause() const {}
};

}  // namespace megamoe::comm
