// Who needs which row: every CTA sorts its slice of the tokens by expert, together they lay out what each owner will
// get, and tell it. All threads of the CTA, before the roles part; shared memory is theirs alone here.
//
// Order inside an expert is whatever the atomics give: no row's result depends on its neighbours.
#pragma once
#include "megamoe/mega/context.cuh"

namespace megamoe::mega {

// A row to push, in this CTA's list.
struct alignas(16) Push {
    u32 token, row, slot, unused;  // row of the region at the owner of `slot`, the first that needs it there
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
    MM_DEVICE u32* order() const { return array(4); }               // the slice's own order of pushing
    // [tokens of the slice * K]: rank among the slice's routes to the expert | of its rows << 16.
    MM_DEVICE u32* ranks() const { return array(5); }

    MM_DEVICE explicit Dispatch(const Context<C>& context) : x(context) {
        total_slots = x.world() * x.slots();
        const i64 t = x.tokens;
        first_token = static_cast<i32>(t * x.cta / x.ctas), end_token = static_cast<i32>(t * (x.cta + 1) / x.ctas);
        bank = x.waits.epoch & 1;
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
            const u32 strips = x.args.max_blocks * kMathWarps;
            for (u32 i = x.cta * kThreads + tid; i < strips; i += x.ctas * kThreads)
                x.template own<u32>(x.args.strips_done)[i] = 0;
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
    // A token's routes. head: which of them is the first, in the order of slots, at the same owner.
    struct Token {
        i32 slot[C::routes], owner[C::routes], head[C::routes], head_slot[C::routes];
    };

    MM_DEVICE Token read(i32 t) const {
        Token token;
        const i32 slots = static_cast<i32>(x.slots());
#pragma unroll
        for (int k = 0; k < C::routes; ++k) {
            token.slot[k] = x.route_slot(t, k);
            token.owner[k] = token.slot[k] < 0 ? -1 : token.slot[k] / slots;
        }
#pragma unroll
        for (int k = 0; k < C::routes; ++k) {
            token.head[k] = -1;
#pragma unroll
            for (int j = 0; j < C::routes; ++j)
                if (token.owner[j] == token.owner[k] && (token.head[k] < 0 || token.slot[j] < token.head_slot[k]))
                    token.head[k] = j, token.head_slot[k] = token.slot[j];
        }
        return token;
    }

    MM_DEVICE void count() {
        for (i32 t = first_token + threadIdx.x; t < end_token; t += kThreads) {
            const Token token = read(t);
#pragma unroll
            for (int k = 0; k < C::routes; ++k) {
                const i32 s = token.slot[k];
                if (s < 0) {
                    check(t, k);
                    continue;
                }
                u32 rank = atomicAdd(&slice(0)[s], 1u);
                if (token.head[k] == k) rank |= atomicAdd(&slice(1)[s], 1u) << 16;
                ranks()[(t - first_token) * C::routes + k] = rank;
            }
        }
    }

    // An index outside of [-1, E) contributes nothing and is reported.
    MM_DEVICE void check(i64 t, int k) const {
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
                if (kind == 1) order()[p] = n;
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
        for (i32 t = first_token + threadIdx.x; t < end_token; t += kThreads) {
            const Token token = read(t);
#pragma unroll
            for (int k = 0; k < C::routes; ++k) {
                const i32 s = token.slot[k];
                if (s < 0) continue;
                const u32 owner = token.owner[k], start = owner * x.slots();
                const u32 at = all(0)[s] - all(0)[start] + slice(0)[s] + (rank_of(t, k) & 0xffffu);
                // The token's row at this owner goes with its first use there.
                const u32 head = token.head_slot[k], rank = rank_of(t, token.head[k]) >> 16;
                const u32 row = all(1)[head] - all(1)[start] + slice(1)[head] + rank;
                const float weight =
                    k < C::top_k ? static_cast<const float*>(x.args.topk_weights)[static_cast<i64>(t) * C::top_k + k]
                                 : 1.f;
                const Route route{row, static_cast<u32>(t) * C::routes + k, weight, 0};
                Route* routes = x.template at<Route>(owner, x.args.routes) +
                                static_cast<i64>(x.rank()) * x.args.max_tokens * C::routes;
                ptx::st_global_v4(routes + at, *reinterpret_cast<const uint4*>(&route));
                if (token.head[k] == k) {
                    const Push push{static_cast<u32>(t), row, head, 0};
                    ptx::st_global_v4(pushes + order()[head] + rank, *reinterpret_cast<const uint4*>(&push));
                }
            }
        }
        return order()[total_slots];
    }

    MM_DEVICE u32 rank_of(i32 t, int k) const { return ranks()[(t - first_token) * C::routes + k]; }

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
