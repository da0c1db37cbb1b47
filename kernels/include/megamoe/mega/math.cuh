// The math warpgroups: a tile is 128 rows by 256 columns, 128 of gate and the 128 of up that belong to them or 256 of
// the one matrix that is not gated (up), or 256 of y (down).
#pragma once
#include "megamoe/mega/epilogue.cuh"

namespace megamoe::mega {

template <class C>
struct Math {
    using L = Layout<C>;
    using Ring = typename Context<C>::Ring;

    Context<C> x;
    u32 group, warp;  // warpgroup; warp in it
    Ring ring{x.smem + L::kBarriersAt};
    Notes<C> notes{x.smem};
    Stopwatch<C::trace> watch{x, kTrackMath + group, warp == 0 && x.lane == 0};
    u32 exchanges = 0;

    MM_DEVICE void run() {
        notes.parity = Notes<C>::kRehearsal;
        for (;;) {
            watch.start();
            const Tile t = notes.parity == Notes<C>::kRehearsal ? notes.at_hand() : notes.await_ready(x.ring_limit);
            watch.stop(kMathNote, t);
            if (t.rows < 0) break;
            if (has_few_rows(t)) {
                work<true>(t);
            } else {
                work<false>(t);
            }
            if (notes.parity == Notes<C>::kRehearsal) {
                notes.parity = 0;
                continue;
            }
            __syncwarp();
            if (x.lane == 0) ptx::mbarrier_arrive(notes.settled(notes.slot));
            notes.advance();
        }
        watch.finish();
    }

  private:
    template <bool kFewRows>
    MM_DEVICE void work(const Tile& now) {
        using S = Share<kFewRows>;
        const S share{group, warp};
        typename C::template Sum<S::kCols> sum;
        const u32 a = x.smem + (kFewRows ? 0 : group * 64 * kRowBytes);
        const u32 b = x.smem + L::kA + share.first_col() * kRowBytes;
        const i32 blocks = now.rows == 0 ? 0 : now.down ? x.args.down_kb : x.args.up_kb;
        if (C::trace && now.rows > 0) {
            ring.wait_full(x.ring_limit);
            watch.stop(kMathStage, now);
        }
        if constexpr (C::block_scaled) {
            const u32 scales = notes.note() + L::kNoteScales;
            constexpr u32 kSecond = C::max_kb * 4;
            // Whether the tile's two scales are those of neighbouring blocks of columns.
            const bool neighbours = now.down || C::parts == 1;
            ShareScale scale;
            scale.rows = x.smem + L::kScalesAt + (share.first_row() + x.lane / 4) * 4;
            scale.stage_bytes = L::kScales;
            scale.halves = neighbours;
            scale.weights[0] = scales + (kFewRows && neighbours ? group * kSecond : 0);
            scale.weights[1] = scales + (kFewRows && neighbours ? group * kSecond : kSecond);
            sum.run(ring, x.ring_limit, a, b, L::kStage, blocks, x.lane, scale);
        } else {
            NoShareScale none;
            sum.run(ring, x.ring_limit, a, b, L::kStage, blocks, x.lane, none);
        }
        const Tile t = notes.at_hand();  // again: registers are short in the main loop
        if (t.rows > 0) watch.stop(t.down ? kMathDown : kMathUp, t);
        Epilogue<C, kFewRows> epilogue{x, share, notes, exchanges};
        if (t.down) {
            epilogue.down(sum, t);
        } else {
            epilogue.up(sum, t);
        }
        watch.stop(t.down ? kMathStoreDown : kMathStoreUp, t);
    }
};

}  // namespace megamoe::mega
