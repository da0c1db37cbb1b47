// The one order of all units of work of a rank, which every role of every CTA follows. Units are tiles: expert by
// expert the first GEMM's ("up") and, a lag behind or after all of these, the second's ("down"). Every unit is handed
// to one CTA, a CTA does its units in ascending order, and a unit waits only for units before it, also through the
// copies of its rows (docs/protocol.md): the least unfinished one can always go on. Plain arithmetic over arrays:
// compiled for the GPU and, in tests, as host C++.
#pragma once
#include "megamoe/common/types.cuh"

namespace megamoe::comm {

// A tile: `rows` valid rows of block `block` of the pool, column tile n, of local expert `expert`.
struct Unit {
    bool down;
    i32 expert, n;
    i32 block;      // of the pool
    i32 first_row;  // of the expert's rows
    i32 rows;
};

// The experts that have rows, in order: rows of it, blocks up to its end, first unit of its two GEMMs.
struct Table {
    u32 *expert, *rows, *block_end, *up, *down;

    MM_DEVICE u32 block_begin(u32 a) const { return a == 0 ? 0 : block_end[a - 1]; }
    MM_DEVICE u32 blocks(u32 a) const { return block_end[a] - block_begin(a); }
};

struct Order {
    Table table;
    u32 up_tiles, down_tiles;  // column tiles of a block
    u32 lag;                   // up units handed out between an expert's and its down units,
    bool ups_first;            // or all of them

    struct Totals {
        u32 active, blocks;
    };

    // By all lanes of one warp: table.rows of `slots` experts in, the experts that have rows out. What is overwritten
    // was read, since an expert's place is at most its number.
    template <class Lanes>
    MM_DEVICE Totals compact(const Lanes& lanes, u32 slots, u32 block_rows) const {
        u32 active = 0, blocks = 0;
        for (u32 first = 0; first < slots; first += Lanes::kCount) {
            const u32 i = first + lanes.lane();
            const u32 rows = i < slots ? table.rows[i] : 0;
            const u32 end = lanes.inclusive_sum(ceil_div(rows, block_rows));
            const u32 mask = lanes.ballot(rows > 0);
            if (rows > 0) {
                const u32 a = active + lanes.before(mask);
                table.expert[a] = i, table.rows[a] = rows, table.block_end[a] = blocks + end;
            }
            active += lanes.count(mask);
            blocks += lanes.last(end);
            lanes.sync();
        }
        return {active, blocks};
    }

    // First units of active expert a.
    MM_DEVICE void place(u32 a, u32 active) const {
        const u32 begin = table.block_begin(a);
        table.down[a] = table.block_end[leader(a, active)] * up_tiles + begin * down_tiles;
        // Down units before this expert's up units: of the experts whose leader stands before it.
        u32 low = 0, high = a;
        while (low < high) {
            const u32 mid = (low + high) / 2;
            if (leader(mid, active) < a)
                low = mid + 1;
            else
                high = mid;
        }
        table.up[a] = begin * up_tiles + table.block_begin(low) * down_tiles;
    }

  private:
    // An expert's down units come behind all up units of its leader: the first expert, itself or later, by whose end
    // `lag` up units have been handed out behind its own; the last if there is none, or none has more than a block.
    MM_DEVICE u32 leader(u32 a, u32 active) const {
        if (ups_first || table.block_end[active - 1] == active) return active - 1;
        const u32 units = table.block_end[a] * up_tiles + lag;
        u32 low = a, high = active - 1;
        while (low < high) {
            const u32 mid = (low + high) / 2;
            if (table.block_end[mid] * up_tiles >= units)
                high = mid;
            else
                low = mid + 1;
        }
        return low;
    }
};

// Units to tiles, for units that only grow.
struct Walk {
    Table table;
    u32 units, active, up_tiles, down_tiles;
    u32 a_up = 0, a_down = 0;

    // rows = -1 behind the last. An expert's blocks are taken kBand at a time, column tile after column tile of a band:
    // all up tiles of a block kBand or more before another of the expert stand before all of that one's.
    template <u32 kBlockRows, u32 kBand>
    MM_DEVICE Unit at(u32 unit) {
        if (unit >= units) return Unit{false, 0, 0, 0, 0, -1};
        while (a_up < active && unit >= table.up[a_up] + table.blocks(a_up) * up_tiles) ++a_up;
        const bool down = a_up == active || unit < table.up[a_up];
        if (down)
            while (unit >= table.down[a_down] + table.blocks(a_down) * down_tiles) ++a_down;
        const u32 a = down ? a_down : a_up, in = unit - (down ? table.down[a] : table.up[a]);
        const u32 per_band = kBand * (down ? down_tiles : up_tiles), before = in / per_band * kBand;
        const u32 height = min_of(table.blocks(a) - before, kBand), m = before + in % per_band % height;
        const i32 first_row = m * kBlockRows;
        return Unit{down,
                    static_cast<i32>(table.expert[a]),
                    static_cast<i32>(in % per_band / height),
                    static_cast<i32>(table.block_begin(a) + m),
                    first_row,
                    min_of(static_cast<i32>(table.rows[a]) - first_row, static_cast<i32>(kBlockRows))};
    }
};

// What a copying warp takes at a time: rows to copy into the pool or, `cast`, activations to cast; from `first_row` of
// the expert's on; none if rows = 0.
struct Group {
    bool cast;
    u32 expert, block, first_row, rows;
};

// Groups of kGroupRows rows, expert by expert, for numbers that only grow. With casts, an expert's stand behind the
// copies of those experts that have `lag` blocks more, or of all: lag * up_tiles <= Order::lag, so that what such a
// copy waits for, a place in the pool, is due to up units that stand before the expert's down units.
struct GroupWalk {
    Table table;
    u32 active, lag;
    u32 a = 0, cast = 0;  // the expert that is copied, and the next to be cast
    bool casts = false;   // at hand are those behind the copies of a
    u32 first = 0;        // number of the first group at hand

    // rows = 0 behind the last.
    template <u32 kBlockRows, u32 kGroupRows>
    MM_DEVICE Group at(u32 number, bool with_casts) {
        static_assert(kBlockRows % kGroupRows == 0);
        while (a < active) {
            const u32 of = casts ? cast : a, rows = table.rows[of], row = (number - first) * kGroupRows;
            if (row < rows) {
                const u32 block = table.block_begin(of) + row / kBlockRows;
                return {casts, table.expert[of], block, row, min_of(rows - row, kGroupRows)};
            }
            first += ceil_div(rows, kGroupRows);
            cast += casts;
            casts = with_casts && cast < active && is_behind();
            a += !casts;
        }
        return {};
    }

  private:
    MM_DEVICE bool is_behind() const { return a == active - 1 || table.block_end[a] >= table.block_end[cast] + lag; }
};

}  // namespace megamoe::comm
