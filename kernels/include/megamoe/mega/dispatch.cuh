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

// Up to so many routes of a rank are sorted by one CTA for each owner.
constexpr i32 kFewRoutes = 1536;

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
        const u32 pushes = x.tokens * C::routes <= kFewRoutes ? run_alone() : run_together();
        clear();
        return pushes;
    }

  private:
    // The next launch's counters, which nobody touches in this one. Last, so that no fence waits for these stores.
    MM_DEVICE void clear() const {
        const u32 blocks = x.args.max_blocks, begin = (bank ^ 1) * blocks, step = x.ctas * kThreads;
        const u32 first = (x.ctas - 1 - x.cta) * kThreads + threadIdx.x;
        u32 *done = x.template own<u32>(x.args.tiles_done), *copied = x.template own<u32>(x.args.copied),
            *cast = x.template own<u32>(x.args.casts_done);
        for (u32 i = first; i < blocks; i += step) {
            done[begin + i] = copied[begin + i] = 0;
            if constexpr (C::row_scaled) cast[begin + i] = 0;
        }
        for (u32 i = first; i < 2 * total_slots; i += step) histogram(bank ^ 1, 0)[i] = 0;
    }

    // Every CTA sorts its slice, all meet, and each has its part in what owners are told.
    MM_DEVICE u32 run_together() {
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

    // Few tokens: one CTA sorts all of them for an owner, and nobody waits for the other CTAs. A token's row at an
    // owner has the token's number.
    MM_DEVICE u32 run_alone() {
        u32* pushes = array(0);
        if (threadIdx.x == 0) *pushes = 0;
        __syncthreads();
        if (x.waits.aborted()) return 0;
        for (i32 i = threadIdx.x; i < routes(); i += kThreads) {
            const Mine m = read(first_token * C::routes + i);
            if (m.slot < 0) check(m.t, m.route);
            if (m.slot < 0 || m.head != m.route) continue;
            const Push push{static_cast<u32>(m.t), static_cast<u32>(m.t), m.owner, m.slot % x.slots()};
            ptx::st_global_v4(list(x) + atomicAdd(pushes, 1u), *reinterpret_cast<const uint4*>(&push));
        }
        for (u32 owner = x.cta; owner < x.world(); owner += x.ctas) sort_for(owner);
        __syncthreads();
        return *pushes;
    }

    MM_DEVICE void sort_for(u32 owner) {
        const u32 slots = x.slots(), first = owner * slots, tid = threadIdx.x;
        u32 *of_routes = array(0) + 1, *of_rows = of_routes + slots + 1, *rank = of_rows + slots + 1;
        for (u32 i = tid; i < 2 * (slots + 1); i += kThreads) of_routes[i] = 0;
        __syncthreads();
        const i32 all = x.tokens * C::routes;
#pragma unroll 1
        for (i32 i = tid; i < all; i += kThreads) {
            const u32 slot = slot_at(i) - first;
            if (slot >= slots) continue;
            rank[i] = atomicAdd(&of_routes[slot], 1u);
            const Mine m = read(i);
            if (m.head == m.route) atomicAdd(&of_rows[slot], 1u);
        }
        __syncthreads();
        if (x.warp < 2) sum_up(x.warp == 0 ? of_routes : of_rows, slots);
        __syncthreads();
#pragma unroll 1
        for (i32 i = tid; i < all; i += kThreads) {
            const u32 slot = slot_at(i) - first;
            const i32 t = i / C::routes;
            if (slot < slots) send_route(owner, of_routes[slot] + rank[i], t, t, i % C::routes);
        }
        tell(owner, of_routes, of_rows);
        __syncthreads();
        if (tid == 0) comm::announce_header(x.waits, owner, x.args.header_flags);
    }

    // Of number i of all routes; 0xffffffff for none.
    MM_DEVICE u32 slot_at(i32 i) const { return x.route_slot(i / C::routes, i % C::routes); }

    // A route: `route` of token t, and the head of those of t at the same owner, which stands for the
    // token's row there: the one of the lowest slot.
    struct Mine {
        i32 t, route, slot, head, head_slot;
        u32 owner;
    };

    // Number i of all routes. A loop, not K * K comparisons in a row: instructions come from afar.
    MM_DEVICE Mine read(i32 i) const {
        const i32 t = i / C::routes, k = i % C::routes, slot = x.route_slot(t, k);
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
            const Mine m = read(first_token * C::routes + i);
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

    // Exclusive sums of n values in place, by one warp; the total goes behind the last.
    MM_DEVICE void sum_up(u32* values, u32 n_values) const {
        const u32 each = ceil_div(n_values, static_cast<u32>(kWarpSize));
        const u32 begin = min_of(x.lane * each, n_values), end = min_of(begin + each, n_values);
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
        if (x.lane == 0) values[n_values] = total;
    }

    MM_DEVICE u32 lay_out() {
        for (u32 i = threadIdx.x; i < 2 * total_slots; i += kThreads)
            all(i / total_slots)[i % total_slots] = ptx::ld_global_cg_u32(&histogram(bank, 0)[i]);
        __syncthreads();
        if (x.warp < 2) sum_up(all(x.warp), total_slots);
        if (x.warp == 2) sum_up(order(), total_slots);
        __syncthreads();
        Push* pushes = list(x);
#pragma unroll 1
        for (i32 i = threadIdx.x; i < routes(); i += kThreads) {
            const Mine m = read(first_token * C::routes + i);
            if (m.slot < 0) continue;
            const u32 start = m.owner * x.slots();
            const u32 at = all(0)[m.slot] - all(0)[start] + slice(0)[m.slot] + (ranks()[i] & 0xffffu);
            // The token's row at this owner goes with its first use there.
            const u32 rank = ranks()[i - m.route + m.head] >> 16;
            const u32 row = all(1)[m.head_slot] - all(1)[start] + slice(1)[m.head_slot] + rank;
            send_route(m.owner, at, row, m.t, m.route);
            if (m.head == m.route) {
                const Push push{static_cast<u32>(m.t), row, m.owner, m.slot % x.slots()};
                ptx::st_global_v4(pushes + order()[turn(m.slot)] + rank, *reinterpret_cast<const uint4*>(&push));
            }
        }
        return order()[total_slots];
    }

    // Route k of token t, whose row at `owner` is `row`: number `at` of this rank's routes there.
    MM_DEVICE void send_route(u32 owner, u32 at, u32 row, i32 t, i32 k) const {
        const float weight =
            k < C::top_k ? static_cast<const float*>(x.args.topk_weights)[static_cast<i64>(t) * C::top_k + k] : 1.f;
        const Route route{row, static_cast<u32>(t) * C::routes + k, weight, 0};
        Route* routes =
            x.template at<Route>(owner, x.args.routes) + static_cast<i64>(x.rank()) * x.args.max_tokens * C::routes;
        ptx::st_global_v4(routes + at, *reinterpret_cast<const uint4*>(&route));
    }

    // One CTA an owner.
    MM_DEVICE void tell() {
        for (u32 owner = x.cta; owner < x.world(); owner += x.ctas)
            tell(owner, all(0) + owner * x.slots(), all(1) + owner * x.slots());
    }
    MM_DEVICE void tell(u32 owner, const u32* of_routes, const u32* of_rows) {
        comm::tell(x.waits, x.template at<u32>(owner, x.args.offsets), x.template at<u32>(owner, x.args.targets),
                   x.template own<u32>(x.args.sent) + owner * x.slots(), of_routes, of_rows, x.slots(), threadIdx.x,
                   kThreads);
    }
};

}  // namespace megamoe::mega
