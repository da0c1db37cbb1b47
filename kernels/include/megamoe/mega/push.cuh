// Rows to their owners, this rank included, cast on the way: once for each (token, owner), in the order in which the
// owner's experts need them.
#pragma once
#include "megamoe/mega/dispatch.cuh"
#include "megamoe/mega/pieces.cuh"

namespace megamoe::mega {

template <class C>
struct Pusher {
    using Piece = typename C::Piece;     // mega/pieces.cuh
    static constexpr u32 kBatch = 4;     // rows between two fences
    static constexpr int kInFlight = 4;  // pieces asked for before the first is used; more take code, which comes late
    static constexpr u32 kPerLane = 16 / C::Elem::kBytes;       // elements of one 16-byte store
    static constexpr u32 kPieceColumns = kWarpSize * kPerLane;  // of a row that the warp moves at a time

    Context<C> x;

    // One warp, while others multiply: rows first .. end of the CTA's list.
    MM_DEVICE void run(u32 first, u32 end) {
        // Lanes that read the word for themselves might part at the moment in which it changes.
        for (u32 i = first; i < end && !__any_sync(0xffffffffu, x.waits.aborted()); i += kBatch)
            send(i, min_of(i + kBatch, end));
    }

    // Rows first .. end of the CTA's list, at most 32, by one warp, and one fence behind all.
    MM_DEVICE void send(u32 first, u32 end) {
        if (first >= end) return;
        const u32 columns = x.args.row_pitch / C::Elem::kBytes, pieces = ceil_div(columns, kPieceColumns);
        const u32 items = (end - first) * pieces;
        // Lane l knows row first + l.
        const uint4 mine = *reinterpret_cast<const uint4*>(Dispatch<C>::list(x) + min_of(first + x.lane, end - 1));
        const u32 owner = mine.z / x.slots();
        quant::Scale scale{};
        if constexpr (C::row_scaled) {
            scale = row_scale(mine.x, items, pieces);
            if (x.lane < end - first) *scales_at(owner, region_row(mine.y)) = scale.value;
        }
        for (u32 i0 = 0; i0 < items; i0 += kInFlight) {
            Piece piece[kInFlight];
#pragma unroll
            for (int j = 0; j < kInFlight; ++j) {
                const u32 i = min_of(i0 + j, items - 1);  // the last again, rather than a branch
                piece[j].load(x, __shfl_sync(0xffffffffu, mine.x, i / pieces),
                              i % pieces * kPieceColumns + x.lane * kPerLane);
            }
#pragma unroll
            for (int j = 0; j < kInFlight; ++j) {
                const u32 i = min_of(i0 + j, items - 1), r = i / pieces;
                const u32 col = i % pieces * kPieceColumns + x.lane * kPerLane;
                const u32 peer = __shfl_sync(0xffffffffu, owner, r);
                const i64 row = region_row(__shfl_sync(0xffffffffu, mine.y, r));
                float inverse = 0.f;
                if constexpr (Piece::kNeedsRowScale) inverse = __shfl_sync(0xffffffffu, scale.inverse, r);
                u8* to = x.template at<u8>(peer, x.args.rows) + row * x.args.row_pitch + col * C::Elem::kBytes;
                piece[j].store({to, scales_at(peer, row), col, col < columns && i0 + j < items}, x.lane, inverse);
            }
        }
        __syncwarp();
        if (x.lane < end - first) {
            comm::count_row(x.waits.mem,
                            x.template at<u32>(owner, x.args.arrived) + x.rank() * x.slots() + mine.z % x.slots());
        }
    }

  private:
    // Row of the owner's memory for rows, of this source's row there.
    MM_DEVICE i64 region_row(u32 row) const { return static_cast<i64>(x.rank()) * x.args.max_tokens + row; }
    MM_DEVICE float* scales_at(u32 owner, i64 row) const {
        return x.template at<float>(owner, x.args.row_scales) + row * x.args.scale_pitch;
    }

    // Lane l: the scale of the l-th row, of token `token` there. A row to be cast is read once more then.
    MM_DEVICE quant::Scale row_scale(u32 token, u32 items, u32 pieces) const {
        if constexpr (Piece::kNeedsRowScale) {
            float amax = 0.f;
            for (u32 i0 = 0; i0 < items; i0 += kInFlight) {
                Piece piece[kInFlight];
#pragma unroll
                for (int j = 0; j < kInFlight; ++j) {
                    const u32 i = min_of(i0 + j, items - 1);
                    piece[j].load(x, __shfl_sync(0xffffffffu, token, i / pieces),
                                  i % pieces * kPieceColumns + x.lane * kPerLane);
                }
#pragma unroll
                for (int j = 0; j < kInFlight; ++j) {
                    const float largest = quant::lanes_max<kWarpSize>(piece[j].finite_amax());
                    if (x.lane == min_of(i0 + j, items - 1) / pieces) amax = fmaxf(amax, largest);
                }
            }
            return quant::AnyScale::from(amax);
        } else {
            return {Piece::scale_of(x, token, 0), 0.f};
        }
    }
};

}  // namespace megamoe::mega
