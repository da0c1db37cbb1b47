// One warp a CTA sends rows to their owners, this rank included, casting on the way: once for each (token, owner),
// in the order in which the owner's experts need them.
#pragma once
#include "megamoe/mega/dispatch.cuh"
#include "megamoe/quant/values.cuh"

namespace megamoe::mega {

template <class C>
struct Pusher {
    static constexpr int kBatch = 4;  // rows between two fences
    static constexpr bool kCast = C::block_scaled;
    static constexpr u32 kPerLane = 16 / C::Elem::kBytes;  // elements of one 16-byte store
    using Raw = quant::Held<BF16>;

    Context<C> x;

    MM_DEVICE void run(u32 count) {
        const Push* list = Dispatch<C>::list(x);
        // Lanes that read the word for themselves might part at the moment in which it changes.
        for (u32 i = 0; i < count && !__any_sync(0xffffffffu, x.waits.aborted()); i += kBatch)
            send(list + i, min_of(count - i, u32{kBatch}));
    }

  private:
    MM_DEVICE void send(const Push* list, u32 n) {
        const u16* from[kBatch];
        u8* to[kBatch];
        float* scales[kBatch];
        u32* arrived = nullptr;  // of row `lane`
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
            const Push p = list[min_of(u32(b), n - 1)];
            const u32 owner = p.slot / x.slots();
            const i64 row = static_cast<i64>(x.rank()) * x.args.max_tokens + p.row;
            from[b] = static_cast<const u16*>(x.args.x) + static_cast<i64>(p.token) * x.args.x_ld;
            to[b] = x.template at<u8>(owner, x.args.rows) + row * x.args.row_pitch;
            scales[b] = x.template at<float>(owner, x.args.row_scales) + row * x.args.scale_pitch;
            if (x.lane == u32(b))
                arrived = x.template at<u32>(owner, x.args.arrived) + x.rank() * x.slots() + p.slot % x.slots();
        }
        const u32 columns = x.args.row_pitch / C::Elem::kBytes, hidden = x.args.hidden;
        for (u32 c0 = 0; c0 < columns; c0 += kWarpSize * kPerLane) {
            const u32 col = c0 + x.lane * kPerLane;
            const i32 valid = static_cast<i32>(hidden) - static_cast<i32>(col);
            if constexpr (kCast) {
                Raw held[kBatch];
#pragma unroll
                for (int b = 0; b < kBatch; ++b) quant::load(held[b], from[b] + col, valid);
#pragma unroll
                for (int b = 0; b < kBatch; ++b) {
                    float amax = quant::lanes_max<quant::kLanes>(held[b].template amax<true>());
                    if (!quant::is_finite(amax)) {
                        held[b].repair();
                        amax = quant::lanes_max<quant::kLanes>(held[b].template amax<false>(),
                                                               0xffu << (x.lane / quant::kLanes * quant::kLanes));
                    }
                    const quant::Scale s = quant::AnyScale::from(amax);
                    if (u32(b) < n && col < columns) {
                        ptx::st_global_v4(to[b] + col, quant::encode(held[b], s.inverse));
                        if (x.lane % quant::kLanes == 0) scales[b][col / quant::kBlock] = s.value;
                    }
                }
            } else {
                uint4 v[kBatch];
#pragma unroll
                for (int b = 0; b < kBatch; ++b) {
                    v[b] = make_uint4(0, 0, 0, 0);
                    if (valid > 0) v[b] = ptx::ld_global_nc_v4(from[b] + col);
                }
#pragma unroll
                for (int b = 0; b < kBatch; ++b)
                    if (u32(b) < n && col < columns) ptx::st_global_v4(to[b] + col * 2, v[b]);
            }
        }
        __syncwarp();
        if (x.lane < n) comm::count_row(x.waits.mem, arrived);
    }
};

}  // namespace megamoe::mega
