// Who computes what, in which order: the table behind comm/order.cuh, made by the helper warps of every CTA alike from
// what the sources have told.
#pragma once
#include "megamoe/comm/order.cuh"
#include "megamoe/mega/context.cuh"
#include "megamoe/ptx/tma.cuh"

namespace megamoe::mega {

// In shared memory, arrays of max_slots each.
template <class C>
MM_DEVICE comm::Table table_of(const Context<C>& x) {
    u32* p = reinterpret_cast<u32*>(x.shared + Layout<C>::kTableAt);
    constexpr u32 n = C::max_slots;
    return {p, p + n, p + 2 * n, p + 3 * n, p + 4 * n};
}

// The lanes of this warp.
struct WarpLanes {
    static constexpr u32 kCount = kWarpSize;
    u32 index;

    MM_DEVICE u32 lane() const { return index; }
    MM_DEVICE u32 inclusive_sum(u32 v) const {
#pragma unroll
        for (int step = 1; step < kWarpSize; step *= 2) {
            const u32 other = __shfl_up_sync(0xffffffffu, v, step);
            if (static_cast<int>(index) >= step) v += other;
        }
        return v;
    }
    MM_DEVICE u32 ballot(bool b) const { return __ballot_sync(0xffffffffu, b); }
    MM_DEVICE u32 before(u32 mask) const { return __popc(mask & ((1u << index) - 1)); }
    MM_DEVICE u32 count(u32 mask) const { return __popc(mask); }
    MM_DEVICE u32 last(u32 v) const { return __shfl_sync(0xffffffffu, v, kWarpSize - 1); }
    MM_DEVICE void sync() const { __syncwarp(); }
};

// Where the routes of source `s` to expert `e` start among all that it sent here, e up to the number of slots.
template <class C>
MM_DEVICE u32 routes_before(const Context<C>& x, u32 s, u32 e) {
    return reinterpret_cast<const u32*>(x.shared + Layout<C>::kOffsetsAt)[s * (x.slots() + 1) + e];
}

// Of a tile's weights, a row for each of its columns, one tensor copy brings this many by a k-block.
constexpr i32 kCopyColumns = 64, kWeightCopies = kTileCols / kCopyColumns;
template <class C>
constexpr i32 kBlockK = kRowBytes / C::Elem::kBytes;

// Up, gated: 64 columns of gate, then the 64 of up that belong to them, twice. Else 256 columns.
// From copy i to copy i + 2.
template <class C>
MM_DEVICE i32 weight_step(bool down) {
    return down || C::parts == 1 ? 2 * kCopyColumns : kCopyColumns;
}
// First row of copy 0 or 1.
template <class C>
MM_DEVICE i32 weight_row(const Args& a, bool down, i32 expert, i32 n, i32 i) {
    if (down) return expert * a.hidden + n * kTileCols + i * kCopyColumns;
    const i32 first = expert * C::parts * a.intermediate + n * (kTileCols / C::parts);
    return first + i * (C::parts == 1 ? kCopyColumns : a.intermediate);
}

// Route `j` of the expert, sources in order; `source`: whose it is. There is one.
template <class C>
MM_DEVICE const Route* find_route(const Context<C>& x, u32 expert, u32 j, u32& source) {
    u32 begin;
    for (source = 0;; ++source) {
        begin = routes_before(x, source, expert);
        const u32 n = routes_before(x, source, expert + 1) - begin;
        if (j < n || source + 1 == x.world()) break;
        j -= n;
    }
    return x.template own<Route>(x.args.routes) + static_cast<i64>(source) * x.args.max_tokens * C::routes + begin + j;
}

// By the helper warps but the first copying one: awaits every rank's header, then fills the table.
template <class C>
struct Planner {
    static constexpr u32 kThreadsHere = kHelperThreads - kWarpSize;
    Context<C> x;

    MM_DEVICE void run() {
        const u32 tid = (x.warp == kCopySecond ? kCopyFirst : x.warp) * kWarpSize + x.lane - kMathThreads;
        const comm::Order order{table_of(x), static_cast<u32>(x.args.up_tiles), static_cast<u32>(x.args.down_tiles),
                                static_cast<u32>(x.args.lag), x.args.ups_first != 0};
        if (x.warp == kLoad) {
            comm::await_headers(x.waits, x.template own<u32>(x.args.header_flags), x.lane, kWarpSize);
            __syncwarp();
            if (x.lane == 0) *static_cast<volatile u32*>(x.word(kHeadersCame)) = 1;
        } else {
            touch();
        }
        ptx::named_barrier_sync(kPlanners, kThreadsHere);
        const bool go = !x.waits.aborted();
        auto* offsets = reinterpret_cast<u32*>(x.shared + Layout<C>::kOffsetsAt);
        for (u32 i = tid; i < x.world() * (x.slots() + 1); i += kThreadsHere)
            offsets[i] = go ? x.waits.mem.load(x.template own<u32>(x.args.offsets) + i) : 0;
        ptx::named_barrier_sync(kPlanners, kThreadsHere);
        for (u32 i = tid; i < x.slots(); i += kThreadsHere) {
            u32 rows = 0;
            for (u32 s = 0; s < x.world(); ++s) rows += routes_before(x, s, i + 1) - routes_before(x, s, i);
            order.table.rows[i] = rows;
        }
        ptx::named_barrier_sync(kPlanners, kThreadsHere);
        if (x.warp == kLoad) {
            const auto [active, blocks] = order.compact(WarpLanes{x.lane}, x.slots(), static_cast<u32>(kBlockRows));
            if (x.lane == 0) {
                *x.word(kNumActive) = active;
                *x.word(kNumUnits) = blocks * (x.args.up_tiles + x.args.down_tiles);
            }
        }
        ptx::named_barrier_sync(kPlanners, kThreadsHere);
        const u32 active = *x.word(kNumActive);
        for (u32 a = tid; a < active; a += kThreadsHere) order.place(a, active);
        ptx::named_barrier_sync(kPlanned, kHelperThreads);
    }

    // While headers are on their way: the pages that the first rows and tiles will need. A page's first use takes a
    // microsecond, and each role would wait for several of them, one after the other. Only this rank's: a line of a
    // peer that all CTAs ask for keeps the link busy for microseconds.
    MM_DEVICE void touch() const {
        const Args& a = x.args;
        if (x.warp == kCopySecond) {
            ptx::prefetch_l2(x.template own<u8>(a.results));
            ptx::prefetch_l2(x.template own<u8>(a.mid));
            ptx::prefetch_l2(x.template own<u8>(a.mid_scales));
        } else if (x.warp == kCopyFirst) {
            const i64 source = min_of(x.lane, x.world() - 1), row = source * a.max_tokens;
            ptx::prefetch_l2(x.template own<Route>(a.routes) + row * C::routes);
            ptx::prefetch_l2(x.template own<u8>(a.rows) + row * a.row_pitch);
            ptx::prefetch_l2(x.template own<u8>(a.pool));
            if constexpr (C::block_scaled || C::row_scaled) {
                ptx::prefetch_l2(x.template own<float>(a.row_scales) + row * a.scale_pitch);
                const i64 kb = min_of(static_cast<i32>(x.lane), C::row_scaled ? 0 : a.up_kb - 1);
                ptx::prefetch_l2(x.template own<float>(a.pool_scales) + kb * a.ring_blocks * kBlockRows);
            }
        } else {
            if constexpr (C::block_scaled) {
                ptx::prefetch_l2(a.scales_w13);
                ptx::prefetch_l2(a.scales_w2);
            }
            ptx::prefetch_l2(x.counters(a.copied));
            ptx::prefetch_l2(x.counters(a.tiles_done));
            if (x.lane == 0) weights_ahead();
        }
    }

    // The first k-blocks of what is likely to be this CTA's first tile go to L2, if experts have few rows, and most
    // have some. Slowly: sorting and pushing wait for memory too.
    MM_DEVICE void weights_ahead() const {
        constexpr i32 kAhead = 6, kLeastRows = 2, kMostRows = kBlockRows - kBlockRows / 8;
        constexpr u64 kPaceNs = 1000;
        const Args& a = x.args;
        const i32 rows = x.tokens * C::routes / a.slots, cta = static_cast<i32>(x.cta);  // of an expert, about
        const i32 expert = cta / a.up_tiles, n = cta % a.up_tiles;
        if (rows < kLeastRows || rows > kMostRows || expert >= a.slots) return;
        u64 next = ptx::global_timer_ns();
        for (i32 kb = 0; kb < min_of(a.up_kb, kAhead); ++kb, next += kPaceNs) {
            while (ptx::global_timer_ns() < next)
                if (*static_cast<volatile u32*>(x.word(kHeadersCame)) != 0) return;
            for (i32 i = 0; i < kWeightCopies; ++i)
                ptx::tma_prefetch_2d(&a.map_w13, kb * kBlockK<C>,
                                     weight_row<C>(a, false, expert, n, i % 2) + i / 2 * weight_step<C>(false));
        }
    }
};

// Units to tiles, for units that only grow.
template <class C>
MM_DEVICE comm::Walk walk_of(const Context<C>& x) {
    return {table_of(x), *x.word(kNumUnits), *x.word(kNumActive), static_cast<u32>(x.args.up_tiles),
            static_cast<u32>(x.args.down_tiles)};
}

}  // namespace megamoe::mega
