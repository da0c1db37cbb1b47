// y: each token's rows, as its experts' owners have written them, summed in a fixed order: owners ascending, within an
// owner k ascending, in fp32; each owner's sum is rounded to bf16 before it is added (as a partial sum that crosses
// is).
#pragma once
#include "megamoe/mega/context.cuh"

namespace megamoe::mega {

template <class C>
struct Combine {
    static constexpr u32 kPiece = 8;                              // columns of one 16-byte access
    static constexpr u32 kColumns = kWarpSize * kPiece;           // of a token, that a warp takes at a time
    static constexpr int kBatch = C::routes < 8 ? C::routes : 8;  // rows asked for at a time
    static constexpr int kTurns = C::routes <= 6 ? 4 : C::routes <= 8 ? 3 : 1;  // pieces of them

    Context<C> x;

    // Math warps: tell every rank that this one's results are written, await theirs, add up.
    MM_DEVICE void run() {
        ptx::named_barrier_sync(kRolesDone, kThreads);
        if (threadIdx.x == 0)
            comm::announce_results(x.waits, x.control(), x.ctas, x.args.done_flags, *x.word(kRingAbort) != 0);
        if (x.warp == 0) {
            comm::await_results(x.waits, x.template own<u32>(x.args.done_flags), x.lane, kWarpSize);
            __syncwarp();
        }
        ptx::named_barrier_sync(kResults, kMathThreads);
        if (threadIdx.x == 0) x.stamp(kResultsIn);
        // Whole tokens where there are enough of them for all warps, else parts of them, one for each warp.
        const u32 pieces = ceil_div(static_cast<u32>(x.args.hidden), kColumns);
        const u32 warps = x.ctas * kMathWarps, share = ceil_div(static_cast<u32>(x.tokens) * pieces, warps);
        const u32 each = min_of(share == 0 ? 1u : share, pieces), parts = ceil_div(pieces, each);
        for (u32 i = x.cta * kMathWarps + x.warp; i < x.tokens * parts; i += warps) {
            const u32 first = i % parts * each;
            token(i / parts, first * kColumns, min_of(first + each, pieces) * kColumns);
        }
    }

  private:
    MM_DEVICE void token(u32 t, u32 begin, u32 end) {
        const u32 hidden = x.args.hidden;
        u16* y = static_cast<u16*>(x.args.y) + static_cast<i64>(t) * x.args.y_ld;
        if (x.waits.aborted()) {
            for (u32 col = begin + x.lane * kPiece; col < min_of(end, hidden); col += kColumns)
                ptx::st_global_v4(y + col, make_uint4(0x7fff7fffu, 0x7fff7fffu, 0x7fff7fffu, 0x7fff7fffu));
            return;
        }
        // Lane k knows the owner of route k; its place among all routes orders the sum.
        constexpr i32 kNobody = 0x7fffffff;
        i32 owner = kNobody;
        if (x.lane < C::routes) {
            const i32 s = x.route_slot(t, x.lane);
            if (s >= 0) owner = s / static_cast<i32>(x.slots());
        }
        u32 place = 0;
#pragma unroll
        for (int k = 0; k < C::routes; ++k) {
            const i32 other = __shfl_sync(0xffffffffu, owner, k);
            if (other < owner || (other == owner && k < static_cast<int>(x.lane))) ++place;
        }
        // Lane j: the j-th route to add, whether it is an owner's first, and how many there are.
        const u32 count = __popc(__ballot_sync(0xffffffffu, owner != kNobody));
        u32 kth = 0;
#pragma unroll
        for (int j = 0; j < C::routes; ++j) {
            const u32 k = __ffs(__ballot_sync(0xffffffffu, x.lane < C::routes && place == u32(j))) - 1;
            if (x.lane == u32(j)) kth = k;
        }
        const i32 sorted = __shfl_sync(0xffffffffu, owner, kth);
        const i32 before = __shfl_up_sync(0xffffffffu, sorted, 1);
        const u32 starts = __ballot_sync(0xffffffffu, x.lane > 0 && sorted != before);
        const u16* rows = x.template own<u16>(x.args.results) + static_cast<i64>(t) * C::routes * hidden;
        for (u32 at = begin; at < end; at += kTurns * kColumns) {
            float total[kTurns][kPiece] = {}, partial[kTurns][kPiece] = {};
            for (u32 first = 0; first < count; first += kBatch) {
                uint4 v[kTurns][kBatch];
#pragma unroll
                for (int j = 0; j < kBatch; ++j) {
                    const u32 k = __shfl_sync(0xffffffffu, kth, first + j);
#pragma unroll
                    for (int i = 0; i < kTurns; ++i) {
                        const u32 col = at + i * kColumns + x.lane * kPiece;
                        v[i][j] = make_uint4(0, 0, 0, 0);
                        if (first + j < count && col < min_of(end, hidden))
                            v[i][j] = ptx::ld_global_cg_v4(rows + static_cast<i64>(k) * hidden + col);
                    }
                }
#pragma unroll
                for (int j = 0; j < kBatch; ++j) {
                    if (first + j >= count) break;
#pragma unroll
                    for (int i = 0; i < kTurns; ++i) {
                        if (starts >> (first + j) & 1) add_rounded(total[i], partial[i]);
                        const u32 words[4] = {v[i][j].x, v[i][j].y, v[i][j].z, v[i][j].w};
#pragma unroll
                        for (int w = 0; w < 4; ++w) {
                            partial[i][2 * w] += __uint_as_float(words[w] << 16);
                            partial[i][2 * w + 1] += __uint_as_float(words[w] & 0xffff0000u);
                        }
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < kTurns; ++i) {
                const u32 col = at + i * kColumns + x.lane * kPiece;
                add_rounded(total[i], partial[i]);
                float (&s)[kPiece] = total[i];
                if (col < min_of(end, hidden))
                    ptx::st_global_v4(y + col, make_uint4(ptx::pack_bf16(s[0], s[1]), ptx::pack_bf16(s[2], s[3]),
                                                          ptx::pack_bf16(s[4], s[5]), ptx::pack_bf16(s[6], s[7])));
            }
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
