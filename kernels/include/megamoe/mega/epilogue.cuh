// What becomes of a warpgroup's sums: activations into `mid` (up), rows of y to their sources (down).
//
// An epilogue runs once in 50 thousand cycles, so that its instructions come from afar. In a straight line they come
// ahead of time; each jump waits for the ones it leads to, some 500 cycles. Hence no branches here, but predicates.
#pragma once
#include "megamoe/mega/activation.cuh"
#include "megamoe/mega/schedule.cuh"
#include "megamoe/mega/sums.cuh"
#include "megamoe/quant/values.cuh"

namespace megamoe::mega {

// One math warpgroup's share of a tile: of many rows 64 by all 256 columns, of few (64 or less) all by 128 columns.
template <bool kFewRows>
struct Share {
    static constexpr int kCols = kFewRows ? 128 : 256;
    u32 group, warp;

    MM_DEVICE u32 first_row() const { return (kFewRows ? 0 : group * 64) + warp * 16; }  // of this warp's 16
    MM_DEVICE u32 first_col() const { return kFewRows ? group * kCols : 0; }             // of the tile's 256
};

template <class C, bool kFewRows>
struct Epilogue {
    using L = Layout<C>;
    using S = Share<kFewRows>;
    // Activations come in blocks of 128 columns; what of each this warp has, and how many blocks.
    static constexpr bool kHalfBlock = kFewRows && C::parts == 2;
    static constexpr int kBlocks = C::parts == 2 ? 1 : S::kCols / kHalfCols;
    static constexpr int kActCols = kHalfBlock ? kHalfCols / 2 : kHalfCols, kActs = kActCols / 2;

    const Context<C>& x;
    S share;
    const Notes<C>& notes;
    u32& exchanges;  // so far

    template <class Sum>
    MM_DEVICE void up(const Sum& sum, const Tile& t) const {
        up_block<0>(sum, t);
        if constexpr (kBlocks == 2) up_block<1>(sum, t);
    }

    // Each row to its slot at its source, or of those kept here: y_e times the top-k weight, in bf16.
    template <class Sum>
    MM_DEVICE void down(const Sum& sum, const Tile& t) const {
        const i32 hidden = x.args.hidden, first = t.n * kTileCols + share.first_col();
        float scale[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) scale[h] = weight(x.lane / 4 + 8 * h);
        const float* bias = static_cast<const float*>(x.args.bias2) + static_cast<i64>(t.expert) * hidden;
        float row_scales[2];
        if constexpr (C::row_scaled) row_scales[0] = row_scale(0), row_scales[1] = row_scale(1);
        auto value = [&](int i) {
            float v = sum.at(i);
            if constexpr (C::row_scaled)
                v *= row_scales[i / 2 % 2] *
                     ptx::ld_shared_f32(channels() + (share.first_col() + i / 4 * 8 + i % 2) * 4);
            const float w = scale[i / 2 % 2];
            if constexpr (C::bias) {
                const i32 col = first + i / 4 * 8 + x.lane % 4 * 2 + i % 2;
                const float b = col < hidden ? ptx::ld_global_nc_f32(bias + col) : 0.f;
                v += C::weights_before ? w * b : b;
            }
            return C::weights_before ? v : v * w;
        };
        // Lane l knows where row l % 16 goes, and writes 16 bytes of rows l / 8 + 4 i.
        const bool valid = static_cast<i32>(share.first_row() + x.lane % 16) < t.rows && !x.waits.aborted();
        const u64 row = goes_to(x.lane % 16);
        const u32 valid_rows = __ballot_sync(0xffffffffu, valid);
        u64 to[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            to[i] = __shfl_sync(0xffffffffu, row, static_cast<int>(x.lane / 8 + 4 * i)) +
                    (share.first_col() + x.lane % 8 * 8) * sizeof(u16);
#pragma unroll
        for (int c0 = 0; c0 < S::kCols; c0 += kChunkCols) {
            __syncwarp();
            stage_chunk<S::kCols>(staging(), c0, x.lane, value);
            __syncwarp();
            const bool inside = first + c0 + static_cast<i32>(x.lane % 8) * 8 < hidden;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const u32 r = x.lane / 8 + 4 * i;
                ptx::st_global_v4_if(reinterpret_cast<u16*>(to[i]) + c0,
                                     ptx::ld_shared_v4(chunk_piece(staging(), r, x.lane % 8)),
                                     inside && (valid_rows >> r & 1));
            }
        }
    }

  private:
    MM_DEVICE u32 staging() const { return x.smem + L::kStagingAt + (share.group * 4 + share.warp) * kChunkBytes; }

    // Of row r of this warp's 16: where the tile's first column of it goes, and its weight.
    MM_DEVICE u32 note(u32 r) const { return notes.note() + L::kNoteRows + (share.first_row() + r) * L::kNoteRow; }
    MM_DEVICE u64 goes_to(u32 r) const { return ptx::ld_shared_u64(note(r)); }
    MM_DEVICE float weight(u32 r) const { return ptx::ld_shared_f32(note(r) + 8); }

    // fp8_row: of this thread's row h.
    MM_DEVICE float row_scale(int h) const {
        return ptx::ld_shared_f32(x.smem + L::kRowScalesAt + notes.slot * L::kRowScales +
                                  (share.first_row() + x.lane / 4 + 8 * h) * 4);
    }

    // fp8_row: scales of the tile's columns, from the first pair of this thread's on.
    MM_DEVICE u32 channels() const { return notes.note() + L::kNoteScales + x.lane % 4 * 8; }

    // Block kBlock of this share's activations.
    template <int kBlock, class Sum>
    MM_DEVICE void up_block(const Sum& sum, const Tile& t) const {
        const i32 col = t.n * (kTileCols / C::parts) + share.first_col() / C::parts + kBlock * kHalfCols;
        float v[kActs];
        activate<kBlock>(sum, t, col, v);
        const i32 row = t.block * kBlockRows + share.first_row();
        if constexpr (C::Elem::kBytes == 2) {
            write_bf16(v, col, row);
            return;
        }
        if constexpr (C::row_scaled) round_to_bf16(v);
        float amax[2];
        row_maxima(v, amax);
        // One lane a row, of one warpgroup if they share the block.
        const bool writes = x.lane % 4 == 0 && col < x.args.intermediate && (!kHalfBlock || share.group == 0);
        float* scales = x.template own<float>(x.args.mid_scales) + static_cast<i64>(col / kHalfCols) * x.args.mid_rows +
                        row + x.lane / 4;
        if constexpr (C::block_scaled) {
            float inverse[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                // amax / 448 to an ulp: no subroutine is worth the wait.
                const float s = amax[h] == 0.f ? 1.f : fmaxf(amax[h] * (1.f / quant::kE4M3Max), 0x1p-126f);
                inverse[h] = ptx::rcp_approx(s);
                ptx::st_global_f32_if(scales + 8 * h, s, writes);
            }
#pragma unroll
            for (int j = 0; j < kActs / 4; ++j) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int i = 4 * j + 2 * h;
                    const u32 at = chunk_piece(staging(), x.lane / 4 + 8 * h, j / 2) + j % 2 * 8 + x.lane % 4 * 2;
                    ptx::st_shared_u16(at, ptx::cvt_e4m3x2(v[i] * inverse[h], v[i + 1] * inverse[h]));
                }
            }
            write_mid<kActCols / 16, 1>(col, row);
        } else {
#pragma unroll
            for (int h = 0; h < 2; ++h) ptx::st_global_f32_if(scales + 8 * h, amax[h], writes);
            write_bf16(v, col, row);
        }
    }

    MM_DEVICE void write_bf16(const float (&v)[kActs], i32 col, i32 row) const {
#pragma unroll
        for (int c0 = 0; c0 < kActCols; c0 += kChunkCols) {
            stage_chunk<kActCols>(staging(), c0, x.lane, [&](int i) { return v[i]; });
            write_mid<8, 2>(col + c0, row);
        }
    }

    static MM_DEVICE void round_to_bf16(float (&v)[kActs]) {
#pragma unroll
        for (int i = 0; i < kActs; i += 2) {
            const u32 pair = ptx::pack_bf16(v[i], v[i + 1]);
            v[i] = __uint_as_float(pair << 16), v[i + 1] = __uint_as_float(pair & 0xffff0000u);
        }
    }

    // Activations of this thread's rows lane / 4 and lane / 4 + 8, columns `first` + 8 j + 2 (lane % 4) + c; those
    // beyond the last are 0.
    template <int kBlock, class Sum>
    MM_DEVICE void activate(const Sum& sum, const Tile& t, i32 first, float (&v)[kActs]) const {
        const i32 inter = x.args.intermediate, col0 = first + x.lane % 4 * 2;
        typename C::Activation act = C::activation(x.args);
        float scale[2] = {1.f, 1.f};
        if constexpr (C::weights_before) scale[0] = weight(x.lane / 4), scale[1] = weight(x.lane / 4 + 8);
        const i64 w13_row = static_cast<i64>(t.expert) * C::parts * inter;
        const float* bias = static_cast<const float*>(x.args.bias13) + w13_row;
        float row[2];
        if constexpr (C::row_scaled) row[0] = row_scale(0), row[1] = row_scale(1);
#pragma unroll
        for (int j = 0; j < kActs / 4; ++j) {
            // I is a multiple of 8: a group of 8 columns exists or does not.
            const i32 col = col0 + 8 * j;
            const bool inside = col < inter;
            float2 b[2], s[2];
            if constexpr (C::bias) {
                b[0] = b[1] = make_float2(0.f, 0.f);
                if (inside)
                    b[0] = make_float2(ptx::ld_global_nc_f32(bias + col), ptx::ld_global_nc_f32(bias + col + 1));
                if (C::parts == 2 && inside)
                    b[1] = make_float2(ptx::ld_global_nc_f32(bias + inter + col),
                                       ptx::ld_global_nc_f32(bias + inter + col + 1));
            }
            if constexpr (C::row_scaled) {
                const u32 at = channels() + (share.first_col() / C::parts + kBlock * kHalfCols + 8 * j) * 4;
                s[0] = ptx::ld_shared_v2_f32(at);
                if (C::parts == 2) s[1] = ptx::ld_shared_v2_f32(at + kHalfCols * 4);
            }
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                // Accumulators: 32 of gate, then the same 32 of up, and so on; or 64 of each block.
                const int i = 4 * j + 2 * h;
                const int at = C::parts == 2 ? j / 8 * 64 + j % 8 * 4 + 2 * h : kBlock * 64 + i;
                float2 gate = make_float2(sum.at(at), sum.at(at + 1));
                if constexpr (C::row_scaled) gate.x *= row[h] * s[0].x, gate.y *= row[h] * s[0].y;
                if constexpr (C::bias) gate.x += b[0].x, gate.y += b[0].y;
                float2 a;
                if constexpr (C::parts == 2) {
                    float2 up = make_float2(sum.at(at + 32), sum.at(at + 33));
                    if constexpr (C::row_scaled) up.x *= row[h] * s[1].x, up.y *= row[h] * s[1].y;
                    if constexpr (C::bias) up.x += b[1].x, up.y += b[1].y;
                    a = act(gate, up);
                } else {
                    a = act(gate);
                }
                if constexpr (C::weights_before) a.x *= scale[h], a.y *= scale[h];
                v[i] = inside ? a.x : 0.f, v[i + 1] = inside ? a.y : 0.f;
            }
        }
    }

    // Largest finite magnitudes of this thread's two rows over the block's columns. NaN and infinities become NaN.
    MM_DEVICE void row_maxima(float (&v)[kActs], float (&amax)[2]) const {
        amax[0] = amax[1] = 0.f;
#pragma unroll
        for (int i = 0; i < kActs; ++i) {
            v[i] = fmaf(v[i], 0.f, v[i]);
            amax[i / 2 % 2] = fmaxf(amax[i / 2 % 2], fabsf(v[i]));
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            amax[h] = fmaxf(amax[h], __shfl_xor_sync(0xffffffffu, amax[h], 1));
            amax[h] = fmaxf(amax[h], __shfl_xor_sync(0xffffffffu, amax[h], 2));
        }
        if constexpr (kHalfBlock) {
            // The other warpgroup has the other half of the columns. A note's slot comes again only when all have
            // settled its tile.
            const u32 at = x.smem + L::kMaximaAt + notes.slot * (L::kMaxima / 2) + x.lane / 4 * 4;
            const u32 own = at + (share.group * 4 + share.warp) * 64,
                      other = at + ((share.group ^ 1) * 4 + share.warp) * 64;
#pragma unroll
            for (int h = 0; h < 2; ++h) ptx::st_shared_f32(own + 32 * h, amax[h]);
            __syncwarp();
            if (x.lane == 0) ptx::mbarrier_arrive(x.exchange());
            wait_phase(x.exchange(), exchanges++ & 1, WaitCode::kFull, notes.slot, x.ring_limit);
#pragma unroll
            for (int h = 0; h < 2; ++h) amax[h] = fmaxf(amax[h], ptx::ld_shared_f32(other + 32 * h));
        }
    }

    // The staged 16 rows, kPieces times 16 bytes of each, to `mid`, whose elements have kBytes; columns beyond the last
    // are zeros, or not written. Nobody waits here: the leading warp says that they are there.
    template <u32 kPieces, u32 kBytes>
    MM_DEVICE void write_mid(i32 col, i32 row) const {
        constexpr u32 kRowsAtOnce = kWarpSize / kPieces;
        __syncwarp();
        const u32 piece = x.lane % kPieces, r0 = x.lane / kPieces;
        const i32 at = col + static_cast<i32>(piece * (16 / kBytes));
        u8* mid = x.template own<u8>(x.args.mid) + static_cast<i64>(row + r0) * x.args.mid_pitch +
                  static_cast<i64>(at) * kBytes;
        const bool inside = at < x.args.intermediate;
#pragma unroll
        for (u32 i = 0; i < 16 / kRowsAtOnce; ++i)
            ptx::st_global_v4_if(mid + static_cast<i64>(i * kRowsAtOnce) * x.args.mid_pitch,
                                 ptx::ld_shared_v4(chunk_piece(staging(), r0 + i * kRowsAtOnce, piece)), inside);
        __syncwarp();
    }
};

}  // namespace megamoe::mega
