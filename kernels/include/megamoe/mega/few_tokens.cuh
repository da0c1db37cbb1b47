// Few tokens: one CTA sorts all of them for an owner, and nobody waits for the other CTAs. A token's row at an owner
// has the token's number.
#pragma once
#include "megamoe/mega/sorting.cuh"

namespace megamoe::mega {

template <class C>
struct FewTokens : Sorting<C> {
    using Base = Sorting<C>;
    using Base::x;
    using typename Base::Mine;

    using Base::Base;

    // Returns the number of rows that this CTA has to push.
    MM_DEVICE u32 run() {
        u32* pushes = words();
        if (threadIdx.x == 0) *pushes = 0;
        __syncthreads();
        if (x.waits.aborted()) return 0;
        for (i32 i = threadIdx.x; i < this->routes(); i += kThreads) {
            const Mine m = this->read(this->first_token * C::routes + i);
            if (m.slot < 0) this->check(m.t, m.route);
            if (m.slot < 0 || m.head != m.route) continue;
            const Push push{static_cast<u32>(m.t), static_cast<u32>(m.t), m.owner, m.slot % x.slots()};
            ptx::st_global_v4(Base::list(x) + atomicAdd(pushes, 1u), *reinterpret_cast<const uint4*>(&push));
        }
        const u32 pushers = Base::pushers(x);
        const bool apart = pushers < x.ctas;  // the CTAs that sort are others
        for (u32 owner = apart ? x.cta - pushers : x.cta; owner < x.world() + apart; owner += x.ctas) sort_for(owner);
        __syncthreads();
        return *pushes;
    }

  private:
    MM_DEVICE u32* words() const { return reinterpret_cast<u32*>(x.shared); }

    // owner = R is a rehearsal: made-up routes, of which nobody is told, so that the instructions are there when the
    // other CTAs that sort have got their tokens' slots.
    MM_DEVICE void sort_for(u32 owner) {
        const bool real = owner < x.world();
        const u32 slots = x.slots(), first = owner * slots, tid = threadIdx.x;
        u32 *of_routes = words() + 1, *of_rows = of_routes + slots + 1, *rank = of_rows + slots + 1;
        i32* slot_of = reinterpret_cast<i32*>(rank + kFewRoutes);
        float* weight_of = reinterpret_cast<float*>(slot_of + kFewRoutes);
        for (u32 i = tid; i < 2 * (slots + 1); i += kThreads) of_routes[i] = 0;
        const i32 all = real ? x.tokens * C::routes : static_cast<i32>(kThreads);
        if (real) {
            if (tid < slots) ptx::prefetch_l2(x.template own<u32>(x.args.sent) + first + tid);
            fetch(all, slot_of, weight_of);
        } else {
            slot_of[tid] = first + tid % slots;
        }
        __syncthreads();
        auto at = [&](i32 t, i32 k) { return slot_of[t * C::routes + k]; };
#pragma unroll 1
        for (i32 i = tid; i < all; i += kThreads) {
            const u32 slot = slot_of[i] - first;
            if (slot >= slots) continue;
            rank[i] = atomicAdd(&of_routes[slot], 1u);
            const Mine m = this->read(i, at);
            if (m.head == m.route) atomicAdd(&of_rows[slot], 1u);
        }
        __syncthreads();
        if (x.warp < 2) this->sum_up(x.warp == 0 ? of_routes : of_rows, slots);
        __syncthreads();
        const u32 to = real ? owner : x.rank();  // nothing is stored in a rehearsal
#pragma unroll 1
        for (i32 i = tid; i < all; i += kThreads) {
            const u32 slot = slot_of[i] - first;
            if (slot >= slots) continue;
            u32 next = 0;
            if constexpr (C::partial_sums)
                next = this->next_of({i / C::routes, i % C::routes, 0, 0, 0, owner}, at, [&](i32 other, i32 k) {
                    return of_routes[other - first] + rank[i / C::routes * C::routes + k];
                });
            this->send_route(to, of_routes[slot] + rank[i], i / C::routes, i, weight_of[i], next, real);
        }
        if (real) this->tell(to, of_routes, of_rows);
        __syncthreads();
        if (tid == 0 && real) comm::announce_header(x.waits, to, x.args.header_flags);
    }

    // Slots and weights of all routes, which are few: all asked for before the first is there.
    MM_DEVICE void fetch(i32 all, i32* slot_of, float* weight_of) const {
        constexpr int kEach = ceil_div(kFewRoutes, static_cast<i32>(kThreads));
        i32 slot[kEach];
        float weight[kEach];
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
            const i32 i = threadIdx.x + j * kThreads;
            if (i < all) slot[j] = x.route_slot(i / C::routes, i % C::routes), weight[j] = this->weight_at(i);
        }
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
            const i32 i = threadIdx.x + j * kThreads;
            if (i < all) slot_of[i] = slot[j], weight_of[i] = weight[j];
        }
    }
};

}  // namespace megamoe::mega
