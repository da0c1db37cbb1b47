// The mega-kernel: one MoE layer on one rank, in one launch. Read it top to bottom: what every CTA does with all its
// threads (sort its tokens, tell the owners), then who does what, then the sum.
#pragma once
#include "megamoe/mega/combine.cuh"
#include "megamoe/mega/copy.cuh"
#include "megamoe/mega/dispatch.cuh"
#include "megamoe/mega/lead.cuh"
#include "megamoe/mega/load.cuh"
#include "megamoe/mega/math.cuh"
#include "megamoe/mega/push.cuh"

namespace megamoe::mega {

// Rows that all warps of a CTA send before anything is multiplied: what the first experts need. One warp sends the
// rest.
constexpr u32 kPushedFirst = 64;

template <class C>
MM_DEVICE void push_first(const Context<C>& x, u32 rows) {
    const u32 each = min_of(ceil_div(rows, kWarps), u32{Pusher<C>::kBatch});
    for (u32 i = x.warp * each; i < rows; i += kWarps * each) Pusher<C>{x}.send(i, min_of(i + each, rows));
}

template <class C>
MM_DEVICE void entry(const Args& args) {
    using L = Layout<C>;
    extern __shared__ __align__(1024) u8 memory[];
    ptx::grid_dependency_wait();  // the launch before may still be writing what follows
    const u32 smem = ptx::smem_addr(memory);
    const u32 warp = __shfl_sync(0xffffffffu, threadIdx.x / kWarpSize, 0), lane = threadIdx.x % kWarpSize;
    const u64 own = reinterpret_cast<u64>(args.own);
    const auto* control = reinterpret_cast<const comm::Control*>(own + args.control);

    Context<C> x{args, memory, smem, warp, lane, args.num_tokens, blockIdx.x, gridDim.x,
                 // Loaders wait for other ranks; what waits for loaders has to be more patient.
                 WaitLimit{smem + L::kWordsAt + kRingAbort, 2 * args.limit_ns + 1000000000ull,
                           static_cast<WaitRecord*>(args.ring_record)},
                 comm::Waits<comm::GpuMemory>{
                     {},
                     static_cast<const u64*>(args.bases),
                     static_cast<u64>(args.abort),
                     reinterpret_cast<volatile u32*>(memory + L::kWordsAt + kAbort),
                     args.limit_ns,
                     static_cast<comm::Record*>(args.record),
                     static_cast<u32>(args.rank),
                     static_cast<u32>(args.world),
                     blockIdx.x,
                     ptx::ld_acquire_gpu(&control->epoch),
                 }};
    if (args.device_tokens != nullptr) {
        const i32 n = *static_cast<const i32*>(args.device_tokens);
        x.tokens = n < 0 ? 0 : min_of(n, args.max_tokens);
    }
    if (threadIdx.x == 0) {
        typename Context<C>::Ring(smem + L::kBarriersAt).init(kMathWarps);
        Notes<C>(smem).init();
        ptx::mbarrier_init(x.exchange(), kMathWarps);
        *x.word(kRingAbort) = 0;
        *x.word(kAbort) = 0;
        ptx::mbarrier_init_fence();
        x.waits.void_from_the_start();
    }
    __syncthreads();
    if (threadIdx.x == 0) x.stamp(kStart);
    const u32 pushes = Dispatch<C>(x).run();
    if (threadIdx.x == 0) x.stamp(kSorted);
    push_first<C>(x, min_of(pushes, kPushedFirst));
    if (threadIdx.x == 0) x.stamp(kPushed);
    ptx::fence_proxy_async_shared();
    __syncthreads();  // the ring takes over the memory that the sort used

    if (warp >= kMathWarps) {
        ptx::set_max_registers_down<kHelperRegisters>();
        Planner<C>{x}.run();
        ptx::named_barrier_sync(kPlanned, kThreads);
        if (warp == kLoad) {
            if (lane == 0) x.stamp(kToldPlan);
            if (ptx::elect_one()) Loader<C>{x}.run();
            __syncwarp();
        } else if (warp == kLead) {
            Leader<C>{x}.run();
        } else {
            Stopwatch<C::trace> watch{x, kTrackLoad + warp - kLoad, lane == 0};
            if (warp == kCopySecond) {
                watch.start();
                Pusher<C>{x}.run(kPushedFirst, pushes);
                watch.stop(kCopyPush, comm::Unit{});
            }
            Copier<C>{x, watch}.run();
        }
        ptx::named_barrier_sync(kRolesDone, kThreads);
    } else {
        ptx::set_max_registers_up<kMathRegisters>();
        ptx::named_barrier_sync(kPlanned, kThreads);
        Math<C>{x, warp / 4, warp % 4}.run();
        if (threadIdx.x == 0) x.stamp(kMathDone);
        Combine<C>{x}.run();
    }
    __syncthreads();
    ptx::grid_dependency_launch();
    if (threadIdx.x == 0) x.stamp(kEnd);
    if (threadIdx.x == 0) comm::leave(x.waits, x.control(), x.ctas);
}

}  // namespace megamoe::mega
