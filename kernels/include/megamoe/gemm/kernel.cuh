// D = A x B for A [M, K] and B [G, K, N], either operand contiguous along K or, in bf16, along M or N: one persistent
// kernel, a loader warp and two or three math warpgroups.
//
// Read layout.cuh (shared memory), load.cuh, math.cuh, then the entry below. `Config` is generated from GemmConfig
// (kernels/gemm/config.py), `Args` with it.
#pragma once
#include "megamoe/gemm/load.cuh"
#include "megamoe/gemm/math.cuh"

namespace megamoe::gemm {

// Scales along a grouped K belong to blocks of 128, so groups must start at multiples of 128. The host cannot see the
// offsets without waiting: it reads this record before its next call. By one whole warp; the first such offset is told.
template <int kAlign>
MM_DEVICE void refuse_odd_offsets(const Args& args, u32 lane) {
    const int* table = static_cast<const int*>(args.table);
    for (i32 first = 0; first <= args.num_groups; first += kWarpSize) {
        const i32 i = first + static_cast<i32>(lane), offset = i <= args.num_groups ? table[i] : 0;
        const u32 odd = __ballot_sync(0xffffffffu, offset % kAlign != 0);
        if (odd == 0) continue;
        if (lane == static_cast<u32>(__ffs(odd)) - 1)
            *static_cast<WaitRecord*>(args.record) =
                WaitRecord{static_cast<u32>(WaitCode::kOffsets), static_cast<u32>(i), static_cast<u32>(offset), 0};
        break;
    }
    __syncwarp();
}

template <class C>
MM_DEVICE void entry(const Args& args) {
    using L = Layout<C>;
    extern __shared__ __align__(1024) u8 memory[];
    const u32 smem = ptx::smem_addr(memory);
    const u32 warp = __shfl_sync(0xffffffffu, threadIdx.x / kWarpSize, 0), lane = threadIdx.x % kWarpSize;
    const u32 cta = C::cluster > 1 ? ptx::cluster_cta_rank() : 0;

    typename C::Grouping grouping{static_cast<const int*>(args.table), args.m, args.max_m};
    Context<C> x{args,
                 smem,
                 cta,
                 typename Context<C>::Pipe(smem + L::kBarriersAt),
                 WaitLimit{smem + L::kAbortAt, args.limit_ns, static_cast<WaitRecord*>(args.record)},
                 typename Context<C>::Sched(grouping, args.num_groups, args.n, args.num_kb, cta)};
    if (threadIdx.x == 0) {
        x.pipe.init(L::kMathWarps);
        if constexpr (L::kSplitK) {
            // Sums of every CTA for the groups of 8 columns that this one collects, 16 bytes a math thread each.
            const u32 groups = (L::kCols / 8 - cta + C::cluster - 1) / C::cluster;
            ptx::mbarrier_init(smem + L::kSumsBarrierAt, 1);
            ptx::mbarrier_arrive_expect_tx(smem + L::kSumsBarrierAt, groups * C::cluster * L::kMathThreads * 16);
        }
        ptx::st_shared_i32(smem + L::kAbortAt, 0);
        ptx::mbarrier_init_fence();
    }
    if (warp == L::kMathWarps && lane == 0) {
        ptx::prefetch_tensor_map(&args.map_a);
        ptx::prefetch_tensor_map(&args.map_b);
        if (L::kScaled) ptx::prefetch_tensor_map(&args.map_sfa);
    }
    __syncthreads();
    if constexpr (C::cluster > 1) {
        ptx::cluster_arrive_relaxed();
        ptx::cluster_wait();
    }
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();

    if (warp >= L::kMathWarps) {
        ptx::set_max_registers_down<L::kLoaderRegisters>();
        if (warp == L::kMathWarps && ptx::elect_one()) load<C>(x);
        if constexpr (C::Grouping::kByK && L::kScaled)
            if (blockIdx.x == 0 && warp == L::kMathWarps + 1) refuse_odd_offsets<C::Grouping::kBeginAlign>(args, lane);
    } else {
        ptx::set_max_registers_up<L::kMathRegisters>();
        Math<C>{x, warp / 4, warp % 4, lane}.run();
        if (C::async_store && lane == 0) ptx::bulk_wait_read();
    }
    // No CTA leaves while another may still write to its stages or arrive on its barriers.
    if constexpr (C::cluster > 1) {
        ptx::cluster_arrive_relaxed();
        ptx::cluster_wait();
    }
}

}  // namespace megamoe::gemm
