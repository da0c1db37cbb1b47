// Rows of results that warps sum into y, against plain loops. Returns 1 at the first element that is wrong.
#include "copies.hpp"
#include "megamoe/mega/combine.cuh"

namespace {

using namespace megamoe::mega;

template <int kRoutes>
struct Config {
    static constexpr int routes = kRoutes, num_stages = 4;
};

float rounded(float v) {
    return from_bf16(to_bf16(v));
}

// Every token of a rank of `world`, by `ctas` CTAs.
template <int kRoutes>
int sum(int hidden, int tokens, int ctas, int world) {
    using C = Config<kRoutes>;
    constexpr int kSlots = 3;
    std::vector<i32> slots(tokens * kRoutes);
    for (auto& slot : slots) slot = std::rand() % 4 == 0 ? -1 : std::rand() % (world * kSlots);
    std::vector<u16> results(tokens * kRoutes * hidden), y(tokens * (hidden + 8), 0xeeee);
    // So far apart that their order counts.
    for (auto& word : results)
        word = to_bf16(std::ldexp(std::rand() / static_cast<float>(RAND_MAX) - 0.5f, std::rand() % 24));
    Args args{};
    args.own = reinterpret_cast<u64>(results.data()), args.results = 0, args.hidden = hidden;
    args.y = y.data(), args.y_ld = hidden + 8, args.slots_here = kSlots, args.world = world;

    for (int cta = 0; cta < ctas; ++cta)
        for (u32 warp = 0; warp < kMathWarps; ++warp) {
            Copies copies;
            copies.begin = results.data(), copies.end = results.data() + results.size();
            copies_here = &copies;
            run_warp([&](u32 lane) {
                Context<C> x{args, lane, tokens, warp, static_cast<u32>(cta), static_cast<u32>(ctas)};
                x.slot_of = slots.data(), x.routes = kRoutes;
                Combine<C> combine{x};
                combine.lay_out();
                combine.sum(combine.open(cta * kMathWarps + warp));
            });
            copies.finish();
        }

    for (int t = 0; t < tokens; ++t)
        for (int c = 0; c < hidden + 8; ++c) {
            float total = 0;
            for (int owner = 0; owner < world; ++owner) {
                float partial = 0;
                for (int k = 0; k < kRoutes; ++k)
                    if (const i32 slot = slots[t * kRoutes + k]; slot >= 0 && slot / kSlots == owner && c < hidden)
                        partial += from_bf16(results[(t * kRoutes + k) * hidden + c]);
                total += rounded(partial);
            }
            const u16 got = y[t * (hidden + 8) + c], want = c < hidden ? to_bf16(total) : 0xeeee;
            if (got != want && !(c < hidden && from_bf16(got) == from_bf16(want))) {
                std::printf("%d routes, %d columns, %d CTAs, token %d, column %d: got %g, expected %g\n", kRoutes,
                            hidden, ctas, t, c, from_bf16(got), from_bf16(want));
                std::exit(1);
            }
        }
    return tokens;
}

}  // namespace

int main() {
    int summed = 0;
    summed += sum<1>(264, 3, 1, 2);
    summed += sum<6>(1288, 10, 1, 2);  // whole tokens of two steps for some warps, parts for others
    summed += sum<6>(264, 2, 3, 2);
    summed += sum<8>(8, 9, 1, 1);
    summed += sum<16>(520, 9, 1, 4);
    std::printf("%d tokens summed\n", summed);
}
