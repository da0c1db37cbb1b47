// One lane keeps the ring full by TMA: weights, which wait for nobody, and blocks of rows: copied together from what
// the sources pushed (up), or activations that this rank's CTAs have written (down).
#pragma once
#include "megamoe/mega/schedule.cuh"
#include "megamoe/ptx/tma.cuh"

namespace megamoe::mega {

template <class C>
struct Loader {
    using L = Layout<C>;
    static constexpr i32 kFewRows = 16, kVeryFewRows = 32;
    static constexpr i32 kNowhere = 1 << 30;  // a row outside of every tensor: zeros
    // Stages of weights before the first tile's rows: more would hold up the copying of rows.
    static constexpr i32 kFirstWeights = 1;

    Context<C> x;
    typename Context<C>::Ring ring{x.smem + L::kBarriersAt};
    Notes<C> notes{x.smem};
    Stopwatch<C::trace> watch{x, kTrackLoad, true};
    bool begun = false;       // with the first tile
    bool rows_there = false;  // of the tile to come

    MM_DEVICE void run() {
        for (;; notes.advance()) {
            watch.start();
            const Tile t = notes.await_told(x.ring_limit);
            watch.stop(kLoadNote, t);
            if (t.rows < 0) break;
            load(t);
        }
        watch.finish();
    }

  private:
    MM_DEVICE void load(const Tile& t) {
        const i32 blocks = t.down ? x.args.down_kb : x.args.up_kb;
        const i32 row[2] = {weight_row<C>(x.args, t.down, t.expert, t.n, 0),
                            weight_row<C>(x.args, t.down, t.expert, t.n, 1)};
        // A block of few rows is read 16 rows at a time: the rest would be as many bytes as weights. Where the expert
        // has other blocks, weights come from L2 and the clock follows the power: rows that are not there become
        // zeros, of which the tensor cores take least.
        const bool last = t.first_row > 0;
        const i32 pieces = t.rows > kBlockRows / 2 ? 0 : ceil_div(last ? kBlockRows / 2 : t.rows, kFewRows);
        const u32 bytes = L::kB + L::kScales + (pieces == 0 ? L::kA : pieces * kFewRows * kRowBytes);

        // Weights for the stages that are free, before the rows are asked for.
        auto ahead = ring;
        i32 weights = 0;
        for (; weights < blocks && weights < (begun ? C::num_stages : kFirstWeights); ++weights, ahead.advance()) {
            if (!ptx::mbarrier_test(ahead.empty(ahead.stage), ahead.parity ^ 1)) break;
            load_weights(t, ahead.stage, row, weights, bytes);
        }
        begun = true;
        watch.start();
        if (!rows_there) await(t);
        rows_there = false;
        watch.stop(kLoadRows, t);
        for (i32 kb = 0; kb < blocks; ++kb) {
            // Asking takes as long as a k-block: better now, while the ring is full, than between two tiles.
            if (!rows_there && kb >= blocks / 2) rows_there = look_ahead();
            if (kb >= weights) {
                watch.start();
                ring.wait_empty(x.ring_limit);
                watch.stop(kLoadEmpty, t);
                load_weights(t, ring.stage, row, kb, bytes);
            }
            load_rows(t, kb, pieces);
            ring.advance();
        }
    }

    MM_DEVICE void load_weights(const Tile& t, u32 stage, const i32 (&row)[2], i32 kb, u32 bytes) const {
        const TensorMap* map = t.down ? &x.args.map_w2 : &x.args.map_w13;
        const u32 full = ring.full(stage), b = x.smem + stage * L::kStage + L::kA;
        ptx::mbarrier_arrive_expect_tx(full, kb == 0 ? bytes + L::kRowScales : bytes);
        // Weights that no other block of rows needs must not drive from L2 what others do. With very few rows nothing
        // else is of any size, and the hint costs more than it brings.
        const bool once = t.first_row == 0 && t.rows < kBlockRows;
        const u64 keep = once && (t.down || t.rows > kVeryFewRows) ? ptx::kEvictFirst : ptx::kEvictNormal;
#pragma unroll
        for (int i = 0; i < kWeightCopies; ++i)
            ptx::tma_load_2d(b + i * kCopyColumns * kRowBytes, map, full, kb * kBlockK<C>,
                             row[i % 2] + i / 2 * weight_step<C>(t.down), keep);
    }

    // Whether the rows of the next tile are known to be there.
    MM_DEVICE bool look_ahead() const {
        Notes<C> next = notes;
        next.advance();
        if (!ptx::mbarrier_test(next.told(next.slot), next.parity)) return false;
        const Tile t = next.read();
        if (t.rows < 0) return false;
        const bool there =
            t.down && !C::row_scaled
                ? x.waits.template reached<false>(x.counters(x.args.tiles_done) + t.block, x.args.up_tiles)
                : x.waits.template reached<false>(x.counters(groups_done(t)) + t.block, ceil_div(t.rows, kCopyRowsOf));
        if (there) ptx::fence_proxy_async();
        return there;
    }

    // Until the block's rows, or activations, are there. If the launch is void, what is loaded is void too, and the
    // ring stays in step.
    MM_DEVICE void await(const Tile& t) {
        if (t.down && !C::row_scaled) {
            comm::await_tiles(x.waits, x.counters(x.args.tiles_done), t.block, x.args.up_tiles);
        } else {
            comm::await_copies(x.waits, x.counters(groups_done(t)), t.block, ceil_div(t.rows, kCopyRowsOf));
        }
        ptx::fence_proxy_async();
    }

    // Which field counts groups of the tile's rows.
    MM_DEVICE i64 groups_done(const Tile& t) const {
        return C::row_scaled && t.down ? x.args.casts_done : x.args.copied;
    }

    MM_DEVICE void load_rows(const Tile& t, i32 kb, i32 pieces) const {
        const u32 full = ring.full(ring.stage), a = x.smem + ring.stage * L::kStage;
        const i32 block = t.down ? t.block : t.block % x.args.ring_blocks, y = block * kBlockRows;
        if (pieces == 0) {
            ptx::tma_load_2d(a, t.down ? &x.args.map_mid : &x.args.map_pool, full, kb * kBlockK<C>, y,
                             ptx::kEvictNormal);
        } else {
            const TensorMap* map = t.down ? &x.args.map_mid_few : &x.args.map_pool_few;
            for (i32 i = 0; i < pieces; ++i)
                ptx::tma_load_2d(a + i * kFewRows * kRowBytes, map, full, kb * kBlockK<C>,
                                 i * kFewRows < t.rows ? y + i * kFewRows : kNowhere, ptx::kEvictNormal);
        }
        if constexpr (C::block_scaled)
            ptx::tma_load_2d(x.smem + L::kScalesAt + ring.stage * L::kScales,
                             t.down ? &x.args.map_mid_scales : &x.args.map_pool_scales, full, y, kb, ptx::kEvictNormal);
        if (C::row_scaled && kb == 0)  // with the first k-block; the epilogue reads them
            ptx::tma_load_2d(x.smem + L::kRowScalesAt + notes.slot * L::kRowScales,
                             t.down ? &x.args.map_mid_scales : &x.args.map_pool_scales, full, y, 0, ptx::kEvictNormal);
    }
};

}  // namespace megamoe::mega
