// y: each token's rows, as its experts' owners have written them, summed in a fixed order: owners ascending, within an
// owner k ascending, in fp32; each owner's sum is rounded to bf16 before it is added (as a partial sum that crosses
// is).
#pragma once
#include "megamoe/mega/context.cuh"

namespace megamoe::mega {

// Columns of a token that a warp takes at a time, in two buffers: one is loaded while the other is added up. Little
// code, without copies of it for each route: it runs once, and its instructions come from afar.
template <class C>
struct Combine {
    using L = Layout<C>;
    static constexpr u32 kPiece = 8;                     // columns of one 16-byte access
    static constexpr u32 kColumns = kWarpSize * kPiece;  // columns that a warp adds up at a time
    // The ring is not in use any more. A buffer holds kStep columns of each route.
    static constexpr u32 kPerWarp = L::kStagingAt / kMathWarps, kRouteBytes = kPerWarp / 2 / C::routes;
    static constexpr u32 kStep = kRouteBytes / (kColumns * sizeof(u16)) * kColumns, kStepBytes = kStep * sizeof(u16);
    static_assert(kStep > 0 && kPerWarp % 128 == 0);
    static constexpr i32 kNobody = 0x7fffffff;

    // Columns at .. min(at + kStep, end) of a unit's token; lane k: the owner of its route k, or kNobody.
    struct Step {
        u32 unit, at, end;
        i32 owner;
    };

    Context<C> x;
    u32 each = 0, parts = 1;  // pieces of kColumns in a part of a token, which is a unit; parts of a token

    // Math warps: tell every rank that this one's results are written, await theirs, add up.
    MM_DEVICE void run() {
        lay_out();
        const Step first = open(x.cta * kMathWarps + x.warp);
        __syncwarp();  // barriers stand where the last tile was staged
        if (x.lane == 0) {
            ptx::mbarrier_init(loaded(0), 1);
            ptx::mbarrier_init(loaded(1), 1);
            ptx::mbarrier_init_fence();
        }
        ptx::named_barrier_sync(kRolesDone, kThreads);
        if (threadIdx.x == 0)
            comm::announce_results(x.waits, x.control(), x.ctas, x.args.done_flags, *x.word(kRingAbort) != 0);
        sum(first);
        if (x.waits.aborted() || *x.word(kRingAbort) != 0) spoil();
    }

    // Whole tokens where there are enough of them for all warps, else parts of them, one for each warp.
    MM_DEVICE void lay_out() {
        const u32 pieces = ceil_div(static_cast<u32>(x.args.hidden), kColumns);
        const u32 share = ceil_div(static_cast<u32>(x.tokens) * pieces, warps());
        each = min_of(share == 0 ? 1u : share, pieces), parts = ceil_div(pieces, each);
    }

    // A unit's first step.
    MM_DEVICE Step open(u32 unit) const {
        const u32 first = unit % parts * each * kColumns;
        Step s{unit, first, min_of(first + each * kColumns, static_cast<u32>(x.args.hidden)), kNobody};
        if (unit < units() && x.lane < C::routes) {
            const i32 slot = x.route_slot(unit / parts, x.lane);
            if (slot >= 0) s.owner = slot / static_cast<i32>(x.slots());
        }
        return s;
    }

    // This warp's units, from the step `first` on. Before that, while results are on their way, all warps but the one
    // that awaits them add up what stands in a buffer, for nobody, so that the instructions are there.
    MM_DEVICE void sum(const Step& first) {
        Step now{units(), 0, kColumns, x.lane < C::routes ? 0 : kNobody};
        for (u32 n = 0;; ++n) {
            const Step next = n == 0 ? first : after(now);
            const u32 buffer = (n + 1) % 2;
            if (n > 0) {
                if (next.unit < units()) load(next, n % 2);
                wait_phase(loaded(buffer), (n - 1) / 2 % 2, WaitCode::kFull, buffer, x.ring_limit);
            }
            if (n > 0 || x.warp != 0) add_up(now, buffer);
            __syncwarp();  // before the buffer is loaded again
            if (n == 0) {
                await_results();
                if (x.waits.aborted()) return;
                ptx::fence_proxy_async();  // copies read what others have written
                if (next.unit < units()) load(next, 0);
            }
            if (next.unit >= units()) return;
            now = next;
        }
    }

  private:
    MM_DEVICE u32 units() const { return x.tokens * parts; }
    MM_DEVICE u32 warps() const { return x.ctas * kMathWarps; }
    MM_DEVICE u32 loaded(u32 buffer) const { return x.smem + L::kStagingAt + x.warp * kChunkBytes + buffer * 8; }

    MM_DEVICE Step after(const Step& s) const {
        return s.at + kStep < s.end ? Step{s.unit, s.at + kStep, s.end, s.owner} : open(s.unit + warps());
    }

    // Every rank's.
    MM_DEVICE void await_results() {
        if (x.warp == 0) {
            comm::await_results(x.waits, x.template own<u32>(x.args.done_flags), x.lane, kWarpSize);
            __syncwarp();
        }
        ptx::named_barrier_sync(kResults, kMathThreads);
        if (threadIdx.x == 0) x.stamp(kResultsIn);
    }

    // Of route k.
    MM_DEVICE u32 row(u32 buffer, u32 k) const {
        return x.smem + x.warp * kPerWarp + buffer * (kPerWarp / 2) + k * kStepBytes;
    }
    MM_DEVICE u16* y(u32 unit) const {
        return static_cast<u16*>(x.args.y) + static_cast<i64>(unit / parts) * x.args.y_ld;
    }

    MM_DEVICE void load(const Step& s, u32 buffer) const {
        const u32 hidden = x.args.hidden, bytes = min_of(kStep, s.end - s.at) * sizeof(u16);
        const u32 count = __popc(__ballot_sync(0xffffffffu, s.owner != kNobody));
        if (x.lane == 0) ptx::mbarrier_arrive_expect_tx(loaded(buffer), count * bytes);
        __syncwarp();
        const i64 route = static_cast<i64>(s.unit / parts) * C::routes + x.lane;
        if (s.owner != kNobody)
            ptx::bulk_load(row(buffer, x.lane), x.template own<u16>(x.args.results) + route * hidden + s.at, bytes,
                           loaded(buffer), ptx::kEvictFirst);
    }

    MM_DEVICE void add_up(const Step& s, u32 buffer) const {
        // Lane k knows the owner of route k; its place among all routes orders the sum.
        u32 place = 0;
#pragma unroll 1
        for (i32 k = 0; k < C::routes; ++k) {
            const i32 other = __shfl_sync(0xffffffffu, s.owner, k);
            if (other < s.owner || (other == s.owner && k < static_cast<i32>(x.lane))) ++place;
        }
        // Lane j: the j-th route to add, whether it is an owner's first, and how many there are.
        const u32 count = __popc(__ballot_sync(0xffffffffu, s.owner != kNobody));
        u32 kth = 0;
#pragma unroll 1
        for (u32 j = 0; j < C::routes; ++j) {
            const u32 k = __ffs(__ballot_sync(0xffffffffu, x.lane < C::routes && place == j)) - 1;
            if (x.lane == j) kth = k;
        }
        const i32 sorted = __shfl_sync(0xffffffffu, s.owner, kth);
        const i32 before = __shfl_up_sync(0xffffffffu, sorted, 1);
        const u32 starts = __ballot_sync(0xffffffffu, x.lane > 0 && sorted != before);
#pragma unroll 1
        for (u32 c = 0; c < min_of(kStep, s.end - s.at); c += kColumns) {
            const u32 mine = c + x.lane * kPiece;
            float total[kPiece] = {}, partial[kPiece] = {};
#pragma unroll 1
            for (u32 j = 0; j < count; ++j) {
                const uint4 v = ptx::ld_shared_v4(row(buffer, __shfl_sync(0xffffffffu, kth, j)) + mine * sizeof(u16));
                if (starts >> j & 1) add_rounded(total, partial);
                const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (int w = 0; w < 4; ++w) {
                    partial[2 * w] += __uint_as_float(words[w] << 16);
                    partial[2 * w + 1] += __uint_as_float(words[w] & 0xffff0000u);
                }
            }
            add_rounded(total, partial);
            if (s.at + mine < s.end && s.unit < units())
                ptx::st_global_v4(y(s.unit) + s.at + mine,
                                  make_uint4(ptx::pack_bf16(total[0], total[1]), ptx::pack_bf16(total[2], total[3]),
                                             ptx::pack_bf16(total[4], total[5]), ptx::pack_bf16(total[6], total[7])));
        }
    }

    // The call is void: NaN.
    MM_DEVICE void spoil() const {
        constexpr u32 kNan = 0x7fff7fffu;
        for (u32 unit = x.cta * kMathWarps + x.warp; unit < units(); unit += warps()) {
            const u32 first = unit % parts * each * kColumns;
            for (u32 col = first + x.lane * kPiece;
                 col < min_of(first + each * kColumns, static_cast<u32>(x.args.hidden)); col += kColumns)
                ptx::st_global_v4(y(unit) + col, make_uint4(kNan, kNan, kNan, kNan));
        }
    }

    // The finished sum of one owner joins the total.
    static MM_DEVICE void add_rounded(float (&total)[kPiece], float (&partial)[kPiece]) {
#pragma unroll
        for (u32 i = 0; i < kPiece; i += 2) {
            const u32 rounded = ptx::pack_bf16(partial[i], partial[i + 1]);
            total[i] += __uint_as_float(rounded << 16);
            total[i + 1] += __uint_as_float(rounded & 0xffff0000u);
            partial[i] = partial[i + 1] = 0.f;
        }
    }
};

}  // namespace megamoe::mega
