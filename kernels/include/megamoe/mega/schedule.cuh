// Who computes what, in which order. Units of work are tiles: expert by expert the first GEMM's ("up"), and, a lag
// behind, the second's ("down"). CTAs take units by a ticket, one ahead of the one at hand; a unit waits only for units
// before it, so the least unfinished unit can always go on.
#pragma once
#include "megamoe/mega/context.cuh"

namespace megamoe::mega {

// The experts that have rows, in order. Shared arrays of max_slots each.
template <class C>
struct Table {
    u32 *expert, *rows, *block_end, *up, *down;  // rows of it, blocks up to its end, first unit of its two GEMMs

    MM_DEVICE explicit Table(const Context<C>& x) {
        u32* p = reinterpret_cast<u32*>(x.shared + Layout<C>::kTableAt);
        constexpr u32 n = C::max_slots;
        expert = p, rows = p + n, block_end = p + 2 * n, up = p + 3 * n, down = p + 4 * n;
    }

    MM_DEVICE u32 block_begin(u32 a) const { return a == 0 ? 0 : block_end[a - 1]; }
};

// Where the routes of source `s` to expert `e` start among all that it sent here, e up to the number of slots.
template <class C>
MM_DEVICE u32 routes_before(const Context<C>& x, u32 s, u32 e) {
    return reinterpret_cast<const u32*>(x.shared + Layout<C>::kOffsetsAt)[s * (x.slots() + 1) + e];
}

// By the helper warps but the pushing one: awaits every rank's header, then fills the table.
template <class C>
struct Planner {
    static constexpr u32 kThreadsHere = 3 * kWarpSize;
    Context<C> x;
    Table<C> table{x};

    MM_DEVICE void run() {
        const u32 tid = threadIdx.x - kMathThreads;
        if (x.warp == kWeights) await_headers();
        ptx::named_barrier_sync(kPlanners, kThreadsHere);
        const bool go = !x.waits.aborted();
        auto* offsets = reinterpret_cast<u32*>(x.shared + Layout<C>::kOffsetsAt);
        for (u32 i = tid; i < x.world() * (x.slots() + 1); i += kThreadsHere)
            offsets[i] = go ? ptx::ld_global_cg_u32(x.template own<u32>(x.args.offsets) + i) : 0;
        ptx::named_barrier_sync(kPlanners, kThreadsHere);
        for (u32 i = tid; i < x.slots(); i += kThreadsHere) {
            u32 rows = 0;
            for (u32 s = 0; s < x.world(); ++s) rows += routes_before(x, s, i + 1) - routes_before(x, s, i);
            table.rows[i] = rows;
        }
        ptx::named_barrier_sync(kPlanners, kThreadsHere);
        if (x.warp == kWeights) compact();
        ptx::named_barrier_sync(kPlanners, kThreadsHere);
        const u32 active = *x.word(kNumActive);
        for (u32 a = tid; a < active; a += kThreadsHere) order(a, active);
    }

  private:
    MM_DEVICE void await_headers() {
        const u32* flags = x.template own<u32>(x.args.header_flags);
        for (u32 s = x.lane; s < x.world(); s += kWarpSize)
            x.waits.template until<true>(flags + s, x.waits.epoch + 1, comm::Phase::kHeader, s, 0);
        __syncwarp();
    }

    // Experts without rows drop out.
    MM_DEVICE void compact() {
        u32 active = 0, blocks = 0;
        for (u32 first = 0; first < x.slots(); first += kWarpSize) {
            const u32 i = first + x.lane;
            const u32 rows = i < x.slots() ? table.rows[i] : 0;
            u32 end = ceil_div(rows, static_cast<u32>(kBlockRows));
#pragma unroll
            for (int step = 1; step < kWarpSize; step *= 2) {
                const u32 other = __shfl_up_sync(0xffffffffu, end, step);
                if (static_cast<int>(x.lane) >= step) end += other;
            }
            const u32 mask = __ballot_sync(0xffffffffu, rows > 0);
            if (rows > 0) {
                const u32 a = active + __popc(mask & ((1u << x.lane) - 1));  // at most i: what is overwritten was read
                table.expert[a] = i, table.rows[a] = rows, table.block_end[a] = blocks + end;
            }
            active += __popc(mask);
            blocks += __shfl_sync(0xffffffffu, end, kWarpSize - 1);
            __syncwarp();
        }
        if (x.lane == 0) {
            *x.word(kNumActive) = active;
            *x.word(kNumUnits) = blocks * (x.args.up_tiles + x.args.down_tiles);
        }
    }

    // Least a >= from with block_end[a] * up_tiles >= units; the last if there is none.
    MM_DEVICE u32 reaching(u32 from, u32 active, u32 units) const {
        u32 low = from, high = active - 1;
        while (low < high) {
            const u32 mid = (low + high) / 2;
            if (table.block_end[mid] * x.args.up_tiles >= units)
                high = mid;
            else
                low = mid + 1;
        }
        return low;
    }

    // An expert's down units come once `lag` up units have been handed out behind its own.
    MM_DEVICE u32 leader(u32 a, u32 active) const {
        return reaching(a, active, table.block_end[a] * x.args.up_tiles + x.args.lag);
    }

    MM_DEVICE void order(u32 a, u32 active) {
        const u32 begin = table.block_begin(a);
        table.down[a] = table.block_end[leader(a, active)] * x.args.up_tiles + begin * x.args.down_tiles;
        // Down units before this expert's up units: of the experts whose leader stands before it.
        u32 low = 0, high = a;
        while (low < high) {
            const u32 mid = (low + high) / 2;
            if (leader(mid, active) < a)
                low = mid + 1;
            else
                high = mid;
        }
        table.up[a] = begin * x.args.up_tiles + table.block_begin(low) * x.args.down_tiles;
    }
};

// Units to tiles, for units that only grow.
template <class C>
struct Walk {
    Table<C> table;
    u32 units, active, up_tiles, down_tiles;
    u32 a_up = 0, a_down = 0;

    MM_DEVICE explicit Walk(const Context<C>& x)
        : table(x),
          units(*x.word(kNumUnits)),
          active(*x.word(kNumActive)),
          up_tiles(x.args.up_tiles),
          down_tiles(x.args.down_tiles) {}

    MM_DEVICE u32 blocks(u32 a) const { return table.block_end[a] - table.block_begin(a); }

    // rows = -1 behind the last.
    MM_DEVICE Tile at(u32 unit) {
        if (unit >= units) return Tile{0, 0, 0, 0, 0, -1, {}};
        while (a_up < active && unit >= table.up[a_up] + blocks(a_up) * up_tiles) ++a_up;
        const bool down = a_up == active || unit < table.up[a_up];
        if (down)
            while (unit >= table.down[a_down] + blocks(a_down) * down_tiles) ++a_down;
        const u32 a = down ? a_down : a_up, in = unit - (down ? table.down[a] : table.up[a]);
        const u32 height = blocks(a), m = in % height;
        Tile t{};
        t.down = down, t.expert = table.expert[a], t.n = in / height;
        t.block = table.block_begin(a) + m;
        t.first_row = m * kBlockRows;
        t.rows = min_of(static_cast<i32>(table.rows[a]) - t.first_row, kBlockRows);
        return t;
    }
};

}  // namespace megamoe::mega
