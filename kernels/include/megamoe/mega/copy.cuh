// Rows from the regions, where sources push each once, into blocks of the pool, expert by expert: what the loader's
// copies read. Two warps a CTA take groups of rows by ticket, in the order of blocks. The pool is a ring: a block
// takes the place of one whose tiles have all been computed. In fp8_row the same warps cast activations, in groups that
// stand among the copies.
#pragma once
#include "megamoe/mega/cast_rows.cuh"
#include "megamoe/mega/push.cuh"
#include "megamoe/mega/schedule.cuh"

namespace megamoe::mega {

template <class C>
struct Copier {
    // In place of a ticket: no rows, while headers are on their way, so that the instructions are there when rows are.
    static constexpr u32 kRehearsal = 0xffffffff;
    static constexpr u32 kInFlight = C::copies, kPieceBytes = kWarpSize / 2 * 16;

    Context<C> x;
    Stopwatch<C::trace> watch;
    u32 complete = 0;  // experts that have rows, all of which have come

    MM_DEVICE void run() {
        comm::GroupWalk walk{table_of(x), 0, 0};
        u32 ticket = kRehearsal;
        if (x.warp == kCopyFirst) {
            Planner<C>{x}.touch();
            complete = 1;
        } else {
            begin(walk);
            ticket = __shfl_sync(0xffffffffu, draw(), 0);
        }
        for (;;) {
            // The first warp's first group is that of the CTA's number, the others go by ticket.
            u32 after = x.cta;  // in lane 0
            comm::Group g{};
            if (ticket != kRehearsal) {
                after = draw();
                g = walk.at<u32{kBlockRows}, u32{kCopyRowsOf}>(ticket, C::row_scaled);
                if (g.rows == 0) break;
            }
            if (C::row_scaled && g.cast)
                cast(g);
            else
                copy(g, walk.a);
            if (g.rows == 0) {
                ptx::named_barrier_sync(kPlanned, kHelperThreads);
                begin(walk);
                complete = 0;
            }
            ticket = __shfl_sync(0xffffffffu, after, 0);
        }
        watch.finish();
    }

  private:
    MM_DEVICE void begin(comm::GroupWalk& walk) const {
        walk.active = *x.word(kNumActive), walk.lag = static_cast<u32>(x.args.lag / x.args.up_tiles);
    }

    // The next group's ticket, in lane 0: on its way while the group at hand is copied.
    MM_DEVICE u32 draw() const {
        u32 t = 0;
        if (x.lane == 0) t = x.ctas + ptx::atom_add_relaxed_gpu(&x.control()->copy_ticket, 1);
        return t;
    }

    // Activations, when all tiles of their block have been computed.
    MM_DEVICE void cast(const comm::Group& g) {
        const comm::Unit what{true, i32(g.expert), 0, i32(g.block), i32(g.first_row), i32(g.rows)};
        watch.start();
        if (x.lane == 0) comm::await_tiles(x.waits, x.counters(x.args.tiles_done), g.block, x.args.up_tiles);
        __syncwarp();
        watch.stop(kCopyPlace, what);
        if (__any_sync(0xffffffffu, x.waits.aborted())) return;
        RowCaster<C>{x}.cast(static_cast<i64>(g.block) * kBlockRows + g.first_row % kBlockRows, g.rows);
        __syncwarp();
        if (x.lane == 0) comm::count_tile(x.waits.mem, x.counters(x.args.casts_done) + g.block);
        watch.stop(kCopyRows, what);
    }

    // Of the expert number `active` of those that have rows.
    MM_DEVICE void copy(const comm::Group& g, u32 active) {
        const u32 block = g.block, expert = g.expert, first = g.first_row, n = g.rows;
        const comm::Unit what{false, i32(expert), 0, i32(block), i32(first), i32(n)};
        auto stop = [&](Spent spent) {
            if (n > 0) watch.stop(spent, what);
        };
        watch.start();
        // Routes came with the plan, before the rows that are awaited now.
        uint4 route;
        u32 mine = 0;  // row first + lane: where it lies in the regions
        if (x.lane < n) {
            const u32 source = find_route(x, expert, first + x.lane, route);
            mine = source * x.args.max_tokens + route.x;
        }
        if (complete <= active) {
            const bool start = complete == 0;
            comm::await_rows(x.waits, x.template own<u32>(x.args.arrived), x.template own<u32>(x.args.targets),
                             x.slots(), table_of(x).expert, complete, active, x.lane, kWarpSize);
            __syncwarp();
            complete = active + 1;
            if (start && x.warp == kCopyFirst && x.lane == 0) x.stamp(kFirstRows);
        }
        stop(kCopyWait);
        const u32 ring = x.args.ring_blocks;
        if (block >= ring && x.lane == 0)
            comm::await_tiles(x.waits, x.counters(x.args.tiles_done), block - ring, x.args.up_tiles);
        __syncwarp();
        stop(kCopyPlace);
        if (__any_sync(0xffffffffu, x.waits.aborted())) return;

        const u32 to_row = block % ring * kBlockRows + first % kBlockRows;
        copy_rows(mine, to_row, n);
        if constexpr (C::block_scaled || C::row_scaled) copy_scales(mine, to_row, n);
        __syncwarp();
        if (x.lane == 0 && n > 0) comm::count_tile(x.waits.mem, x.counters(x.args.copied) + block);
        stop(kCopyRows);
    }

    // Two at a time, one by each half of the warp.
    MM_DEVICE void copy_rows(u32 mine, u32 to_row, u32 n) const {
        const u32 pitch = x.args.row_pitch, half = x.lane / (kWarpSize / 2), col = x.lane % (kWarpSize / 2) * 16;
        u32 to = (to_row + half) * pitch + col;
#pragma unroll 1
        for (u32 r = half; r < max_of(n, 1u) + half; r += 2, to += 2 * pitch) {
            const u8* from = x.template own<u8>(x.args.rows) +
                             static_cast<i64>(__shfl_sync(0xffffffffu, mine, min_of(r, n - 1))) * pitch + col;
#pragma unroll 1
            for (u32 at = 0; at < pitch; at += kInFlight * kPieceBytes) {
                const i32 left = r < n ? static_cast<i32>(pitch - at - col) : 0;  // from this lane's first piece on
                uint4 v[kInFlight];
#pragma unroll
                for (u32 j = 0; j < kInFlight; ++j)
                    if (static_cast<i32>(j * kPieceBytes) < left)
                        v[j] = ptx::ld_global_cg_v4(from + at + j * kPieceBytes);
                u8* pool = x.template own<u8>(x.args.pool) + to + at;
#pragma unroll
                for (u32 j = 0; j < kInFlight; ++j)
                    if (static_cast<i32>(j * kPieceBytes) < left) ptx::st_global_v4(pool + j * kPieceBytes, v[j]);
            }
        }
    }

    // Transposed on the way, so that a k-block's scales lie together: lane l has row l % 4, k-blocks l / 4 + 8 i.
    MM_DEVICE void copy_scales(u32 mine, u32 to_row, u32 n) const {
        const u32 r = x.lane % kCopyRowsOf;
        const i64 row = __shfl_sync(0xffffffffu, mine, r);
        const float* from = x.template own<float>(x.args.row_scales) + row * x.args.scale_pitch;
        float* to = x.template own<float>(x.args.pool_scales) + to_row + r;
        const i64 rows = static_cast<i64>(x.args.ring_blocks) * kBlockRows;
        constexpr u32 kStep = kWarpSize / kCopyRowsOf;
        const u32 scales = C::row_scaled ? 1 : u32(x.args.up_kb);
#pragma unroll 4
        for (u32 kb = x.lane / kCopyRowsOf; kb < scales; kb += kStep)
            if (r < n) to[kb * rows] = __uint_as_float(ptx::ld_global_cg_u32(reinterpret_cast<const u32*>(from + kb)));
    }
};

}  // namespace megamoe::mega
