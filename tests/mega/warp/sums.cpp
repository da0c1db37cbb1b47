// Rows of results that warps sum into y, and rows kept by an owner that they sum for the sources, against plain loops.
// Returns 1 at the first element that is wrong.
#include <utility>

#include "copies.hpp"
#include "megamoe/mega/combine.cuh"

namespace {

using namespace megamoe::mega;

template <int kRoutes, bool kPartialSums>
struct Config {
    static constexpr int routes = kRoutes, num_stages = 4;
    static constexpr bool partial_sums = kPartialSums;
};

// Nothing to wait for: the rows are there.
template <template <class> class Rows>
struct There {
    template <class C>
    struct Of : Rows<C> {
        void await() {}
    };
};

float rounded(float v) {
    return from_bf16(to_bf16(v));
}

// Numbers so far apart that the order of a sum counts.
std::vector<u16> draw(size_t count) {
    std::vector<u16> words(count);
    for (auto& word : words)
        word = to_bf16(std::ldexp(std::rand() / static_cast<float>(RAND_MAX) - 0.5f, std::rand() % 24));
    return words;
}

bool same(u16 got, u16 want) {
    return got == want || from_bf16(got) == from_bf16(want);
}

// Every token of a rank of `world`, by `ctas` CTAs. With partial sums there is a row for each owner only.
template <int kRoutes, bool kPartialSums = false>
int sum(int hidden, int tokens, int ctas, int world) {
    using C = Config<kRoutes, kPartialSums>;
    constexpr int kSlots = 3;
    std::vector<i32> slots(tokens * kRoutes);
    for (auto& slot : slots) slot = std::rand() % 4 == 0 ? -1 : std::rand() % (world * kSlots);
    std::vector<u16> results = draw(tokens * kRoutes * hidden), y(tokens * (hidden + 8), 0xeeee);
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
                AddRows<C, There<ArrivedRows>::Of> rows{{{x}}, {}};
                if (lane == 0) rows.init_barriers();
                rows.lay_out();
                rows.sum(rows.open(cta * kMathWarps + warp));
            });
            copies.finish();
        }

    for (int t = 0; t < tokens; ++t)
        for (int c = 0; c < hidden + 8; ++c) {
            float total = 0;
            for (int owner = 0; owner < world; ++owner) {
                float partial = 0;
                bool any = false;
                for (int k = 0; k < kRoutes; ++k)
                    if (const i32 slot = slots[t * kRoutes + k]; slot >= 0 && slot / kSlots == owner && c < hidden)
                        if (!kPartialSums || !std::exchange(any, true))
                            partial += from_bf16(results[(t * kRoutes + k) * hidden + c]);
                total += rounded(partial);
            }
            const u16 got = y[t * (hidden + 8) + c], want = c < hidden ? to_bf16(total) : 0xeeee;
            if (!same(got, want)) {
                std::printf("%d routes, %d columns, %d CTAs, token %d, column %d: got %g, expected %g\n", kRoutes,
                            hidden, ctas, t, c, from_bf16(got), from_bf16(want));
                std::exit(1);
            }
        }
    return tokens;
}

// Rows that one owner keeps for all tokens of `world` sources, by `ctas` CTAs.
template <int kRoutes>
int keep(int hidden, int tokens, int ctas, int world) {
    using C = Config<kRoutes, true>;
    constexpr u32 kSlots = 5;
    struct Kept {
        u32 source, token, k, expert;
    };
    std::vector<Kept> all;
    for (int s = 0; s < world; ++s)
        for (int t = 0; t < tokens; ++t)
            for (int k = 0; k < kRoutes; ++k)
                if (std::rand() % 3 != 0)
                    all.push_back({u32(s), u32(t), u32(k), std::rand() % 2 ? 1 : std::rand() % kSlots});
    for (auto& kept : all) kept.expert -= kept.expert == 3;  // which has no rows
    for (size_t i = all.size(); i > 1; --i) std::swap(all[i - 1], all[std::rand() % i]);
    std::stable_sort(all.begin(), all.end(), [](const Kept& a, const Kept& b) {
        return std::pair{a.expert, a.source} < std::pair{b.expert, b.source};
    });
    // As the sources have told, and where each route's row lies: experts in order, whole blocks.
    const u32 most = tokens * kRoutes;
    std::vector<Route> routes(world * most);
    std::vector<u32> offsets(world * (kSlots + 1)), rows(all.size());
    std::vector<std::vector<u32>> number(world, std::vector<u32>(most, ~0u));
    std::vector<u32> expert, count, block_end;
    for (size_t i = 0; i < all.size(); ++i) {
        if (expert.empty() || expert.back() != all[i].expert)
            expert.push_back(all[i].expert), count.push_back(0),
                block_end.push_back(expert.size() > 1 ? block_end.back() : 0);
        const u32 begin = block_end.size() > 1 ? block_end[block_end.size() - 2] : 0;
        rows[i] = begin * kBlockRows + count.back()++;
        block_end.back() = begin + ceil_div(count.back(), u32(kBlockRows));
        u32& at = offsets[all[i].source * (kSlots + 1) + kSlots];
        number[all[i].source][all[i].token * kRoutes + all[i].k] = at++;
        for (u32 e = all[i].expert + 1; e < kSlots; ++e) ++offsets[all[i].source * (kSlots + 1) + e];
    }
    std::vector<u16> returns = draw((block_end.back() + 1) * kBlockRows * hidden);
    std::vector<std::vector<u16>> results(world, std::vector<u16>(most * hidden, 0xeeee)), want = results;
    for (int s = 0; s < world; ++s)
        for (int t = 0; t < tokens; ++t) {
            std::vector<float> sum(hidden, 0.f);
            i32 first = -1, last = -1;
            for (int k = 0; k < kRoutes; ++k) {
                const u32 n = number[s][t * kRoutes + k];
                if (n == ~0u) continue;
                routes[s * most + n] = {0, u32(t * kRoutes + k), 1.f, first < 0 ? kFirstHere : 0};
                if (last >= 0) routes[s * most + last].next |= n + 1;
                if (first < 0) first = t * kRoutes + k;
                last = n;
                for (size_t i = 0; i < all.size(); ++i)
                    if (all[i].source == u32(s) && all[i].token == u32(t) && all[i].k == u32(k))
                        for (int c = 0; c < hidden; ++c) sum[c] += from_bf16(returns[rows[i] * hidden + c]);
            }
            for (int c = 0; first >= 0 && c < hidden; ++c) want[s][first * hidden + c] = to_bf16(sum[c]);
        }
    std::vector<u64> bases;
    for (auto& r : results) bases.push_back(reinterpret_cast<u64>(r.data()));
    const std::vector<u16> before = returns;
    // One memory of this rank: what is kept, then the routes.
    std::vector<u8> own(returns.size() * 2 + routes.size() * sizeof(Route));
    std::memcpy(own.data(), returns.data(), returns.size() * 2);
    std::memcpy(own.data() + returns.size() * 2, routes.data(), routes.size() * sizeof(Route));
    Args args{};
    args.own = reinterpret_cast<u64>(own.data()), args.returns = 0, args.routes = returns.size() * 2;
    args.hidden = hidden, args.max_tokens = tokens, args.slots_here = kSlots, args.world = world;
    args.bases = bases.data(), args.results = 0, args.rank = world - 1;
    u32 active = expert.size();
    for (int cta = 0; cta < ctas; ++cta)
        for (u32 warp = 0; warp < kMathWarps; ++warp) {
            Copies copies;
            copies.begin = own.data(), copies.end = own.data() + returns.size() * 2;
            copies_here = &copies;
            run_warp([&](u32 lane) {
                Context<C> x{args, lane, tokens, warp, static_cast<u32>(cta), static_cast<u32>(ctas)};
                x.offsets = offsets.data(), x.num_active = &active, x.shared = copies.shared.data();
                x.table = {expert.data(), count.data(), block_end.data(), nullptr, nullptr};
                AddRows<C, There<KeptRows>::Of> kept{{{x}}, {}};
                if (lane == 0) kept.init_barriers();
                kept.sum(kept.open());
            });
            copies.finish();
        }
    for (int s = 0; s < world; ++s)
        for (size_t i = 0; i < want[s].size(); ++i)
            if (!same(results[s][i], want[s][i])) {
                std::printf(
                    "kept: %d routes, %d columns, %d CTAs, source %d, route %zu, column %zu: got %g, expected %g\n",
                    kRoutes, hidden, ctas, s, i / hidden, i % hidden, from_bf16(results[s][i]), from_bf16(want[s][i]));
                std::exit(1);
            }
    return tokens * world;
}

}  // namespace

int main() {
    int summed = 0;
    summed += sum<1>(264, 3, 1, 2);
    summed += sum<6>(1288, 10, 1, 2);  // whole tokens of two steps for some warps, parts for others
    summed += sum<6>(264, 2, 3, 2);
    summed += sum<8>(8, 9, 1, 1);
    summed += sum<16>(520, 9, 1, 4);
    summed += sum<6, true>(1288, 10, 1, 2);
    summed += sum<16, true>(520, 9, 1, 4);
    int kept = 0;
    kept += keep<1>(264, 70, 1, 2);
    kept += keep<6>(1288, 11, 2, 3);
    kept += keep<16>(520, 20, 1, 2);
    std::printf("%d tokens summed, %d kept\n", summed, kept);
}
