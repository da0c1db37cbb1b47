// Tiles of work and the order in which they are handed out.
#pragma once
#include "megamoe/common/types.cuh"

namespace megamoe {

// What one CTA computes in one go: rows m0 .. m0+block_m of D, columns n0 .. n0+block_n, k-blocks kb0 .. kb0+num_kb.
struct Tile {
    i32 m0;     // row of A and D; of the group's D where K is grouped
    i32 rows;   // valid rows from m0 on; stores beyond are masked
    i32 n0;     // column of D
    i32 group;  // whose B
    i32 kb0;
    i32 num_kb;
    i32 k0;      // where the group's K begins in A and B; 0 unless K is grouped
    i32 k_tail;  // k of the last k-block that belong to the group, 0 if all do; 0 unless K is grouped
};

// Units walk down bands of `kBand` units of M before they move along N, so that what runs at one time shares its loads
// in L2.
template <int kBand>
MM_DEVICE void walk(i32 unit, i32 units_m, i32 units_n, i32& um, i32& un) {
    const i32 per_band = kBand * units_n;
    const i32 band = unit / per_band, in_band = unit % per_band;
    const i32 height = min_of(kBand, units_m - band * kBand);
    um = band * kBand + in_band % height;
    un = in_band / height;
}

}  // namespace megamoe
