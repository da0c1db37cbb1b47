// y: each token's rows, as its experts' owners have written them, summed in a fixed order (add_rows.cuh).
#pragma once
#include "megamoe/mega/partial_sums.cuh"

namespace megamoe::mega {

// What the owners have written to this rank: of each token a row for each of its routes, or, with partial sums, one for
// each owner in the place of the first of its routes there.
template <class C>
struct ArrivedRows {
    using Step = RowStep;
    static constexpr u32 kColumns = RowBuffers<C>::kColumns, kStep = RowBuffers<C>::kStep;

    Context<C> x;
    u32 each = 0, parts = 1;  // pieces of kColumns in a part of a token, which is a unit; parts of a token

    // Whole tokens where there are enough of them for all warps, else parts of them, one for each warp.
    MM_DEVICE void lay_out() {
        const u32 pieces = ceil_div(static_cast<u32>(x.args.hidden), kColumns);
        const u32 share = ceil_div(static_cast<u32>(x.tokens) * pieces, warps());
        each = min_of(share == 0 ? 1u : share, pieces), parts = ceil_div(pieces, each);
    }

    // A unit's first step.
    MM_DEVICE Step open(u32 unit) const {
        const u32 first = unit % parts * each * kColumns;
        Step s{unit, first, min_of(first + each * kColumns, static_cast<u32>(x.args.hidden)), Step::kNobody};
        if (unit < units() && x.lane < C::routes) {
            const i32 slot = x.route_slot(unit / parts, x.lane);
            if (slot >= 0) s.owner = slot / static_cast<i32>(x.slots());
        }
        if constexpr (C::partial_sums) s.owner = first_of_owner(s.owner);
        return s;
    }

    // The call is void: NaN.
    MM_DEVICE void spoil() const {
        constexpr u32 kNan = 0x7fff7fffu, kPiece = RowBuffers<C>::kPiece;
        for (u32 unit = x.cta * kMathWarps + x.warp; unit < units(); unit += warps()) {
            const u32 first = unit % parts * each * kColumns;
            for (u32 col = first + x.lane * kPiece;
                 col < min_of(first + each * kColumns, static_cast<u32>(x.args.hidden)); col += kColumns)
                ptx::st_global_v4(y(unit) + col, make_uint4(kNan, kNan, kNan, kNan));
        }
    }

    MM_DEVICE u32 units() const { return x.tokens * parts; }
    MM_DEVICE u32 loaded(u32 buffer) const { return row_barrier(x, buffer); }
    MM_DEVICE Step after(const Step& s) const {
        return s.at + kStep < s.end ? Step{s.unit, s.at + kStep, s.end, s.owner} : open(s.unit + warps());
    }
    MM_DEVICE const u16* from(const Step& s) const {
        const i64 route = static_cast<i64>(s.unit / parts) * C::routes + x.lane;
        return x.template own<u16>(x.args.results) + route * static_cast<u32>(x.args.hidden) + s.at;
    }
    MM_DEVICE u16* to(const Step& s) const { return y(s.unit); }

    // Every rank's.
    MM_DEVICE void await() {
        if (x.warp == 0) {
            comm::await_results(x.waits, x.template own<u32>(x.args.done_flags), x.lane, kWarpSize);
            __syncwarp();
        }
        ptx::named_barrier_sync(kResults, kMathThreads);
        if (threadIdx.x == 0) x.stamp(kResultsIn);
    }

  private:
    MM_DEVICE u32 warps() const { return x.ctas * kMathWarps; }
    MM_DEVICE u16* y(u32 unit) const {
        return static_cast<u16*>(x.args.y) + static_cast<i64>(unit / parts) * x.args.y_ld;
    }

    // Lane k: the owner of route k, if no lower lane has the same.
    MM_DEVICE i32 first_of_owner(i32 owner) const {
        bool first = true;
#pragma unroll 1
        for (u32 k = 0; k < C::routes; ++k) first &= __shfl_sync(0xffffffffu, owner, k) != owner || k >= x.lane;
        return first ? owner : Step::kNobody;
    }
};

template <class C>
struct Combine : AddRows<C, ArrivedRows> {
    using ArrivedRows<C>::x;

    // Math warps: tell every rank that this one's results are written, await theirs, add up.
    MM_DEVICE void run() {
        this->lay_out();
        const RowStep first = this->open(x.cta * kMathWarps + x.warp);
        __syncwarp();  // barriers stand where the last tile was staged
        if (x.lane == 0) {
            this->init_barriers();
            if constexpr (C::partial_sums) AddRows<C, KeptRows>{{x}, {}}.init_barriers();
            ptx::mbarrier_init_fence();
        }
        ptx::named_barrier_sync(kRolesDone, kThreads);
        if constexpr (C::partial_sums) {
            AddRows<C, KeptRows> kept{{x}, {}};
            kept.sum(kept.open());
            ptx::named_barrier_sync(kResults, kMathThreads);
        }
        if (threadIdx.x == 0)
            comm::announce_results(x.waits, x.control(), x.ctas, x.args.done_flags, *x.word(kRingAbort) != 0);
        this->sum(first);
        if (x.waits.aborted() || *x.word(kRingAbort) != 0) this->spoil();
    }
};

}  // namespace megamoe::mega
