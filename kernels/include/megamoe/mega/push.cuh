// Rows to their owners, this rank included, cast on the way: once for each (token, owner), in the order in which the
// owner's experts need them.
#pragma once
#include "megamoe/mega/pieces.cuh"
#include "megamoe/mega/sorting.cuh"

namespace megamoe::mega {

// Rows that math warps send in any case before they multiply: what the first experts need.
constexpr u32 kPushedFirst = 32;

template <class C>
struct Pusher {
    using Piece = typename C::Piece;     // mega/pieces.cuh
    static constexpr u32 kBatch = 4;     // rows between two fences of the warp that sends while others multiply
    static constexpr int kInFlight = 4;  // pieces asked for before the first is used; more take code, which comes late
    static constexpr u32 kPerLane = 16 / C::Elem::kBytes;       // elements of one 16-byte store
    static constexpr u32 kPieceColumns = kWarpSize * kPerLane;  // of a row that the warp moves at a time

    Context<C> x;

    // Rows of the CTA's list, of `pushes`, that no other warp takes. Math warps go on to multiply when their first tile
    // is there; the helper warp sends what they leave.
    MM_DEVICE void run(u32 pushes, bool math) {
        const u32 each = math ? 1 : kBatch;
        u32* next = x.word(kNextPush);
        for (;;) {
            u32 first = pushes;
            if (x.lane == 0 && !x.waits.aborted()) {
                const bool leave = math && *static_cast<volatile u32*>(next) >= kPushedFirst && x.first_stage_full();
                if (!leave) first = atomicAdd(next, each);
            }
            first = __shfl_sync(0xffffffffu, first, 0);
            if (first >= pushes) return;
            send(first, min_of(first + each, pushes));
        }
    }

  private:
    // Rows first .. end of the CTA's list, at most 32, by one warp, and one fence behind all.
    MM_DEVICE void send(u32 first, u32 end) {
        const Push* list = Sorting<C>::list(x);
        const uint4 mine = ptx::ld_global_cg_v4(list + min_of(first + x.lane, end - 1));  // lane l: row first + l
#pragma unroll 1
        for (u32 r = 0; r < end - first; ++r)
            row(__shfl_sync(0xffffffffu, mine.x, r), __shfl_sync(0xffffffffu, mine.y, r),
                __shfl_sync(0xffffffffu, mine.z, r));
        __syncwarp();
        if (x.lane < end - first)
            comm::count_row(x.waits.mem, x.template at<u32>(mine.z, x.args.arrived) + x.rank() * x.slots() + mine.w);
    }

    MM_DEVICE void row(u32 token, u32 row, u32 owner) {
        const u32 columns = x.args.row_pitch / C::Elem::kBytes;
        const i64 at = static_cast<i64>(x.rank()) * x.args.max_tokens + row;
        float* scales = x.template at<float>(owner, x.args.row_scales) + at * x.args.scale_pitch;
        u8* to = x.template at<u8>(owner, x.args.rows) + at * x.args.row_pitch;
        quant::Scale scale{};
        if constexpr (C::row_scaled) {
            scale = row_scale(token, columns);
            if (x.lane == 0) *scales = scale.value;
        }
#pragma unroll 1
        for (u32 c0 = x.lane * kPerLane; c0 < columns + x.lane * kPerLane; c0 += kInFlight * kPieceColumns) {
            Piece piece[kInFlight];
#pragma unroll
            for (int j = 0; j < kInFlight; ++j) piece[j].load(x, token, c0 + j * kPieceColumns);
#pragma unroll
            for (int j = 0; j < kInFlight; ++j) {
                const u32 col = c0 + j * kPieceColumns;
                piece[j].store({to + col * C::Elem::kBytes, scales, col, col < columns}, x.lane, scale.inverse);
            }
        }
    }

    // fp8_row: a row that is to be cast is read once more for it.
    MM_DEVICE quant::Scale row_scale(u32 token, u32 columns) const {
        if constexpr (Piece::kNeedsRowScale) {
            float amax = 0.f;
#pragma unroll 1
            for (u32 c0 = x.lane * kPerLane; c0 < columns + x.lane * kPerLane; c0 += kInFlight * kPieceColumns) {
                Piece piece[kInFlight];
#pragma unroll
                for (int j = 0; j < kInFlight; ++j) piece[j].load(x, token, c0 + j * kPieceColumns);
#pragma unroll
                for (int j = 0; j < kInFlight; ++j) amax = fmaxf(amax, piece[j].finite_amax());
            }
            return quant::AnyScale::from(quant::lanes_max<kWarpSize>(amax));
        } else {
            return {Piece::scale_of(x, token, 0), 0.f};
        }
    }
};

}  // namespace megamoe::mega
