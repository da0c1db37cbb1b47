// One lane keeps the ring full by TMA: weights, which wait for nobody, and blocks of rows: copied together from what
// the sources pushed (up), or activations that this rank's CTAs have written (down).
#pragma once
#include "megamoe/mega/schedule.cuh"
#include "megamoe/ptx/tma.cuh"

namespace megamoe::mega {

template <class C>
struct Loader {
    using L = Layout<C>;
    static constexpr i32 kBlockK = kRowBytes / C::Elem::kBytes, kFewRows = 16;

    Context<C> x;
    typename Context<C>::Ring ring{x.smem + L::kBarriersAt};
    Notes<C> notes{x.smem};
    Stopwatch<C::trace> watch;

    MM_DEVICE void run() {
        for (;; notes.advance()) {
            watch.start();
            const Tile t = notes.await_ready(x.ring_limit);
            watch.stop(kLoadNote);
            if (t.rows < 0) break;
            load(t);
        }
        watch.write(x.traced(), kLoadEmpty, kLoadNote);
    }

  private:
    MM_DEVICE void load(const Tile& t) {
        const i32 blocks = t.down ? x.args.down_kb : x.args.up_kb;
        // Up, gated: 128 columns of gate, then the 128 of up that belong to them.
        i32 row[2];
        if (t.down || C::parts == 1) {
            const i32 columns = C::parts == 1 && !t.down ? x.args.intermediate : x.args.hidden;
            row[0] = t.expert * columns + t.n * kTileCols;
            row[1] = row[0] + kHalfCols;
        } else {
            row[0] = t.expert * 2 * x.args.intermediate + t.n * kHalfCols;
            row[1] = row[0] + x.args.intermediate;
        }
        // A block of few rows is read 16 rows at a time: the rest would be as many bytes as weights.
        const i32 pieces = t.rows > kBlockRows / 2 ? 0 : ceil_div(t.rows, kFewRows);
        const u32 bytes = L::kB + L::kScales + (pieces == 0 ? L::kA : pieces * kFewRows * kRowBytes);

        // Weights for the stages that are free, before the rows are asked for.
        auto ahead = ring;
        i32 weights = 0;
        for (; weights < blocks && weights < C::num_stages; ++weights, ahead.advance()) {
            if (!ptx::mbarrier_test(ahead.empty(ahead.stage), ahead.parity ^ 1)) break;
            load_weights(t, ahead.stage, row, weights, bytes);
        }
        watch.start();
        await(t);
        watch.stop(kLoadRows);
        for (i32 kb = 0; kb < blocks; ++kb) {
            if (kb >= weights) {
                watch.start();
                ring.wait_empty(x.ring_limit);
                watch.stop(kLoadEmpty);
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
#pragma unroll
        for (int half = 0; half < 2; ++half)
            ptx::tma_load_2d(b + half * kHalfCols * kRowBytes, map, full, kb * kBlockK, row[half], ptx::kEvictNormal);
    }

    // Until the block's rows, or activations, are there. If the launch is void, what is loaded is void too, and the
    // ring stays in step.
    MM_DEVICE void await(const Tile& t) {
        if (t.down) {
            comm::await_tiles(x.waits, x.template own<u32>(x.args.tiles_done), t.block, x.args.up_tiles);
        } else {
            comm::await_copies(x.waits, x.template own<u32>(x.args.copied), t.block, ceil_div(t.rows, kCopyRowsOf));
        }
        ptx::fence_proxy_async();
    }

    MM_DEVICE void load_rows(const Tile& t, i32 kb, i32 pieces) const {
        const u32 full = ring.full(ring.stage), a = x.smem + ring.stage * L::kStage;
        const i32 block = t.down ? t.block : t.block % x.args.ring_blocks, y = block * kBlockRows;
        if (pieces == 0) {
            ptx::tma_load_2d(a, t.down ? &x.args.map_mid : &x.args.map_pool, full, kb * kBlockK, y, ptx::kEvictNormal);
        } else {
            const TensorMap* map = t.down ? &x.args.map_mid_few : &x.args.map_pool_few;
            for (i32 i = 0; i < pieces; ++i)
                ptx::tma_load_2d(a + i * kFewRows * kRowBytes, map, full, kb * kBlockK, y + i * kFewRows,
                                 ptx::kEvictNormal);
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
