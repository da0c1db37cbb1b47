// Rows of x on their way into an owner's region: what a lane holds of a piece of one, and how it is stored. The type is
// the recipe's: as it is (bf16), cast with a scale per 128 columns or per row, or already cast by the caller.
#pragma once
#include "megamoe/mega/context.cuh"
#include "megamoe/quant/values.cuh"

namespace megamoe::mega {

// Where a lane's share goes: 16 bytes of the row from column `col` on, and the row's scales.
struct Place {
    u8* to;
    float* scales;
    u32 col;
    bool valid;  // the share exists; all lanes come here
};

// bf16 of x, columns beyond the last as zeros.
template <int kLoads>
struct Bf16Piece {
    static constexpr bool kNeedsRowScale = false;
    uint4 raw[kLoads];

    template <class C>
    MM_DEVICE void load(const Context<C>& x, u32 token, u32 col) {
        const u16* from = static_cast<const u16*>(x.args.x) + static_cast<i64>(token) * x.args.x_ld + col;
        const i32 valid = x.args.hidden - static_cast<i32>(col);
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            raw[i] = make_uint4(0, 0, 0, 0);
            if (i * 8 < valid) raw[i] = ptx::ld_global_nc_v4(from + i * 8);
        }
    }
};

struct PlainPiece : Bf16Piece<1> {
    MM_DEVICE void store(const Place& p, u32, float) const {
        if (p.valid) ptx::st_global_v4(p.to, raw[0]);
    }
};

// Sixteen numbers, to be cast.
struct HeldPiece : Bf16Piece<2> {
    MM_DEVICE quant::Held<BF16> held() const {
        quant::Held<BF16> h;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            h.bits[4 * i] = raw[i].x, h.bits[4 * i + 1] = raw[i].y;
            h.bits[4 * i + 2] = raw[i].z, h.bits[4 * i + 3] = raw[i].w;
        }
        return h;
    }
};

// A scale for each 128 columns, which 8 lanes hold.
struct BlockCastPiece : HeldPiece {
    MM_DEVICE void store(const Place& p, u32 lane, float) const {
        quant::Held<BF16> h = held();
        float amax = quant::lanes_max<quant::kLanes>(h.template amax<true>());
        if (!quant::is_finite(amax)) {
            h.repair();
            amax = quant::lanes_max<quant::kLanes>(h.template amax<false>(),
                                                   0xffu << (lane / quant::kLanes * quant::kLanes));
        }
        const quant::Scale s = quant::AnyScale::from(amax);
        if (!p.valid) return;
        ptx::st_global_v4(p.to, quant::encode(h, s.inverse));
        if (lane % quant::kLanes == 0) p.scales[p.col / quant::kBlock] = s.value;
    }
};

// A scale for the row, known from a first look at all of it.
struct RowCastPiece : HeldPiece {
    static constexpr bool kNeedsRowScale = true;

    MM_DEVICE float finite_amax() const {
        quant::Held<BF16> h = held();
        const float amax = h.template amax<true>();
        if (quant::is_finite(amax)) return amax;
        h.repair();
        return h.template amax<false>();
    }

    MM_DEVICE void store(const Place& p, u32, float inverse) const {
        quant::Held<BF16> h = held();
        h.repair();
        if (p.valid) ptx::st_global_v4(p.to, quant::encode(h, inverse));
    }
};

// e4m3 and fp32 scales of the caller's. kPerRow: one a row, which the pusher copies; else one for each 128 columns.
template <bool kPerRow>
struct QuantisedPiece {
    static constexpr bool kNeedsRowScale = false;
    uint4 raw;
    float scale;

    template <class C>
    MM_DEVICE void load(const Context<C>& x, u32 token, u32 col) {
        const u8* from = static_cast<const u8*>(x.args.x) + static_cast<i64>(token) * x.args.x_ld + col;
        const i32 valid = x.args.hidden - static_cast<i32>(col);
        raw = make_uint4(0, 0, 0, 0);
        if (valid >= 16) {
            raw = ptx::ld_global_nc_v4(from);
        } else if (valid > 0) {  // H is a multiple of 8; what stands behind the row may be nobody's memory
            const uint2 last = ptx::ld_global_nc_v2(from);
            raw.x = last.x, raw.y = last.y;
        }
        if (!kPerRow && valid > 0 && x.lane % quant::kLanes == 0) scale = scale_of(x, token, col / quant::kBlock);
    }

    template <class C>
    static MM_DEVICE float scale_of(const Context<C>& x, u32 token, u32 block) {
        return ptx::ld_global_nc_f32(static_cast<const float*>(x.args.x_scales) + token * x.args.x_scales_ld +
                                     block * x.args.x_scales_step);
    }

    MM_DEVICE void store(const Place& p, u32 lane, float) const {
        if (!p.valid) return;
        ptx::st_global_v4(p.to, raw);
        if (!kPerRow && lane % quant::kLanes == 0) p.scales[p.col / quant::kBlock] = scale;
    }
};

}  // namespace megamoe::mega
