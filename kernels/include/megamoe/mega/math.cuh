// A math warpgroup: 64 of a tile's 128 rows, by 256 columns. Up: 128 columns of gate and the 128 of up beside them, so
// that a pair meets in one thread, or 256 of the one matrix that is not gated; down: 256 columns of y.
#pragma once
#include "megamoe/mega/activation.cuh"
#include "megamoe/mega/cast_rows.cuh"
#include "megamoe/mega/schedule.cuh"
#include "megamoe/mma/mainloop.cuh"
#include "megamoe/quant/values.cuh"

namespace megamoe::mega {

// Scales of one k-block: of this thread's two rows, in the stage; of the weights' two blocks, in the tile's note.
template <int kPitch>
struct StagedScale {
    u32 rows, stage_bytes, weights;
    float sa[2], sb[2];

    MM_DEVICE void load(i32 kb) {
        sb[0] = ptx::ld_shared_f32(weights + kb * 4);
        sb[1] = ptx::ld_shared_f32(weights + kb * 4 + kPitch);
    }
    MM_DEVICE void load_rows(int, u32 stage) {
        sa[0] = ptx::ld_shared_f32(rows + stage * stage_bytes);
        sa[1] = ptx::ld_shared_f32(rows + stage * stage_bytes + 8 * 4);
    }
    template <int N>
    MM_DEVICE void promote(float (&d)[N], const float (&t)[N], int c0) const {
        const float s = sb[c0 / kHalfCols];
        promote_columns(d, t, [&](int) { return make_float2(sa[0] * s, sa[1] * s); });
    }
};

template <class C>
struct Math {
    using L = Layout<C>;
    using Ring = typename Context<C>::Ring;
    using Sum = typename C::template Sum<kTileCols>;  // DirectSum or PromotedSum

    Context<C> x;
    u32 group, warp;  // warpgroup; warp in it
    Ring ring{x.smem + L::kBarriersAt};
    Notes<C> notes{x.smem};
    Stopwatch<C::trace> watch;

    MM_DEVICE void run() {
        for (;; notes.advance()) {
            watch.start();
            const Tile now = notes.await_ready(x.ring_limit);
            watch.stop(kMathNote);
            const i32 rows = now.rows;
            if (rows < 0) break;
            const i32 blocks = now.down ? x.args.down_kb : x.args.up_kb;
            if (rows <= static_cast<i32>(group * 64)) {
                skip(blocks);
            } else {
                Sum sum;
                multiply(sum, blocks);
                const Tile t = notes.read();  // again: registers are short in the main loop
                watch.stop(t.down ? kMathDown : kMathUp);
                if (t.down) {
                    store_down(sum, t);
                } else {
                    store_up(sum, t);
                }
                watch.stop(t.down ? kMathStoreDown : kMathStoreUp);
            }
            __syncwarp();
            if (x.lane == 0) ptx::mbarrier_arrive(notes.settled(notes.slot));
        }
        if (C::trace && group == 0 && warp == 0 && x.lane == 0) watch.write(x.traced(), kMathNote, kMathStoreDown);
    }

  private:
    MM_DEVICE u32 first_row() const { return group * 64 + warp * 16; }
    MM_DEVICE u32 staging() const { return x.smem + L::kStagingAt + (group * 4 + warp) * kChunkBytes; }

    // (source << 24 | slot, weight) of row r of the tile.
    MM_DEVICE uint2 info(u32 r) const { return ptx::ld_shared_v2(notes.note() + L::kNoteRows + r * 8); }
    MM_DEVICE float weight(u32 r) const { return __uint_as_float(info(r).y); }

    // fp8_row: of this thread's row h of the tile.
    MM_DEVICE float row_scale(int h) const {
        return ptx::ld_shared_f32(x.smem + L::kRowScalesAt + notes.slot * L::kRowScales +
                                  (first_row() + x.lane / 4 + 8 * h) * 4);
    }

    MM_DEVICE void skip(i32 blocks) {
        for (i32 kb = 0; kb < blocks; ++kb) {
            ring.wait_full(x.ring_limit);
            ring.release(ring.stage, x.lane);
            ring.advance();
        }
    }

    MM_DEVICE void multiply(Sum& sum, i32 blocks) {
        const u32 a = x.smem + group * 64 * kRowBytes, b = x.smem + L::kA;
        if constexpr (C::block_scaled) {
            StagedScale<C::max_kb * 4> scale;
            scale.rows = x.smem + L::kScalesAt + (first_row() + x.lane / 4) * 4;
            scale.stage_bytes = L::kScales;
            scale.weights = notes.note() + L::kNoteScales;
            sum.clear();
            sum.run(ring, x.ring_limit, a, b, L::kStage, blocks, x.lane, scale);
        } else if constexpr (C::row_scaled) {
            NoScale none;
            sum.clear();
            sum.run(ring, x.ring_limit, a, b, L::kStage, blocks, x.lane, none);
        } else {
            sum.run(ring, x.ring_limit, a, b, L::kStage, blocks, x.lane);
        }
    }

    // Accumulator i (ptx/wgmma.cuh) of columns 128 * half to 128 * half + 127.
    static MM_DEVICE float at(const Sum& sum, int half, int i) {
        if constexpr (C::Elem::kBytes == 1) {
            return sum.d[0][half][i];
        } else {
            return sum.d[half * 64 + i];
        }
    }

    // Activations of this thread's rows lane / 4 and lane / 4 + 8 of the warp, columns `first` + 8 j + 2 (lane % 4) +
    // c; those beyond the last are 0. kHalf: of the accumulators, where the activation is not gated.
    template <int kHalf>
    MM_DEVICE void activate(const Sum& sum, const Tile& t, i32 first, float (&v)[64]) const {
        const i32 inter = x.args.intermediate, col0 = first + x.lane % 4 * 2;
        typename C::Activation act = C::activation(x.args);
        float scale[2] = {1.f, 1.f};
        if constexpr (C::weights_before) {
            scale[0] = weight(first_row() + x.lane / 4);
            scale[1] = weight(first_row() + x.lane / 4 + 8);
        }
        const float* bias = static_cast<const float*>(x.args.bias13) + static_cast<i64>(t.expert) * C::parts * inter;
        const float* channel = nullptr;
        float row[2];
        if constexpr (C::row_scaled) {
            channel = static_cast<const float*>(x.args.scales_w13) + static_cast<i64>(t.expert) * C::parts * inter;
            row[0] = row_scale(0), row[1] = row_scale(1);
        }
#pragma unroll
        for (int j = 0; j < 16; ++j) {
            // Else the compiler asks for all biases at once: the other half's sums still take as many registers.
            if (C::parts == 1 && j % 8 == 0) __syncwarp();
            // I is a multiple of 8: a group of 8 columns exists or does not.
            const i32 col = col0 + 8 * j;
            const bool inside = col < inter;
            float2 b[2];
            if constexpr (C::bias) {
                b[0] = b[1] = make_float2(0.f, 0.f);
                if (inside)
                    b[0] = make_float2(ptx::ld_global_nc_f32(bias + col), ptx::ld_global_nc_f32(bias + col + 1));
                if (C::parts == 2 && inside)
                    b[1] = make_float2(ptx::ld_global_nc_f32(bias + inter + col),
                                       ptx::ld_global_nc_f32(bias + inter + col + 1));
            }
            float2 s[2];
            if constexpr (C::row_scaled) {
                s[0] = s[1] = make_float2(0.f, 0.f);
                if (inside) s[0] = ptx::ld_global_nc_v2_f32(channel + col);
                if (C::parts == 2 && inside) s[1] = ptx::ld_global_nc_v2_f32(channel + inter + col);
            }
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int i = 4 * j + 2 * h;
                float2 gate = make_float2(at(sum, kHalf, i), at(sum, kHalf, i + 1));
                if constexpr (C::row_scaled) gate.x *= row[h] * s[0].x, gate.y *= row[h] * s[0].y;
                if constexpr (C::bias) gate.x += b[0].x, gate.y += b[0].y;
                float2 a;
                if constexpr (C::parts == 2) {
                    float2 up = make_float2(at(sum, 1, i), at(sum, 1, i + 1));
                    if constexpr (C::row_scaled) up.x *= row[h] * s[1].x, up.y *= row[h] * s[1].y;
                    if constexpr (C::bias) up.x += b[1].x, up.y += b[1].y;
                    a = act(gate, up);
                } else {
                    a = act(gate);
                }
                if constexpr (C::weights_before) a.x *= scale[h], a.y *= scale[h];
                v[i] = a.x, v[i + 1] = a.y;
            }
        }
        if (first + kHalfCols > inter) {
#pragma unroll
            for (int i = 0; i < 64; ++i)
                if (col0 + i / 4 * 8 >= inter) v[i] = 0.f;
        }
    }

    // Largest magnitude of row h over the row's four lanes; NaN if one is NaN.
    static MM_DEVICE float row_max(const float (&v)[64], int h) {
        float amax = 0.f;
#pragma unroll
        for (int i = 0; i < 64; ++i)
            if (i / 2 % 2 == h) amax = ptx::max_nan(amax, fabsf(v[i]));
        return quad_max(amax);
    }
    // The same over the finite ones; the others become NaN.
    static MM_DEVICE float finite_max(float (&v)[64], int h) {
        float amax = row_max(v, h);
        if (!quant::is_finite(amax)) {  // rare, and all four lanes of the row come here
            amax = 0.f;
#pragma unroll
            for (int i = 0; i < 64; ++i) {
                if (i / 2 % 2 != h) continue;
                if (quant::is_finite(v[i])) {
                    amax = fmaxf(amax, fabsf(v[i]));
                } else {
                    v[i] = __uint_as_float(0x7fc00000u);
                }
            }
            amax = quad_max(amax);
        }
        return amax;
    }
    static MM_DEVICE float quad_max(float a) {
        const u32 quad = 0xfu << (threadIdx.x % kWarpSize / 4 * 4);
        a = ptx::max_nan(a, __shfl_xor_sync(quad, a, 1));
        return ptx::max_nan(a, __shfl_xor_sync(quad, a, 2));
    }

    MM_DEVICE void store_up(const Sum& sum, const Tile& t) const {
        const i32 first = t.n * (kTileCols / C::parts);
        store_mid<0>(sum, t, first);
        if constexpr (C::parts == 1)
            if (first + kHalfCols < x.args.intermediate) store_mid<1>(sum, t, first + kHalfCols);
        if constexpr (C::row_scaled) RowCaster<C>{x}.settle(t.block, first_row(), t.rows);
    }

    // 128 columns of activations, from `first` on.
    template <int kHalf>
    MM_DEVICE void store_mid(const Sum& sum, const Tile& t, i32 first) const {
        float v[64];
        activate<kHalf>(sum, t, first, v);
        const i32 row = t.block * kBlockRows + first_row();
        if constexpr (C::block_scaled) {
            float inverse[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const quant::Scale s = quant::AnyScale::from(finite_max(v, h));
                inverse[h] = s.inverse;
                if (x.lane % 4 == 0)
                    x.template own<float>(x.args.mid_scales)[static_cast<i64>(first / kHalfCols) * x.args.mid_rows +
                                                             row + x.lane / 4 + 8 * h] = s.value;
            }
#pragma unroll
            for (int j = 0; j < 16; ++j) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int i = 4 * j + 2 * h;
                    const u32 at = chunk_piece(staging(), x.lane / 4 + 8 * h, j / 2) + j % 2 * 8 + x.lane % 4 * 2;
                    ptx::st_shared_u16(at, ptx::cvt_e4m3x2(v[i] * inverse[h], v[i + 1] * inverse[h]));
                }
            }
            write_mid(first, row);
        } else if constexpr (C::row_scaled) {
            // Four lanes write a whole sector of a row.
            const i32 col0 = first + x.lane % 4 * 2;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const i64 at = row + x.lane / 4 + 8 * h;
                const float amax = finite_max(v, h);
                if (x.lane % 4 == 0)
                    x.template own<float>(
                        x.args.mid_scales)[static_cast<i64>(first / kHalfCols) * x.args.mid_rows + at] = amax;
                u8* mid = x.template own<u8>(x.args.mid) + at * x.args.mid_pitch + col0 * 4;
                if (x.waits.aborted()) continue;
#pragma unroll
                for (int j = 0; j < 16; ++j)
                    if (col0 + 8 * j < x.args.intermediate)
                        ptx::st_global_v2_f32(mid + 32 * j, v[4 * j + 2 * h], v[4 * j + 2 * h + 1]);
            }
        } else {
#pragma unroll
            for (int c0 = 0; c0 < kHalfCols; c0 += kChunkCols) {
                stage_chunk<kHalfCols>(staging(), c0, x.lane, [&](int i) { return v[i]; });
                write_mid(first + c0, row);
            }
        }
    }

    // The staged 16 rows of 128 bytes to `mid`, in whole lines; columns beyond the last are zeros, or not written.
    // Nobody waits here: the leading warp says that they are there.
    MM_DEVICE void write_mid(i32 col, i32 row) const {
        constexpr i32 kPerPiece = 16 / C::Elem::kBytes;
        __syncwarp();
        const i32 at = col + static_cast<i32>(x.lane % 8) * kPerPiece;
        u8* mid = x.template own<u8>(x.args.mid) + static_cast<i64>(row) * x.args.mid_pitch + at * C::Elem::kBytes;
        if (at < x.args.intermediate && !x.waits.aborted()) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const u32 r = x.lane / 8 + 4 * i;
                ptx::st_global_v4(mid + static_cast<i64>(r) * x.args.mid_pitch,
                                  ptx::ld_shared_v4(chunk_piece(staging(), r, x.lane % 8)));
            }
        }
        __syncwarp();
    }

    // Each row to its slot at its source: y_e times the top-k weight, in bf16.
    MM_DEVICE void store_down(const Sum& sum, const Tile& t) const {
        const i32 hidden = x.args.hidden, tile_col = t.n * kTileCols;
        float scale[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) scale[h] = weight(first_row() + x.lane / 4 + 8 * h);
        const float* bias = static_cast<const float*>(x.args.bias2) + static_cast<i64>(t.expert) * hidden;
        // This lane writes 16 bytes of rows lane / 8 + 4 i.
        u16* to[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const u32 r = first_row() + x.lane / 8 + 4 * i;
            to[i] = nullptr;
            if (static_cast<i32>(r) < t.rows && !x.waits.aborted()) {
                const u32 slot = info(r).x;
                to[i] = x.template at<u16>(slot >> 24, x.args.results) + static_cast<i64>(slot & 0xffffffu) * hidden +
                        tile_col + x.lane % 8 * 8;
            }
        }
        const float* channels = static_cast<const float*>(x.args.scales_w2) + static_cast<i64>(t.expert) * hidden;
        float row[2];
        float2 channel[kChunkCols / 8];
        if constexpr (C::row_scaled) row[0] = row_scale(0), row[1] = row_scale(1);
        auto value = [&](int i) {
            float v = at(sum, i / 64, i % 64);
            if constexpr (C::row_scaled) {
                const float2 s = channel[i / 4 % (kChunkCols / 8)];
                v *= row[i / 2 % 2] * (i % 2 == 0 ? s.x : s.y);
            }
            const float w = scale[i / 2 % 2];
            if constexpr (C::bias) {
                const i32 col = tile_col + i / 4 * 8 + x.lane % 4 * 2 + i % 2;
                const float b = col < hidden ? ptx::ld_global_nc_f32(bias + col) : 0.f;
                v += C::weights_before ? w * b : b;
            }
            return C::weights_before ? v : v * w;
        };
#pragma unroll
        for (int c0 = 0; c0 < kTileCols; c0 += kChunkCols) {
            __syncwarp();
            if constexpr (C::row_scaled) {
#pragma unroll
                for (int j = 0; j < kChunkCols / 8; ++j) {
                    const i32 col = tile_col + c0 + 8 * j + x.lane % 4 * 2;
                    channel[j] = make_float2(0.f, 0.f);
                    if (col < hidden) channel[j] = ptx::ld_global_nc_v2_f32(channels + col);
                }
            }
            stage_chunk<kTileCols>(staging(), c0, x.lane, value);
            __syncwarp();
            const bool inside = tile_col + c0 + static_cast<i32>(x.lane % 8) * 8 < hidden;
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (to[i] != nullptr && inside)
                    ptx::st_global_v4(to[i] + c0,
                                      ptx::ld_shared_v4(chunk_piece(staging(), x.lane / 8 + 4 * i, x.lane % 8)));
        }
    }
};

}  // namespace megamoe::mega
