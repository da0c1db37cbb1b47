// The tiles of a GEMM whose K is grouped, as every CTA of a grid walks them. For tests/kernels/test_gemm_schedule.py.
#include "megamoe/sched/grouping.cuh"

using namespace megamoe;

struct Config {
    enum class Share { NONE, B, A, SPLIT_K };
    static constexpr Share share = Share::NONE;
    static constexpr int block_m = 128, block_n = 64, block_k = 128, cluster = 1, band = 8;
};

template <int kAlign>
static int walk(const int* table, int groups, int m, int n, int ctas, Tile* tiles, int room) {
    int count = 0;
    gridDim = {static_cast<unsigned>(ctas), 1, 1};
    for (int cta = 0; cta < ctas; ++cta) {
        blockIdx = {static_cast<unsigned>(cta), 0, 0};
        Scheduler<ByK<false, kAlign>, Config> schedule({table, m, 0}, groups, n, 0, 0);
        for (Tile t; schedule.next(t); ++count)
            if (count < room) tiles[count] = t;
    }
    return count;
}

extern "C" int walk_by_128(const int* table, int groups, int m, int n, int ctas, Tile* tiles, int room) {
    return walk<128>(table, groups, m, n, ctas, tiles, room);
}
extern "C" int walk_by_1(const int* table, int groups, int m, int n, int ctas, Tile* tiles, int room) {
    return walk<1>(table, groups, m, n, ctas, tiles, room);
}
