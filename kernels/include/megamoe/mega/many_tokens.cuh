// Many tokens: every CTA sorts its slice, together they lay out what each owner will get, and each has its part in what
// owners are told.
#pragma once
#include "megamoe/mega/sorting.cuh"

namespace megamoe::mega {

template <class C>
struct ManyTokens : Sorting<C> {
    using Base = Sorting<C>;
    using Base::x;
    using typename Base::Mine;

    u32 total_slots;  // R * S
    u32* counted;     // of this launch, zero before: routes of each slot, then rows

    MM_DEVICE ManyTokens(const Context<C>& context, u32* histogram)
        : Base(context), total_slots(x.world() * x.slots()), counted(histogram) {}

    // Returns the number of rows that this CTA has to push.
    MM_DEVICE u32 run() {
        const u32 tid = threadIdx.x;
        for (u32 i = tid; i < 2 * (total_slots + 1); i += kThreads) slice(0)[i] = 0;
        __syncthreads();
        count();
        __syncthreads();
        reserve();
        __syncthreads();
        if (tid == 0) comm::grid_barrier(x.waits, x.control(), x.ctas);
        __syncthreads();
        if (x.waits.aborted()) return 0;
        const u32 pushes = lay_out();
        __syncthreads();
        tell();
        __syncthreads();
        if (tid == 0) comm::announce_headers(x.waits, x.control(), x.ctas, x.args.header_flags);
        return pushes;
    }

  private:
    // Shared arrays of total_slots + 1 each. kind 0 counts routes, 1 rows.
    MM_DEVICE u32* array(u32 which) const { return reinterpret_cast<u32*>(x.shared) + which * (total_slots + 1); }
    MM_DEVICE u32* slice(u32 kind) const { return array(kind); }    // this slice's counts, then its start in an expert
    MM_DEVICE u32* all(u32 kind) const { return array(2 + kind); }  // of all slices, then their exclusive sums
    // The slice's own order of pushing: rows of each (expert, owner), see turn(), then their exclusive sums.
    MM_DEVICE u32* order() const { return array(4); }
    // [tokens of the slice * K]: rank among the slice's routes to the expert | of its rows << 16.
    MM_DEVICE u32* ranks() const { return array(5); }

    // Every owner's first expert, then every owner's second, and so on; this rank itself first.
    MM_DEVICE u32 turn(u32 slot) const {
        const u32 owner = slot / x.slots(), after = owner >= x.rank() ? owner - x.rank() : owner + x.world() - x.rank();
        return slot % x.slots() * x.world() + after;
    }

    MM_DEVICE void count() {
#pragma unroll 1
        for (i32 i = threadIdx.x; i < this->routes(); i += kThreads) {
            const Mine m = this->read(this->first_token * C::routes + i);
            if (m.slot < 0) {
                this->check(m.t, m.route);
                continue;
            }
            u32 rank = atomicAdd(&slice(0)[m.slot], 1u);
            if (m.head == m.route) rank |= atomicAdd(&slice(1)[m.slot], 1u) << 16;
            ranks()[i] = rank;
        }
    }

    // The slice's place among all slices; slice becomes its start, order()[.] the counts of its rows.
    MM_DEVICE void reserve() {
        for (u32 p = threadIdx.x; p < total_slots; p += kThreads) {
#pragma unroll
            for (u32 kind = 0; kind < 2; ++kind) {
                const u32 n = slice(kind)[p];
                if (kind == 1) order()[turn(p)] = n;
                if (n > 0) slice(kind)[p] = ptx::atom_add_relaxed_gpu(&counted[kind * total_slots + p], n);
            }
        }
    }

    MM_DEVICE u32 lay_out() {
        for (u32 i = threadIdx.x; i < 2 * total_slots; i += kThreads)
            all(i / total_slots)[i % total_slots] = ptx::ld_global_cg_u32(&counted[i]);
        __syncthreads();
        if (x.warp < 2) this->sum_up(all(x.warp), total_slots);
        if (x.warp == 2) this->sum_up(order(), total_slots);
        __syncthreads();
        Push* pushes = Base::list(x);
#pragma unroll 1
        for (i32 i = threadIdx.x; i < this->routes(); i += kThreads) {
            const Mine m = this->read(this->first_token * C::routes + i);
            if (m.slot < 0) continue;
            const u32 start = m.owner * x.slots();
            // The number that the slice's route j, which goes to `slot` there, has among all of this rank at this
            // owner.
            auto number_at = [&](i32 slot, i32 j) {
                return all(0)[slot] - all(0)[start] + slice(0)[slot] + (ranks()[j] & 0xffffu);
            };
            const u32 at = number_at(m.slot, i);
            // The token's row at this owner goes with its first use there.
            const u32 rank = ranks()[i - m.route + m.head] >> 16;
            const u32 row = all(1)[m.head_slot] - all(1)[start] + slice(1)[m.head_slot] + rank;
            const i32 number = m.t * C::routes + m.route;
            u32 next = 0;
            if constexpr (C::partial_sums)
                next = this->next_of(
                    m, [&](i32 t, i32 k) { return x.route_slot(t, k); },
                    [&](i32 other, i32 k) { return number_at(other, i - m.route + k); });
            this->send_route(m.owner, at, row, number, this->weight_at(number), next);
            if (m.head == m.route) {
                const Push push{static_cast<u32>(m.t), row, m.owner, m.slot % x.slots()};
                ptx::st_global_v4(pushes + order()[turn(m.slot)] + rank, *reinterpret_cast<const uint4*>(&push));
            }
        }
        return order()[total_slots];
    }

    // One CTA an owner.
    MM_DEVICE void tell() {
        for (u32 owner = x.cta; owner < x.world(); owner += x.ctas)
            Base::tell(owner, all(0) + owner * x.slots(), all(1) + owner * x.slots());
    }
};

}  // namespace megamoe::mega
