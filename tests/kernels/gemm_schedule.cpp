// The tiles of a GEMM whose K is grouped, as every CTA of a grid walks them. For tests/kernels/test_gemm_schedule.py.
#include <cstddef>
#include <random>
#include <vector>

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

// Units of grouped rows drawn from one counter: whichever CTA is free, here at random, takes the next.
extern "C" int walk_by_tickets(const int* table, int groups, int n, int ctas, unsigned seed, Tile* tiles, int room) {
    using Schedule = Scheduler<Contiguous, Config>;
    int count = 0, drawn = 0;
    gridDim = {static_cast<unsigned>(ctas), 1, 1};
    std::vector<Schedule> busy;
    for (int cta = 0; cta < ctas; ++cta) {
        blockIdx = {static_cast<unsigned>(cta), 0, 0};
        busy.push_back(Schedule({table, 0, 0}, groups, n, 1, 0));
    }
    std::mt19937 random(seed);
    while (!busy.empty()) {
        const std::size_t i = random() % busy.size();
        Tile t;
        if (!busy[i].next(t)) {
            busy.erase(busy.begin() + static_cast<std::ptrdiff_t>(i));
            continue;
        }
        if (count < room) tiles[count] = t;
        ++count;
        busy[i].unit = busy[i].step + drawn++;
    }
    return count;
}

extern "C" int walk_by_128(const int* table, int groups, int m, int n, int ctas, Tile* tiles, int room) {
    return walk<128>(table, groups, m, n, ctas, tiles, room);
}
extern "C" int walk_by_1(const int* table, int groups, int m, int n, int ctas, Tile* tiles, int room) {
    return walk<1>(table, groups, m, n, ctas, tiles, room);
}
