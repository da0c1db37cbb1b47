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

template <class C>
MM_DEVICE void entry(const Args& args) {
    using L = Layout<C>;
    extern __shared__ __align__(1024) u8 memory[];
    ptx::grid_dependency_wait();  // the launch before may still be writing what follows
    if (threadIdx.x == 0) {
        const u32 smem = ptx::smem_addr(memory);
        const auto* control = reinterpret_cast<const comm::Control*>(reinterpret_cast<u64>(args.own) + args.control);
        i32 tokens = args.num_tokens;
        if (args.device_tokens != nullptr)
            tokens = max_of(0, min_of(*static_cast<const i32*>(args.device_tokens), args.max_tokens));
        ptx::st_shared_i32(smem + L::kWordsAt + kTokens, tokens);
        ptx::st_shared_i32(smem + L::kWordsAt + kEpoch, ptx::ld_acquire_gpu(&control->epoch));
        for (const Word w : {kRingAbort, kAbort, kNextPush, kHeadersCame})
            ptx::st_shared_i32(smem + L::kWordsAt + w, 0);
        typename Context<C>::Ring(smem + L::kBarriersAt).init(kMathWarps);
        // Which epilogue comes first is a guess, from this rank's tokens.
        Notes<C>(smem).init(rehearsal(static_cast<i64>(tokens) * C::routes <= i64{args.slots} * kBlockRows / 2));
        ptx::mbarrier_init(smem + L::kWordsAt + kExchange, kMathWarps);
        ptx::mbarrier_init_fence();
    }
    auto here = [&] { return Context<C>::of(args, memory); };
    if (threadIdx.x < kWarpSize) {
        __syncwarp();
        Context<C> x = here();
        if (x.lane == 0) {
            x.waits.void_from_the_start();
            x.stamp(kStart);
        }
    }
    __syncthreads();
    const u32 pushes = Dispatch<C>{here()}.run();
    ptx::fence_proxy_async_shared();
    __syncthreads();  // the ring takes over the memory that the sort used

    const Context<C> x = here();
    const bool math = x.warp < kMathWarps;
    if (threadIdx.x == 0) x.stamp(kSorted);
    if (!math) {
        ptx::set_max_registers_down<kHelperRegisters<C>>();
        if (x.warp != kCopyFirst) Planner<C>{here()}.run();
        if (x.warp == kLoad && x.lane == 0) x.stamp(kToldPlan);
    }
    Stopwatch<C::trace> watch{x, kTrackLoad + x.warp - kLoad, !math && x.lane == 0};
    if (math || x.warp == kCopySecond) {
        watch.start();
        Pusher<C>{here()}.run(pushes, math);
        watch.stop(kCopyPush, comm::Unit{});
    }
    if (!math) {
        if (x.warp == kLoad) {
            const Context<C> loader = here();  // by all lanes
            if (ptx::elect_one()) Loader<C>{loader}.run();
            __syncwarp();
        } else if (x.warp == kLead) {
            Leader<C>{here()}.run();
        } else {
            Copier<C>{here(), watch}.run();
        }
        ptx::named_barrier_sync(kRolesDone, kThreads);
    } else {
        if (threadIdx.x == 0) x.stamp(kPushed);
        ptx::set_max_registers_up<kMathRegisters<C>>();
        Math<C>{here(), x.warp / 4, x.warp % 4}.run();
        if (threadIdx.x == 0) x.stamp(kMathDone);
        Combine<C>{here()}.run();
    }
    __syncthreads();
    ptx::grid_dependency_launch();
    if (threadIdx.x == 0) x.stamp(kEnd);
    Context<C> last = here();
    if (threadIdx.x == 0) comm::leave(last.waits, last.control(), last.ctas);
}

}  // namespace megamoe::mega
