// y: each token's rows, as its experts' owners have written them, summed in a fixed order: owners ascending, within an
// owner k ascending, in fp32; each owner's sum is rounded to bf16 before it is added (as a partial sum that crosses
// is).
#pragma once
#include "megamoe/mega/context.cuh"

namespace megamoe::mega {

template <class C>
struct Combine {
    static constexpr u32 kPiece = 8;                            // columns of one 16-byte access
    static constexpr u32 kColumns = kWarpSize * kPiece;         // of one item: a token's columns a warp takes at a time
    static constexpr int kBatch = C::top_k < 8 ? C::top_k : 8;  // rows asked for at a time

    Context<C> x;

    // All warps: tell every rank that this one's results are written, await theirs, add up.
    MM_DEVICE void run() {
        ptx::named_barrier_sync(kRolesDone, kThreads);
        if (threadIdx.x == 0)
            comm::announce_results(x.waits, x.control(), x.ctas, x.args.done_flags, *x.word(kRingAbort) != 0);
        if (x.warp == 0) {
            comm::await_results(x.waits, x.template own<u32>(x.args.done_flags), x.lane, kWarpSize);
            __syncwarp();
        }
        ptx::named_barrier_sync(kResults, kThreads);
        const u32 pieces = ceil_div(static_cast<u32>(x.args.hidden), kColumns);
        const u32 items = x.tokens * pieces;
        for (u32 i = x.cta * kWarps + x.warp; i < items; i += x.ctas * kWarps)
            token(i / pieces, (i % pieces) * kColumns + x.lane * kPiece);
    }

  private:
    MM_DEVICE void token(u32 t, u32 col) {
        const bool inside = col < static_cast<u32>(x.args.hidden);
        u16* y = static_cast<u16*>(x.args.y) + static_cast<i64>(t) * x.args.y_ld + col;
        if (x.waits.aborted()) {
            if (inside) ptx::st_global_v4(y, make_uint4(0x7fff7fffu, 0x7fff7fffu, 0x7fff7fffu, 0x7fff7fffu));
            return;
        }
        // Lane k knows the owner of route k; its place among all routes orders the sum.
        i32 owner = 0x7fffffff;
        if (x.lane < C::top_k) {
            const i32 s = x.route_slot(t, x.lane);
            if (s >= 0) owner = s / static_cast<i32>(x.slots());
        }
        u32 place = 0;
#pragma unroll
        for (int k = 0; k < C::top_k; ++k) {
            const i32 other = __shfl_sync(0xffffffffu, owner, k);
            if (other < owner || (other == owner && k < static_cast<int>(x.lane))) ++place;
        }
        const u32 count = __popc(__ballot_sync(0xffffffffu, owner != 0x7fffffff));
        const u16* rows = x.template own<u16>(x.args.results) + static_cast<i64>(t) * C::top_k * x.args.hidden + col;
        float total[kPiece] = {}, partial[kPiece] = {};
        i32 last = -1;
        for (int first = 0; first < static_cast<int>(count); first += kBatch) {
            uint4 v[kBatch];
            i32 owners[kBatch];
#pragma unroll
            for (int j = 0; j < kBatch; ++j) {
                const u32 k = __ffs(__ballot_sync(0xffffffffu, x.lane < C::top_k && place == u32(first + j))) - 1;
                owners[j] = __shfl_sync(0xffffffffu, owner, k % kWarpSize);
                if (first + j < static_cast<int>(count) && inside)
                    v[j] = ptx::ld_global_cg_v4(rows + static_cast<i64>(k) * x.args.hidden);
            }
#pragma unroll
            for (int j = 0; j < kBatch; ++j) {
                if (first + j >= static_cast<int>(count)) break;
                if (owners[j] != last) add_rounded(total, partial);
                last = owners[j];
                const u32 words[4] = {v[j].x, v[j].y, v[j].z, v[j].w};
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    partial[2 * i] += __uint_as_float(words[i] << 16);
                    partial[2 * i + 1] += __uint_as_float(words[i] & 0xffff0000u);
                }
            }
        }
        add_rounded(total, partial);
        if (inside)
            ptx::st_global_v4(y, make_uint4(ptx::pack_bf16(total[0], total[1]), ptx::pack_bf16(total[2], total[3]),
                                            ptx::pack_bf16(total[4], total[5]), ptx::pack_bf16(total[6], total[7])));
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
