// Who needs which row: every CTA sorts its slice of the tokens by expert, together they lay out what each owner will
// get, and tell it. All threads of the CTA, before the roles part; shared memory is theirs alone here.
//
// Order inside an expert is whatever the atomics give: no row's result depends on its neighbours.
#pragma once
#include "megamoe/mega/context.cuh"

namespace megamoe::mega {

// A row to push, in this CTA's list: to which row of the region of its source at `owner`, whose expert `slot` is the
// first that needs it there.
struct alignas(16) Push {
    u32 token, row, owner, slot;
};

template <class C>
struct Dispatch {
    Context<C> x;
    u32 total_slots;  // R * S
    i32 first_token, end_token;
    u32 bank;

    // Shared arrays of total_slots + 1 each. kind 0 counts routes, 1 rows.
    MM_DEVICE u32* array(u32 which) const { return reinterpret_cast<u32*>(x.shared) + which * (total_slots + 1); }
    MM_DEVICE u32* slice(u32 kind) const { return array(kind); }    // this slice's counts, then its start in an expert
    MM_DEVICE u32* all(u32 kind) const { return array(2 + kind); }  // of all slices, then their exclusive sums
    // The slice's own order of pushing: rows of each (expert, owner), see turn(), then their exclusive sums.
    MM_DEVICE u32* order() const { return array(4); }
    // [tokens of the slice * K]: rank among the slice's routes to the expert | of its rows << 16.
    MM_DEVICE u32* ranks() const { return array(5); }

    MM_DEVICE explicit Dispatch(const Context<C>& context) : x(context) {
        total_slots = x.world() * x.slots();
        const i64 t = x.tokens;
        first_token = static_cast<i32>(t * x.cta / x.ctas), end_token = static_cast<i32>(t * (x.cta + 1) / x.ctas);
        bank = x.waits.epoch & 1;
    }

    // Every owner's first expert, then every owner's second, and so on; this rank itself first.
    MM_DEVICE u32 turn(u32 slot) const {
        const u32 owner = slot / x.slots(), after = owner >= x.rank() ? owner - x.rank() : owner + x.world() - x.rank();
        return slot % x.slots() * x.world() + after;
    }

    // Where this CTA's pushes are listed.
    static MM_DEVICE Push* list(const Context<C>& x) {
        const i64 first = static_cast<i64>(x.tokens) * x.cta / x.ctas;
        return x.template own<Push>(x.args.pushes) + first * x.args.max_copies;
    }

    MM_DEVICE u32* histogram(u32 which, u32 kind) const {
        return x.template own<u32>(x.args.histogram) + (which * 2 + kind) * total_slots;
    }

    // Returns the number of rows that this CTA has to push.
    MM_DEVICE u32 run() {
        const u32 tid = threadIdx.x;
        for (u32 i = tid; i < 2 * (total_slots + 1); i += kThreads) slice(0)[i] = 0;
        u32 *done = x.template own<u32>(x.args.tiles_done), *copied = x.template own<u32>(x.args.copied);
        for (u32 i = x.cta * kThreads + tid; i < static_cast<u32>(x.args.max_blocks); i += x.ctas * kThreads)
            done[i] = copied[i] = 0;
        if constexpr (C::row_scaled) {
            u32* cast = x.template own<u32>(x.args.casts_done);
            for (u32 i = x.cta * kThreads + tid; i < static_cast<u32>(x.args.max_blocks); i += x.ctas * kThreads)
                cast[i] = 0;
        }
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
    // A route of this slice: `route` of token t, and the head of those of t at the same owner, which stands for the
    // token's row there: the one of the lowest slot.
    struct Mine {
        i32 t, route, slot, head, head_slot;
        u32 owner;
    };

    // Number i of the slice's routes. A loop, not K * K comparisons in a row: instructions come from afar.
    MM_DEVICE Mine read(i32 i) const {
        const i32 t = first_token + i / C::routes, k = i % C::routes, slot = x.route_slot(t, k);
        Mine m{t, k, slot, k, slot, 0};
        if (slot < 0) return m;
        m.owner = slot / x.slots();
        const i32 first = m.owner * x.slots(), end = first + x.slots();
#pragma unroll 1
        for (i32 j = 0; j < C::routes; ++j) {
            const i32 other = x.route_slot(t, j);
            const bool same = other >= first && other < end;
            if (same && (other < m.head_slot || (other == m.head_slot && j < m.head))) m.head = j, m.head_slot = other;
        }
        return m;
    }

    MM_DEVICE i32 routes() const { return (end_token - first_token) * C::routes; }

    MM_DEVICE void count() {
#pragma unroll 1
        for (i32 i = threadIdx.x; i < routes(); i += kThreads) {
            const Mine m = read(i);
            if (m.slot < 0) {
                check(m.t, m.route);
                continue;
            }
            u32 rank = atomicAdd(&slice(0)[m.slot], 1u);
            if (m.head == m.route) rank |= atomicAdd(&slice(1)[m.slot], 1u) << 16;
            ranks()[i] = rank;
        }
    }

    // An index outside of [-1, E) contributes nothing and is reported.
    MM_DEVICE void check(i64 t, i32 k) const {
        const i64 i = t * C::top_k + k;
        const i64 e = C::index_64 ? static_cast<const i64*>(x.args.topk_idx)[i]
                                  : static_cast<i64>(static_cast<const i32*>(x.args.topk_idx)[i]);
        if (e != -1) x.control()->bad_index = 1;
    }

    // The slice's place among all slices; slice becomes its start, order()[.] the counts of its rows.
    MM_DEVICE void reserve() {
        for (u32 p = threadIdx.x; p < total_slots; p += kThreads) {
#pragma unroll
            for (u32 kind = 0; kind < 2; ++kind) {
                const u32 n = slice(kind)[p];
                if (kind == 1) order()[turn(p)] = n;
                if (n > 0) slice(kind)[p] = ptx::atom_add_relaxed_gpu(&histogram(bank, kind)[p], n);
            }
        }
    }

    // Exclusive sums in place, by one warp; the total goes behind the last. Returns it.
    MM_DEVICE u32 sum_up(u32* values) const {
        const u32 each = ceil_div(total_slots, static_cast<u32>(kWarpSize));
        const u32 begin = min_of(x.lane * each, total_slots), end = min_of(begin + each, total_slots);
        u32 sum = 0;
        for (u32 i = begin; i < end; ++i) sum += values[i];
        u32 before = sum;
#pragma unroll
        for (int step = 1; step < kWarpSize; step *= 2) {
            const u32 other = __shfl_up_sync(0xffffffffu, before, step);
            if (static_cast<int>(x.lane) >= step) before += other;
        }
        const u32 total = __shfl_sync(0xffffffffu, before, kWarpSize - 1);
        before -= sum;
        for (u32 i = begin; i < end; ++i) {
            const u32 n = values[i];
            values[i] = before;
            before += n;
        }
        if (x.lane == 0) values[total_slots] = total;
        return total;
    }

    MM_DEVICE u32 lay_out() {
        for (u32 i = threadIdx.x; i < 2 * total_slots; i += kThreads) {
            all(i / total_slots)[i % total_slots] = ptx::ld_global_cg_u32(&histogram(bank, 0)[i]);
            if (i % x.ctas == x.cta) histogram(bank ^ 1, 0)[i] = 0;  // for the next launch
        }
        __syncthreads();
        if (x.warp < 2) sum_up(all(x.warp));
        if (x.warp == 2) sum_up(order());
        __syncthreads();
        Push* pushes = list(x);
#pragma unroll 1
        for (i32 i = threadIdx.x; i < routes(); i += kThreads) {
            const Mine m = read(i);
            if (m.slot < 0) continue;
            const u32 start = m.owner * x.slots();
            const u32 at = all(0)[m.slot] - all(0)[start] + slice(0)[m.slot] + (ranks()[i] & 0xffffu);
            // The token's row at this owner goes with its first use there.
            const u32 rank = ranks()[i - m.route + m.head] >> 16;
            const u32 row = all(1)[m.head_slot] - all(1)[start] + slice(1)[m.head_slot] + rank;
            const float weight =
                m.route < C::top_k
                    ? static_cast<const float*>(x.args.topk_weights)[static_cast<i64>(m.t) * C::top_k + m.route]
                    : 1.f;
            const Route route{row, static_cast<u32>(m.t) * C::routes + m.route, weight, 0};
            Route* routes = x.template at<Route>(m.owner, x.args.routes) +
                            static_cast<i64>(x.rank()) * x.args.max_tokens * C::routes;
            ptx::st_global_v4(routes + at, *reinterpret_cast<const uint4*>(&route));
            if (m.head == m.route) {
                const Push push{static_cast<u32>(m.t), row, m.owner, m.slot % x.slots()};
                ptx::st_global_v4(pushes + order()[turn(m.slot)] + rank, *reinterpret_cast<const uint4*>(&push));
            }
        }
        return order()[total_slots];
    }

    // One CTA an owner.
    MM_DEVICE void tell() {
        for (u32 owner = x.cta; owner < x.world(); owner += x.ctas) {
            const u32 start = owner * x.slots();
            comm::tell(x.waits, x.template at<u32>(owner, x.args.offsets), x.template at<u32>(owner, x.args.targets),
                       x.template own<u32>(x.args.sent) + start, all(0) + start, all(1) + start, x.slots(), threadIdx.x,
                       kThreads);
        }
    }
};

}  // namespace megamoe::mega
