// What both ways of sorting tokens by expert share: a route's place in its token's row, exclusive sums, what owners
// get. All threads of the CTA, before the roles part; shared memory is theirs alone here.
//
// Order inside an expert is whatever the atomics give: no row's result depends on its neighbours.
#pragma once
#include "megamoe/mega/context.cuh"

namespace megamoe::mega {

constexpr i32 kFewRoutes = 1536;  // of a rank: at most, one CTA sorts all of them for an owner

// A row to push, in this CTA's list: to which row of the region of its source at `owner`, whose expert `slot` is the
// first that needs it there.
struct alignas(16) Push {
    u32 token, row, owner, slot;
};

template <class C>
struct Sorting {
    Context<C> x;
    i32 first_token, end_token;  // this CTA's slice

    MM_DEVICE explicit Sorting(const Context<C>& context)
        : x(context), first_token(first_of(x, x.cta)), end_token(first_of(x, x.cta + 1)) {}

    static MM_DEVICE bool few(const Context<C>& x) { return x.tokens * C::routes <= kFewRoutes; }

    // CTAs that have a slice of the tokens. Where tokens are few the last CTAs, one for each owner and one more, sort:
    // rows that they pushed, too, would be the last that everybody waits for.
    static MM_DEVICE u32 pushers(const Context<C>& x) {
        return few(x) && x.ctas > 2 * x.world() ? x.ctas - x.world() - 1 : x.ctas;
    }
    // 32 bits: T times the number of CTAs is less than 2^32.
    static MM_DEVICE i32 first_of(const Context<C>& x, u32 cta) {
        const u32 n = pushers(x);
        return static_cast<i32>(static_cast<u32>(x.tokens) * min_of(cta, n) / n);
    }

    MM_DEVICE i32 routes() const { return (end_token - first_token) * C::routes; }

    // Where this CTA's pushes are listed.
    static MM_DEVICE Push* list(const Context<C>& x) {
        return x.template own<Push>(x.args.pushes) + static_cast<i64>(first_of(x, x.cta)) * x.args.max_copies;
    }

    // A route: `route` of token t, and the head of those of t at the same owner, which stands for the
    // token's row there: the one of the lowest slot.
    struct Mine {
        i32 t, route, slot, head, head_slot;
        u32 owner;
    };

    // Number i of all routes. A loop, not K * K comparisons in a row: instructions come from afar.
    MM_DEVICE Mine read(i32 i) const {
        return read(i, [&](i32 t, i32 k) { return x.route_slot(t, k); });
    }
    template <class SlotAt>
    MM_DEVICE Mine read(i32 i, const SlotAt& slot_at) const {
        const i32 t = i / C::routes, k = i % C::routes, slot = slot_at(t, k);
        Mine m{t, k, slot, k, slot, 0};
        if (slot < 0) return m;
        m.owner = slot / x.slots();
        const i32 first = m.owner * x.slots(), end = first + x.slots();
#pragma unroll 1
        for (i32 j = 0; j < C::routes; ++j) {
            const i32 other = slot_at(t, j);
            const bool same = other >= first && other < end;
            if (same && (other < m.head_slot || (other == m.head_slot && j < m.head))) m.head = j, m.head_slot = other;
        }
        return m;
    }

    // Of number i of all routes.
    MM_DEVICE float weight_at(i32 i) const {
        const i32 t = i / C::routes, k = i % C::routes;
        return k < C::top_k ? static_cast<const float*>(x.args.topk_weights)[static_cast<i64>(t) * C::top_k + k] : 1.f;
    }

    // An index outside of [-1, E) contributes nothing and is reported.
    MM_DEVICE void check(i64 t, i32 k) const {
        const i64 i = t * C::top_k + k;
        const i64 e = C::index_64 ? static_cast<const i64*>(x.args.topk_idx)[i]
                                  : static_cast<i64>(static_cast<const i32*>(x.args.topk_idx)[i]);
        if (e != -1) x.control()->bad_index = 1;
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

    // Of a route that goes to `m.owner` (Route::next): which of its token's routes there comes behind it.
    // number_at(slot, k): the number that the token's k-th route has at its owner.
    template <class SlotAt, class NumberAt>
    MM_DEVICE u32 next_of(const Mine& m, const SlotAt& slot_at, const NumberAt& number_at) const {
        const i32 first = m.owner * x.slots(), end = first + x.slots();
        u32 found = kFirstHere;
#pragma unroll 1
        for (i32 j = 0; j < C::routes; ++j) {
            const i32 other = slot_at(m.t, j);
            if (other < first || other >= end || j == m.route) continue;
            if (j > m.route) return found | (number_at(other, j) + 1);
            found = 0;
        }
        return found;
    }

    // Number i of all routes, whose token's row at `owner` is `row`: number `at` of this rank's routes there.
    MM_DEVICE void send_route(u32 owner, u32 at, u32 row, i32 i, float weight, u32 next, bool valid = true) const {
        const Route route{row, static_cast<u32>(i), weight, next};
        Route* routes =
            x.template at<Route>(owner, x.args.routes) + static_cast<i64>(x.rank()) * x.args.max_tokens * C::routes;
        ptx::st_global_v4_if(routes + at, *reinterpret_cast<const uint4*>(&route), valid);
    }

    // What an owner has to know besides, from exclusive sums over its slots.
    MM_DEVICE void tell(u32 owner, const u32* of_routes, const u32* of_rows) {
        comm::tell(x.waits, x.template at<u32>(owner, x.args.offsets), x.template at<u32>(owner, x.args.targets),
                   x.template own<u32>(x.args.sent) + owner * x.slots(), of_routes, of_rows, x.slots(), threadIdx.x,
                   kThreads);
    }
};

}  // namespace megamoe::mega
