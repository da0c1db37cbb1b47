// Rows of bf16 added up by math warps, in a fixed order: owners ascending, within an owner k ascending, in fp32; each
// owner's sum is rounded to bf16 before it is added (as a partial sum that crosses is). Which rows, and where their sum
// goes, is the business of `Rows`: ArrivedRows (combine.cuh), KeptRows (partial_sums.cuh).
#pragma once
#include "megamoe/mega/context.cuh"

namespace megamoe::mega {

// The ring is not in use any more. A warp has two buffers there, each of kStep columns of every row that is added.
template <class C>
struct RowBuffers {
    using L = Layout<C>;
    static constexpr u32 kPiece = 8;                     // columns of one 16-byte access
    static constexpr u32 kColumns = kWarpSize * kPiece;  // columns that a warp adds up at a time
    static constexpr u32 kPerWarp = L::kStagingAt / kMathWarps, kRouteBytes = kPerWarp / 2 / C::routes;
    static constexpr u32 kStep = kRouteBytes / (kColumns * sizeof(u16)) * kColumns, kStepBytes = kStep * sizeof(u16);
    static_assert(kStep > 0 && kPerWarp % 128 == 0);
};

// Where a math warp's barriers for rows stand: two for rows that arrive, then two for rows kept here.
template <class C>
MM_DEVICE u32 row_barrier(const Context<C>& x, u32 which) {
    return x.smem + Layout<C>::kStagingAt + x.warp * kChunkBytes + which * 8;
}

// Columns at .. min(at + kStep, end) of a unit's rows; lane k: the owner of row k, or kNobody: there is no such row.
struct RowStep {
    static constexpr i32 kNobody = 0x7fffffff;
    u32 unit, at, end;
    i32 owner;
};

// Columns that a warp takes at a time, in two buffers: one is loaded while the other is added up. Little code, without
// copies of it for each row: it runs once, and its instructions come from afar.
template <class C, template <class> class Rows>
struct AddRows : Rows<C>, RowBuffers<C> {
    using typename Rows<C>::Step;
    using Rows<C>::x;
    using RowBuffers<C>::kPiece, RowBuffers<C>::kColumns, RowBuffers<C>::kPerWarp, RowBuffers<C>::kStep,
        RowBuffers<C>::kStepBytes;
    static constexpr i32 kNobody = RowStep::kNobody;

    MM_DEVICE void init_barriers() const {
        ptx::mbarrier_init(this->loaded(0), 1);
        ptx::mbarrier_init(this->loaded(1), 1);
    }

    // This warp's units, from the step `first` on. Before that, while rows are on their way, all warps but the one that
    // awaits them add up what stands in a buffer, for nobody, so that the instructions are there.
    MM_DEVICE void sum(const Step& first) {
        Step now{};
        now.unit = this->units(), now.end = kColumns, now.owner = x.lane < C::routes ? 0 : kNobody;
        for (u32 n = 0;; ++n) {
            const Step next = n == 0 ? first : this->after(now);
            const u32 buffer = (n + 1) % 2;
            if (n > 0) {
                if (next.unit < this->units()) load(next, n % 2);
                wait_phase(this->loaded(buffer), (n - 1) / 2 % 2, WaitCode::kFull, buffer, x.ring_limit);
            }
            if (n > 0 || x.warp != 0) add_up(now, buffer);
            __syncwarp();  // before the buffer is loaded again
            if (n == 0) {
                this->await();
                if (x.waits.aborted()) return;
                ptx::fence_proxy_async();  // copies read what others have written
                if (next.unit < this->units()) load(next, 0);
            }
            if (next.unit >= this->units()) return;
            now = next;
        }
    }

  private:
    // Of row k.
    MM_DEVICE u32 row(u32 buffer, u32 k) const {
        return x.smem + x.warp * kPerWarp + buffer * (kPerWarp / 2) + k * kStepBytes;
    }

    MM_DEVICE void load(const Step& s, u32 buffer) const {
        const u32 bytes = min_of(kStep, s.end - s.at) * sizeof(u16);
        const u32 count = __popc(__ballot_sync(0xffffffffu, s.owner != kNobody));
        if (x.lane == 0) ptx::mbarrier_arrive_expect_tx(this->loaded(buffer), count * bytes);
        __syncwarp();
        if (s.owner != kNobody)
            ptx::bulk_load(row(buffer, x.lane), this->from(s), bytes, this->loaded(buffer), ptx::kEvictFirst);
    }

    MM_DEVICE void add_up(const Step& s, u32 buffer) const {
        // Lane k knows the owner of row k; its place among all rows orders the sum.
        u32 place = 0;
#pragma unroll 1
        for (i32 k = 0; k < C::routes; ++k) {
            const i32 other = __shfl_sync(0xffffffffu, s.owner, k);
            if (other < s.owner || (other == s.owner && k < static_cast<i32>(x.lane))) ++place;
        }
        // Lane j: the j-th row to add, whether it is an owner's first, and how many there are.
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
            if (s.at + mine < s.end && s.unit < this->units())
                ptx::st_global_v4(this->to(s) + s.at + mine,
                                  make_uint4(ptx::pack_bf16(total[0], total[1]), ptx::pack_bf16(total[2], total[3]),
                                             ptx::pack_bf16(total[4], total[5]), ptx::pack_bf16(total[6], total[7])));
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
