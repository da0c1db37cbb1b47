// The groupings of a GEMM: where a group's rows lie, or its part of K.
//   kGrouped  other groups' rows of D follow a group's
//   kByK      groups own parts of K and a D of m rows each, not rows of A
#pragma once
#include "megamoe/sched/tile.cuh"

namespace megamoe {

// One group: all rows.
struct Dense {
    static constexpr bool kGrouped = false, kByK = false;
    const int* table;
    i32 m, max_m;
    MM_DEVICE i32 begin(i32) const { return 0; }
    MM_DEVICE i32 rows(i32) const { return m; }
};

// Group g owns rows table[g] .. table[g + 1].
struct Contiguous {
    static constexpr bool kGrouped = true, kByK = false;
    const int* table;
    i32 m, max_m;
    MM_DEVICE i32 begin(i32 g) const { return table[g]; }
    MM_DEVICE i32 rows(i32 g) const { return table[g + 1] - table[g]; }
};

// Group g owns the first table[g] of the max_m rows from g * max_m on.
struct Masked {
    static constexpr bool kGrouped = true, kByK = false;
    const int* table;
    i32 m, max_m;
    MM_DEVICE i32 begin(i32 g) const { return g * max_m; }
    MM_DEVICE i32 rows(i32 g) const { return table[g]; }
};

// Group g owns table[g] .. table[g + 1] of K and D[g] of m rows. An empty group's D is zeros, or where it is added to
// (kAdds) left alone. Groups begin at multiples of kAlign: where the table says otherwise the result is void, but
// copies still begin where the copy engine lets them (16 bytes along the inner dimension, or the context is lost).
template <bool kAdds, int kAlign>
struct ByK {
    static constexpr bool kGrouped = true, kByK = true;
    static constexpr int kBeginAlign = kAlign;
    const int* table;
    i32 m, max_m;
    MM_DEVICE i32 begin(i32) const { return 0; }
    MM_DEVICE i32 rows(i32 g) const { return kAdds && k(g) <= 0 ? 0 : m; }
    MM_DEVICE i32 k_begin(i32 g) const { return table[g] / kAlign * kAlign; }
    MM_DEVICE i32 k(i32 g) const { return table[g + 1] - table[g]; }
};

// Persistent round robin over the units of all groups in order; every role of a CTA walks it alike, without talking.
template <class Grouping, class Config>
struct Scheduler {
    static constexpr int kClusterM = Config::share == Config::Share::B ? 2 : 1;
    static constexpr int kClusterN = Config::share == Config::Share::A ? 2 : 1;
    static constexpr int kUnitM = Config::block_m * kClusterM, kUnitN = Config::block_n * kClusterN;

    Grouping grouping;
    i32 num_groups, units_n, total_kb, cta;  // cta: rank in the cluster
    i32 unit, step;
    i32 group = 0, first = 0;  // current group and its first unit

    MM_DEVICE Scheduler(const Grouping& g, i32 groups, i32 n, i32 kb, i32 cta_rank)
        : grouping(g),
          num_groups(groups),
          units_n(ceil_div(n, kUnitN)),
          total_kb(kb),
          cta(cta_rank),
          unit(blockIdx.x / Config::cluster),
          step(gridDim.x / Config::cluster) {}

    MM_DEVICE bool next(Tile& t) {
        i32 rows = 0, units_m = 0;
        for (;; ++group) {
            if (group >= num_groups) return false;
            rows = grouping.rows(group);
            units_m = ceil_div(rows, kUnitM);
            if (unit < first + units_m * units_n) break;
            first += units_m * units_n;
        }
        i32 um, un;
        walk<Config::band>(unit - first, units_m, units_n, um, un);
        const i32 row = um * kUnitM + (kClusterM == 2 ? cta * Config::block_m : 0);
        t.m0 = grouping.begin(group) + row;
        t.rows = rows - row;
        t.n0 = un * kUnitN + (kClusterN == 2 ? cta * Config::block_n : 0);
        t.group = group;
        t.k0 = 0;
        t.k_tail = 0;
        if constexpr (Grouping::kByK) {
            const i32 k = grouping.k(group);
            t.k0 = grouping.k_begin(group);
            t.kb0 = 0;
            t.num_kb = k > 0 ? ceil_div(k, Config::block_k) : 0;
            t.k_tail = k > 0 ? k % Config::block_k : 0;
        } else if constexpr (Config::share == Config::Share::SPLIT_K) {
            t.kb0 = total_kb * cta / Config::cluster;
            t.num_kb = total_kb * (cta + 1) / Config::cluster - t.kb0;
        } else {
            t.kb0 = 0;
            t.num_kb = total_kb;
        }
        unit += step;
        return true;
    }
};

}  // namespace megamoe
