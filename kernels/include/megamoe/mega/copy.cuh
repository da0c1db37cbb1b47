// Rows from the regions, where sources push each once, into blocks of the pool, expert by expert: what the loader's
// copies read. Two warps a CTA take groups of rows by ticket, in the order of blocks. The pool is a ring: a block
// takes the place of one whose tiles have all been computed. In fp8_row the same warps cast activations, in groups that
// stand among the copies.
#pragma once
#include "megamoe/mega/cast_rows.cuh"
#include "megamoe/mega/move_rows.cuh"
#include "megamoe/mega/push.cuh"
#include "megamoe/mega/schedule.cuh"

namespace megamoe::mega {

template <class C>
struct Copier {
    // In place of a ticket: no rows, while headers are on their way, so that the instructions are there when rows are.
    static constexpr u32 kRehearsal = 0xffffffff;

    Context<C> x;
    Stopwatch<C::trace> watch;
    comm::GroupWalk walk{table_of(x), 0, 0};
    u32 complete = 0;  // experts that have rows, all of which have come
    // The group at hand, of the expert number walk.a of those that have rows.
    comm::Group g{};
    u32 row = 0, region = 0;  // lane l: where its row l lies, in the region that begins there

    MM_DEVICE void run() {
        u32 ticket = kRehearsal;
        if (x.warp == kCopyFirst) {
            Planner<C>{x}.touch();
            complete = 1;
        } else {
            begin();
            ticket = ticket_of(draw());
            take(ticket);
        }
        while (ticket == kRehearsal || g.rows > 0) {
            // The first warp's first group is that of the CTA's number, the others go by ticket.
            u32 drawn = x.cta - x.ctas;
            if (ticket != kRehearsal) drawn = draw();
            // The first groups are waited for: what takes time and helps later ones comes behind them, or not at all.
            const bool later = ticket != kRehearsal && ticket >= 2 * x.ctas;
            const comm::Group done = g;
            const bool written = C::row_scaled && g.cast ? cast_rows() : copy_rows(later);
            if (ticket == kRehearsal) {
                ptx::named_barrier_sync(kPlanned, kHelperThreads);
                begin();
                complete = 0;
            }
            if (!later) finish(done, written);
            ticket = ticket_of(drawn);
            take(ticket);  // its routes are on their way while this group's rows are stored
            if (later) finish(done, written);
        }
        watch.finish();
    }

  private:
    MM_DEVICE void begin() {
        walk.active = *x.word(kNumActive), walk.lag = static_cast<u32>(x.args.lag / x.args.up_tiles);
    }

    // What the next group's ticket is made of, in lane 0: on its way while the group at hand is copied.
    MM_DEVICE u32 draw() const {
        u32 t = 0;
        if (x.lane == 0) t = ptx::atom_increment_relaxed_gpu(&x.control()->copy_ticket);
        return t;
    }
    MM_DEVICE u32 ticket_of(u32 drawn) const { return __shfl_sync(0xffffffffu, drawn, 0) + x.ctas; }

    // Routes came with the plan, before the rows.
    MM_DEVICE void take(u32 ticket) {
        g = walk.at<u32{kBlockRows}, u32{kCopyRowsOf}>(ticket, C::row_scaled);
        if (g.rows == 0 || g.cast) return;
        u32 source;
        const Route* route = find_route(x, g.expert, g.first_row + min_of(x.lane, g.rows - 1), source);
        row = ptx::ld_global_cg_u32(&route->row), region = source * x.args.max_tokens;
    }

    // What has been written is there for all: count the group.
    MM_DEVICE void finish(const comm::Group& of, bool written) {
        __syncwarp();
        if (x.lane == 0 && written && of.rows > 0)
            comm::count_tile(x.waits.mem, x.counters(of.cast ? x.args.casts_done : x.args.copied) + of.block);
        stop(kCopyRows, of);
    }

    // Activations, when all tiles of their block have been computed. False if the launch is void.
    MM_DEVICE bool cast_rows() {
        watch.start();
        if (x.lane == 0) comm::await_tiles(x.waits, x.counters(x.args.tiles_done), g.block, x.args.up_tiles);
        __syncwarp();
        stop(kCopyPlace, g);
        if (__any_sync(0xffffffffu, x.waits.aborted())) return false;
        RowCaster<C>{x}.cast(static_cast<i64>(g.block) * kBlockRows + g.first_row % kBlockRows, g.rows);
        return true;
    }

    // False if the launch is void.
    MM_DEVICE bool copy_rows(bool look) {
        watch.start();
        if (complete <= walk.a) await(look);
        stop(kCopyWait, g);
        const u32 ring = x.args.ring_blocks;
        if (g.block >= ring && x.lane == 0)
            comm::await_tiles(x.waits, x.counters(x.args.tiles_done), g.block - ring, x.args.up_tiles);
        __syncwarp();
        stop(kCopyPlace, g);
        if (__any_sync(0xffffffffu, x.waits.aborted())) return false;
        RowMover<C>{x}.move(region + row, g.block % ring * kBlockRows + g.first_row % kBlockRows, g.rows);
        return true;
    }

    // The rows of the expert at hand, and of all before it. `look`: first whether those of experts behind it have come
    // already, as they have for most of a long call.
    MM_DEVICE void await(bool look) {
        const bool start = complete == 0;
        const u32 *arrived = x.template own<u32>(x.args.arrived), *targets = x.template own<u32>(x.args.targets);
        const u32* experts = table_of(x).expert;
        if (look) {
            const bool there =
                comm::rows_there(x.waits, arrived, targets, x.slots(), experts, complete, walk.active, x.lane);
            const u32 missing = ~__ballot_sync(0xffffffffu, there);
            complete += (missing == 0 ? kWarpSize : __ffs(missing) - 1) / x.world();
        }
        if (complete <= walk.a) {
            comm::await_rows(x.waits, arrived, targets, x.slots(), experts, complete, walk.a, x.lane, kWarpSize);
            complete = walk.a + 1;
        }
        __syncwarp();
        if (start && x.warp == kCopyFirst && x.lane == 0) x.stamp(kFirstRows);
    }

    MM_DEVICE void stop(Spent spent, const comm::Group& of) {
        if (of.rows > 0)
            watch.stop(spent, comm::Unit{of.cast, i32(of.expert), 0, i32(of.block), i32(of.first_row), i32(of.rows)});
    }
};

}  // namespace megamoe::mega
