// Partial sums on the way back: a rank keeps the rows of y of its experts, adds up those of one token, and sends the
// source one row instead of each. A variant of the kernel, C::partial_sums; docs/mega-kernel.md says what it costs.
#pragma once
#include "megamoe/mega/add_rows.cuh"
#include "megamoe/mega/schedule.cuh"

namespace megamoe::mega {

// What this rank has kept in `returns`: a row for each route of all sources to its experts. A unit is a route that is
// the first of its token's here; the others of the token follow it (Route::next).
template <class C>
struct KeptRows {
    struct Step : RowStep {
        u32 row;  // lane k: of row k
        u64 to;   // where the sum goes
    };
    // Routes that a warp looks up at a time, a lane each, at most: their tokens' rows stand in shared memory behind the
    // barriers.
    static constexpr u32 kBarriers = 4, kRoom = (kChunkBytes - kBarriers * 8) / (C::routes * sizeof(u32));
    static constexpr u32 kBatch = min_of(kRoom, static_cast<u32>(kWarpSize));

    Context<C> x;
    u32 total = 0;    // routes of all sources
    u32 each = 1;     // that a warp looks up at a time: of few, every warp some
    u32 batch = 0;    // number of the first one of those that are looked up
    u32 pending = 0;  // which of these are still to be added up
    u32 length = 0;   // lane l: rows to add for the l-th of these
    u64 goes_to = 0;  // and where their sum goes

    // This warp's first step.
    MM_DEVICE Step open() {
        for (u32 s = 0; s < x.world(); ++s) total += routes_before(x, s, x.slots());
        each = max_of(min_of(ceil_div(total, warps()), kBatch), 1u);
        batch = (x.cta * kMathWarps + x.warp) * each;
        if (batch < total) look_up();
        return next();
    }

    MM_DEVICE u32 units() const { return total; }
    MM_DEVICE u32 loaded(u32 buffer) const { return row_barrier(x, 2 + buffer); }
    MM_DEVICE Step after(const Step& s) {
        constexpr u32 kStep = RowBuffers<C>::kStep;
        return s.at + kStep < s.end ? Step{{s.unit, s.at + kStep, s.end, s.owner}, s.row, s.to} : next();
    }
    MM_DEVICE const u16* from(const Step& s) const {
        return x.template own<u16>(x.args.returns) + static_cast<i64>(s.row) * x.args.hidden + s.at;
    }
    MM_DEVICE u16* to(const Step& s) const { return reinterpret_cast<u16*>(s.to); }

    // Of every CTA of this rank. One that has multiplied garbage says so before others add it up.
    MM_DEVICE void await() {
        if (threadIdx.x == 0) comm::meet_behind_rows(x.waits, x.control(), x.ctas, *x.word(kRingAbort) != 0);
        __syncwarp();
        ptx::named_barrier_sync(kResults, kMathThreads);
    }

  private:
    MM_DEVICE u32 warps() const { return x.ctas * kMathWarps; }

    // Of the batch's l-th route: row k.
    MM_DEVICE u32* found(u32 l, u32 k) const {
        return reinterpret_cast<u32*>(x.shared + Layout<C>::kStagingAt + x.warp * kChunkBytes + kBarriers * 8) +
               l * C::routes + k;
    }

    MM_DEVICE Step next() {
        while (pending == 0 && batch < total) {
            batch += warps() * each;
            if (batch < total) look_up();
        }
        Step s{};
        s.unit = total, s.owner = Step::kNobody;
        if (pending == 0) return s;
        const u32 l = __ffs(pending) - 1;
        pending &= pending - 1;
        s.unit = batch + l, s.end = x.args.hidden, s.to = __shfl_sync(0xffffffffu, goes_to, l);
        // One owner's, this rank: in order of k.
        if (x.lane < __shfl_sync(0xffffffffu, length, l)) s.owner = 0, s.row = *found(l, x.lane);
        return s;
    }

    // The batch's routes, a lane each. This rank's come first, then those of the next rank and so on: else all ranks
    // would send to one of them at a time.
    MM_DEVICE void look_up() {
        u32 turn = 0, source = x.rank(), i = batch + x.lane;
        for (; turn < x.world() && i >= routes_before(x, source, x.slots()); ++turn) {
            i -= routes_before(x, source, x.slots());
            source = source + 1 == x.world() ? 0 : source + 1;
        }
        length = 0;
        __syncwarp();  // all lanes have read what the batch before has found
        if (x.lane < each && turn < x.world()) {
            const Route* routes =
                x.template own<Route>(x.args.routes) + static_cast<i64>(source) * x.args.max_tokens * C::routes;
            uint4 route = ptx::ld_global_cg_v4(routes + i);
            goes_to = reinterpret_cast<u64>(x.template at<u16>(source, x.args.results) +
                                            static_cast<i64>(route.y) * x.args.hidden);
            while ((route.w & kFirstHere) != 0 || length > 0) {
                *found(x.lane, length++) = row_of(source, i);
                const u32 next = route.w & ~kFirstHere;
                if (next == 0 || length == C::routes) break;
                i = next - 1;
                route = ptx::ld_global_cg_v4(routes + i);
            }
        }
        pending = __ballot_sync(0xffffffffu, length > 0);
        __syncwarp();
    }

    // In `returns`, of route i of the source: its expert's rows are numbered source by source, in whole blocks.
    MM_DEVICE u32 row_of(u32 source, u32 i) const {
        const u32 e = last(x.slots(), [&](u32 slot) { return routes_before(x, source, slot) <= i; });
        u32 position = i - routes_before(x, source, e);
        for (u32 s = 0; s < source; ++s) position += routes_before(x, s, e + 1) - routes_before(x, s, e);
        const comm::Table table = table_of(x);
        const u32 a = last(*x.word(kNumActive), [&](u32 active) { return table.expert[active] <= e; });
        return table.block_begin(a) * kBlockRows + position;
    }

    // The last of n, at least 1, that `holds` is true of; it is of 0, and where it is not it is not behind.
    template <class Holds>
    static MM_DEVICE u32 last(u32 n, const Holds& holds) {
        u32 low = 0, high = n - 1;
        while (low < high) {
            const u32 mid = (low + high + 1) / 2;
            if (holds(mid))
                low = mid;
            else
                high = mid - 1;
        }
        return low;
    }
};

}  // namespace megamoe::mega
