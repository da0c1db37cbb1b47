// Rows to their owners, this rank included, cast on the way unless they are e4m3 already: once for each (token, owner),
// in the order in which the owner's experts need them.
#pragma once
#include "megamoe/mega/dispatch.cuh"
#include "megamoe/quant/values.cuh"

namespace megamoe::mega {

template <class C>
struct Pusher {
    static constexpr u32 kBatch = 4;  // rows between two fences
    static constexpr bool kCast = C::block_scaled && !C::x_scaled;
    static constexpr u32 kPerLane = 16 / C::Elem::kBytes;       // elements of one 16-byte store
    static constexpr u32 kPieceColumns = kWarpSize * kPerLane;  // of a row that the warp moves at a time
    static constexpr int kLoads = kCast ? 2 : 1;                // of 16 bytes, for one store
    using Raw = quant::Held<BF16>;

    Context<C> x;

    // One warp, while others multiply: rows first .. end of the CTA's list.
    MM_DEVICE void run(u32 first, u32 end) {
        // Lanes that read the word for themselves might part at the moment in which it changes.
        for (u32 i = first; i < end && !__any_sync(0xffffffffu, x.waits.aborted()); i += kBatch)
            send<4>(i, min_of(i + kBatch, end));
    }

    // Rows first .. end of the CTA's list, at most 32, by one warp, and one fence behind all; kInFlight pieces are
    // asked for before the first is used.
    template <int kInFlight>
    MM_DEVICE void send(u32 first, u32 end) {
        if (first >= end) return;
        const u32 columns = x.args.row_pitch / C::Elem::kBytes, pieces = ceil_div(columns, kPieceColumns);
        const u32 items = (end - first) * pieces;
        // Lane l knows row first + l.
        const uint4 mine = *reinterpret_cast<const uint4*>(Dispatch<C>::list(x) + min_of(first + x.lane, end - 1));
        const u32 owner = mine.z / x.slots();
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
                piece[j].store(x, __shfl_sync(0xffffffffu, owner, r), __shfl_sync(0xffffffffu, mine.y, r), col,
                               col < columns && i0 + j < items);
            }
        }
        __syncwarp();
        if (x.lane < end - first) {
            comm::count_row(x.waits.mem,
                            x.template at<u32>(owner, x.args.arrived) + x.rank() * x.slots() + mine.z % x.slots());
        }
    }

  private:
    // This lane's share of one piece of a row.
    struct Piece {
        static constexpr i64 kBytes = C::x_scaled ? 1 : 2;             // of an element of x
        static constexpr i32 kAtOnce = static_cast<i32>(16 / kBytes);  // elements of one load
        uint4 raw[kLoads];
        float scale;  // x_scaled: that of this lane's columns

        MM_DEVICE void load(const Context<C>& x, u32 token, u32 col) {
            const u8* from = static_cast<const u8*>(x.args.x) + (static_cast<i64>(token) * x.args.x_ld + col) * kBytes;
            const i32 valid = x.args.hidden - static_cast<i32>(col);
#pragma unroll
            for (int i = 0; i < kLoads; ++i) {
                raw[i] = make_uint4(0, 0, 0, 0);
                if (i * kAtOnce < valid) raw[i] = ptx::ld_global_nc_v4(from + i * 16);
            }
            if constexpr (C::x_scaled) {
                const float* scales = static_cast<const float*>(x.args.x_scales);
                scale = valid > 0 ? __ldg(scales + static_cast<i64>(token) * x.args.x_scales_ld + col / quant::kBlock)
                                  : 0.f;
            }
        }

        MM_DEVICE void store(const Context<C>& x, u32 owner, u32 region_row, u32 col, bool valid) {
            const i64 row = static_cast<i64>(x.rank()) * x.args.max_tokens + region_row;
            u8* to = x.template at<u8>(owner, x.args.rows) + row * x.args.row_pitch + col * C::Elem::kBytes;
            if constexpr (kCast) {
                Raw held;
#pragma unroll
                for (int i = 0; i < kLoads; ++i) {
                    held.bits[4 * i] = raw[i].x, held.bits[4 * i + 1] = raw[i].y;
                    held.bits[4 * i + 2] = raw[i].z, held.bits[4 * i + 3] = raw[i].w;
                }
                float amax = quant::lanes_max<quant::kLanes>(held.template amax<true>());
                if (!quant::is_finite(amax)) {
                    held.repair();
                    amax = quant::lanes_max<quant::kLanes>(held.template amax<false>(),
                                                           0xffu << (x.lane / quant::kLanes * quant::kLanes));
                }
                const quant::Scale s = quant::AnyScale::from(amax);
                if (!valid) return;
                ptx::st_global_v4(to, quant::encode(held, s.inverse));
                if (x.lane % quant::kLanes == 0)
                    x.template at<float>(owner, x.args.row_scales)[row * x.args.scale_pitch + col / quant::kBlock] =
                        s.value;
            } else {
                if (!valid) return;
                ptx::st_global_v4(to, raw[0]);
                if (C::x_scaled && x.lane % quant::kLanes == 0)
                    x.template at<float>(owner, x.args.row_scales)[row * x.args.scale_pitch + col / quant::kBlock] =
                        scale;
            }
        }
    };
};

}  // namespace megamoe::mega
