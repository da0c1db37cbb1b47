// The leading warp: takes tickets, notes what the tiles are one ahead of the math warps, and settles each when they
// are done with it.
#pragma once
#include "megamoe/mega/schedule.cuh"

namespace megamoe::mega {

template <class C>
struct Leader {
    using L = Layout<C>;
    static constexpr int kRowsPerLane = kBlockRows / kWarpSize;

    Context<C> x;
    Notes<C> notes{x.smem};
    Stopwatch<C::trace> watch{x, kTrackLead, x.lane == 0};

    MM_DEVICE void run() {
        comm::Walk walk = walk_of(x);
        Notes<C> ahead = notes;
        // The first unit of a CTA is the one of its number, the others go by ticket.
        Tile t = find(walk, x.cta);
        note(t, ahead);
        while (t.rows >= 0) {
            const Tile next = take(walk, ahead);
            settle(t);
            t = next;
        }
        watch.finish();
    }

  private:
    MM_DEVICE void settle(const Tile& t) {
        watch.start();
        notes.await_settled(x.ring_limit);
        watch.stop(kLeadSettle, t);
        // Behind the math warps' stores, in the order of the barrier: nobody else has to wait for them.
        if (!t.down && x.lane == 0 && !x.waits.aborted())
            comm::count_tile(x.waits.mem, x.counters(x.args.tiles_done) + t.block);
        __syncwarp();
        notes.advance();
    }

    MM_DEVICE Tile find(comm::Walk& walk, u32 unit) {
        watch.start();
        return walk.at<static_cast<u32>(kBlockRows), kBand>(__shfl_sync(0xffffffffu, unit, 0));
    }

    MM_DEVICE Tile take(comm::Walk& walk, Notes<C>& at) {
        u32 unit = 0;
        if (x.lane == 0) unit = x.ctas + ptx::atom_add_relaxed_gpu(&x.control()->ticket, 1);
        const Tile t = find(walk, unit);
        note(t, at);
        return t;
    }

    // The loader need not wait for the rest of the note.
    MM_DEVICE void tell(const Tile& t, Notes<C>& at) {
        if (x.lane != 0) return;
        at.write(t);
        ptx::mbarrier_arrive(at.told(at.slot));
    }

    MM_DEVICE void note(const Tile& t, Notes<C>& at) {
        tell(t, at);
        if (t.rows >= 0) {
            if (t.down || C::weights_before) note_rows(t, at.note() + L::kNoteRows);
            if constexpr (C::block_scaled) note_scales(t, at.note() + L::kNoteScales);
            if constexpr (C::row_scaled) note_channels(t, at.note() + L::kNoteScales);
        }
        __syncwarp();
        if (x.lane == 0) ptx::mbarrier_arrive(at.ready(at.slot));
        at.advance();
        watch.stop(kLeadNote, t);
    }

    // Of each row: where the tile's first column of it goes, and its weight.
    MM_DEVICE void note_rows(const Tile& t, u32 to) const {
        uint4 route[kRowsPerLane];
        u32 source[kRowsPerLane];
#pragma unroll
        for (int i = 0; i < kRowsPerLane; ++i) {
            const i32 r = i * kWarpSize + x.lane;
            if (r < t.rows) route[i] = ptx::ld_global_cg_v4(find_route(x, t.expert, t.first_row + r, source[i]));
        }
#pragma unroll
        for (int i = 0; i < kRowsPerLane; ++i) {
            const i32 r = i * kWarpSize + x.lane;
            if (r >= t.rows) continue;
            u64 row;
            if constexpr (C::partial_sums)
                row =
                    reinterpret_cast<u64>(x.template own<u16>(x.args.returns) +
                                          static_cast<i64>(t.block * kBlockRows + r) * x.args.hidden + t.n * kTileCols);
            else
                row = reinterpret_cast<u64>(x.template at<u16>(source[i], x.args.results) +
                                            static_cast<i64>(route[i].y) * x.args.hidden + t.n * kTileCols);
            ptx::st_shared_v4(to + r * L::kNoteRow,
                              make_uint4(static_cast<u32>(row), static_cast<u32>(row >> 32), route[i].z, 0));
        }
    }

    // Of the block of gate and the one of up beside it, or of the two neighbours of other tiles.
    MM_DEVICE void note_scales(const Tile& t, u32 to) const {
        const i32 blocks = t.down ? x.args.down_kb : x.args.up_kb;
        const i32 rows = ceil_div(t.down ? x.args.hidden : x.args.intermediate, 128);
        const float* from[2];
        if (t.down || C::parts == 1) {
            const void* scales = C::parts == 1 && !t.down ? x.args.scales_w13 : x.args.scales_w2;
            const float* all = static_cast<const float*>(scales) + static_cast<i64>(t.expert) * rows * blocks;
            from[0] = all + static_cast<i64>(t.n) * 2 * blocks;
            from[1] = all + static_cast<i64>(min_of(t.n * 2 + 1, rows - 1)) * blocks;
        } else {
            from[0] =
                static_cast<const float*>(x.args.scales_w13) + (static_cast<i64>(t.expert) * 2 * rows + t.n) * blocks;
            from[1] = from[0] + static_cast<i64>(rows) * blocks;
        }
        for (i32 kb = x.lane; kb < blocks; kb += kWarpSize) {
            const float a = ptx::ld_global_nc_f32(from[0] + kb), b = ptx::ld_global_nc_f32(from[1] + kb);
            ptx::st_shared_f32(to + kb * 4, a);
            ptx::st_shared_f32(to + (C::max_kb + kb) * 4, b);
        }
    }

    // fp8_row: a scale for each column, of gate and then of up as tiles have them; columns beyond the last have none.
    MM_DEVICE void note_channels(const Tile& t, u32 to) const {
        const bool gated = !t.down && C::parts == 2;
        const i32 cols = t.down ? x.args.hidden : x.args.intermediate;
        const i32 col = t.n * (gated ? kHalfCols : kTileCols) + static_cast<i32>(x.lane) * 4;
        const float* from = static_cast<const float*>(t.down ? x.args.scales_w2 : x.args.scales_w13) +
                            static_cast<i64>(t.expert) * (gated ? 2 * cols : cols) + col;
        const i32 further = gated ? cols : kHalfCols, more = gated ? 0 : kHalfCols;
        uint4 v[2] = {};
        if (col < cols) v[0] = ptx::ld_global_nc_v4(from);
        if (col + more < cols) v[1] = ptx::ld_global_nc_v4(from + further);
#pragma unroll
        for (u32 i = 0; i < 2; ++i) ptx::st_shared_v4(to + (i * kHalfCols + x.lane * 4) * 4, v[i]);
    }
};

}  // namespace megamoe::mega
