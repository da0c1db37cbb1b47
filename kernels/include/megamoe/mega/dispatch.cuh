// Who needs which row: sorts this rank's tokens by expert, and tells each owner what it will get. All threads of the
// CTA, before the roles part.
#pragma once
#include "megamoe/mega/few_tokens.cuh"
#include "megamoe/mega/many_tokens.cuh"

namespace megamoe::mega {

template <class C>
struct Dispatch {
    Context<C> x;

    // Returns the number of rows that this CTA has to push.
    MM_DEVICE u32 run() {
        const u32 bank = x.waits.epoch & 1;
        const u32 pushes = Sorting<C>::few(x) ? FewTokens<C>(x).run() : ManyTokens<C>(x, histogram(bank)).run();
        clear(bank ^ 1);
        return pushes;
    }

  private:
    // Routes of each slot of all ranks, then rows.
    MM_DEVICE u32* histogram(u32 bank) const {
        return x.template own<u32>(x.args.histogram) + bank * 2 * x.world() * x.slots();
    }

    // The next launch's counters, which nobody touches in this one. Last, so that no fence waits for these stores.
    MM_DEVICE void clear(u32 bank) const {
        const u32 blocks = x.args.max_blocks, begin = bank * blocks, step = x.ctas * kThreads;
        // The first and the last CTAs have more to do.
        const u32 first = (x.cta + x.ctas / 2) % x.ctas * kThreads + threadIdx.x;
        u32 *done = x.template own<u32>(x.args.tiles_done), *copied = x.template own<u32>(x.args.copied),
            *cast = x.template own<u32>(x.args.casts_done);
        for (u32 i = first; i < blocks; i += step) {
            done[begin + i] = copied[begin + i] = 0;
            if constexpr (C::row_scaled) cast[begin + i] = 0;
        }
        for (u32 i = first; i < 2 * x.world() * x.slots(); i += step) histogram(bank)[i] = 0;
    }
};

}  // namespace megamoe::mega
