// Dispatch by all threads of some CTAs, for every rank: what owners are told, and what each CTA has to push, against
// plain loops. Prints how many routes there were; returns 1 at the first thing that is wrong.
#include <map>
#include <set>
#include <utility>

#include "megamoe/mega/dispatch.cuh"

namespace {

using namespace megamoe::mega;

constexpr u32 kWorld = 2, kSlots = 5, kMaxTokens = 600, kBlocks = 900, kK = 4, kSlotsInAll = kWorld * kSlots;

struct Config {
    static constexpr bool row_scaled = true, index_64 = true, partial_sums = true;
    static constexpr int routes = kK, top_k = kK;
};

[[noreturn]] void wrong(const char* what, int tokens, u32 rank, u32 owner, u32 at) {
    std::printf("%s: %d tokens, rank %u, owner %u, at %u\n", what, tokens, rank, owner, at);
    std::exit(1);
}

// One rank's memory, and its tokens in the call at hand.
struct Rank {
    std::vector<u64> memory;
    Args args{};
    comm::Control control{};
    std::vector<i64> topk_idx;
    std::vector<float> weights;
    std::vector<i32> slot_of;
    int tokens = 0;
    std::vector<u32> pushes;  // of each CTA
    i64 alarm = 0;

    Rank(u32 rank, u64* bases) {
        i64 end = 0;
        auto field = [&end](i64 bytes) { return std::exchange(end, end + (bytes + 255) / 256 * 256); };
        args.header_flags = field(kWorld * 4), args.offsets = field(kWorld * (kSlots + 1) * 4);
        args.targets = field(kWorld * kSlots * 4), args.routes = field(kWorld * kMaxTokens * kK * 16);
        args.sent = field(kSlotsInAll * 4), args.histogram = field(4 * kSlotsInAll * 4);
        args.tiles_done = field(2 * kBlocks * 4), args.copied = field(2 * kBlocks * 4);
        alarm = field(sizeof(comm::Alarm));
        args.casts_done = field(2 * kBlocks * 4), args.pushes = field(kMaxTokens * kWorld * 16);
        memory.assign(end / 8, 0);
        args.rank = rank, args.world = kWorld, args.slots_here = kSlots, args.max_tokens = kMaxTokens;
        args.max_blocks = kBlocks, args.max_copies = kWorld, args.bases = bases;
        args.own = bases[rank] = reinterpret_cast<u64>(memory.data());
    }
    u32* at(i64 field) { return reinterpret_cast<u32*>(args.own + field); }

    void draw(int n) {
        tokens = n;
        topk_idx.clear(), weights.clear(), slot_of.clear();
        for (int i = 0; i < n * int{kK}; ++i) {
            const int e = std::rand() % 6 == 0 ? -1 : std::rand() % (std::rand() % 2 ? kSlotsInAll : 3);
            topk_idx.push_back(e), slot_of.push_back(e);
            weights.push_back(std::rand() / static_cast<float>(RAND_MAX));
        }
        args.topk_idx = topk_idx.data(), args.topk_weights = weights.data();
    }

    void sort(u32 ctas, u32 epoch) {
        for (i64 f : {args.tiles_done, args.copied, args.casts_done})
            for (u32 i = 0; i < 2 * kBlocks; ++i) at(f)[i] = 7;
        pushes.assign(ctas, 0);
        std::vector<std::vector<u64>> shared(ctas, std::vector<u64>(16384));
        run_ctas(ctas, kThreads, [&](u32 cta, u32 thread) {
            Context<Config> x{args, thread % 32, tokens, thread / 32, cta, ctas};
            x.shared = reinterpret_cast<u8*>(shared[cta].data());
            x.slot_of = slot_of.data(), x.routes = kK, x.words = &control;
            x.waits.bases = args.bases, x.waits.rank = args.rank, x.waits.world = kWorld, x.waits.epoch = epoch;
            x.waits.alarm_offset = alarm, x.waits.limit_ns = 50'000'000'000;
            const u32 n = Dispatch<Config>{x}.run();
            if (thread == 0) pushes[cta] = n;
        });
    }

    // Token t's routes to the owner, by slot there: {slot, k}.
    std::set<std::pair<u32, u32>> of(int t, u32 owner) const {
        std::set<std::pair<u32, u32>> found;
        for (u32 k = 0; k < kK; ++k)
            if (const i32 s = slot_of[t * kK + k]; s >= 0 && s / kSlots == owner) found.insert({s % kSlots, k});
        return found;
    }
};

int check(Rank& source, Rank& owner, u32 ctas, u32 epoch, std::vector<u32>& sent) {
    const u32 from = source.args.rank, to = owner.args.rank;
    const int T = source.tokens;
    if (owner.at(owner.args.header_flags)[from] != epoch + 1) wrong("a flag", T, from, to, 0);
    std::map<u32, u32> rows;  // of tokens
    for (u32 cta = 0; cta < ctas; ++cta) {
        const u32 first = T * cta / ctas, end = T * (cta + 1) / ctas;
        const auto* list = reinterpret_cast<Push*>(source.at(source.args.pushes)) + first * kWorld;
        for (u32 i = 0; i < source.pushes[cta]; ++i) {
            const Push& p = list[i];
            if (p.owner != to) continue;
            if (p.token < first || p.token >= end) wrong("a push of another slice", T, from, to, i);
            const auto routes = source.of(p.token, to);
            if (routes.empty() || routes.begin()->first != p.slot)
                wrong("a push with the wrong expert", T, from, to, i);
            if (!rows.insert({p.token, p.row}).second) wrong("a row pushed twice", T, from, to, i);
            ++sent[p.slot];
        }
    }
    std::set<u32> distinct;
    for (auto [token, row] : rows)
        if (row >= kMaxTokens || !distinct.insert(row).second) wrong("two tokens in one row", T, from, to, token);
    const u32* offsets = owner.at(owner.args.offsets) + from * (kSlots + 1);
    const auto* routes = reinterpret_cast<Route*>(owner.at(owner.args.routes)) + from * kMaxTokens * kK;
    std::set<std::pair<u32, u32>> told;  // expert, route
    for (u32 e = 0; e < kSlots; ++e) {
        if (offsets[0] != 0 || offsets[e] > offsets[e + 1]) wrong("offsets", T, from, to, e);
        if (owner.at(owner.args.targets)[from * kSlots + e] != sent[e]) wrong("a target", T, from, to, e);
        for (u32 i = offsets[e]; i < offsets[e + 1]; ++i) {
            const Route& r = routes[i];
            if (!told.insert({e, r.slot}).second) wrong("a route told twice", T, from, to, i);
            if (r.weight != source.weights[r.slot]) wrong("a weight", T, from, to, i);
            if (!rows.contains(r.slot / kK) || rows[r.slot / kK] != r.row) wrong("a route's row", T, from, to, i);
        }
    }
    // A token's routes here are a chain, k ascending.
    for (u32 i = 0; i < offsets[kSlots]; ++i) {
        u32 before = 0, after = 0;
        for (u32 j = 0; j < offsets[kSlots]; ++j) {
            if (routes[j].slot / kK != routes[i].slot / kK) continue;
            before += routes[j].slot < routes[i].slot;
            if (routes[j].slot > routes[i].slot && (after == 0 || routes[j].slot < routes[after - 1].slot))
                after = j + 1;
        }
        if (routes[i].next != (after | (before == 0 ? kFirstHere : 0))) wrong("a route's next", T, from, to, i);
    }
    std::set<std::pair<u32, u32>> want;
    for (int t = 0; t < T; ++t)
        for (auto [e, k] : source.of(t, to)) want.insert({e, t * kK + k});
    if (told != want) wrong("routes", T, from, to, want.size());
    return want.size();
}

}  // namespace

int main() {
    u64 bases[kWorld];
    Rank ranks[kWorld] = {Rank(0, bases), Rank(1, bases)};
    std::vector<u32> sent[kWorld][kWorld];
    for (auto& of : sent)
        for (auto& counts : of) counts.assign(kSlots, 0);
    const int few = kFewRoutes / kK;
    int routes = 0;
    u32 epoch = 0;
    for (auto [first, second] : {std::pair{few, few + 1}, {600, 1}, {0, 37}, {1, 500}, {few + 1, 0}, {130, few}}) {
        const u32 ctas = 1 + epoch % 3;
        ranks[0].draw(first), ranks[1].draw(second);
        for (Rank& r : ranks) r.sort(ctas, epoch);
        for (Rank& source : ranks)
            for (Rank& owner : ranks) {
                auto& counts = sent[source.args.rank][owner.args.rank];
                routes += check(source, owner, ctas, epoch, counts);
            }
        for (Rank& r : ranks) {
            for (i64 f : {r.args.tiles_done, r.args.copied, r.args.casts_done})
                for (u32 i = 0; i < 2 * kBlocks; ++i)
                    if (r.at(f)[i] != (i / kBlocks == (epoch & 1) ? 7 : 0))
                        wrong("a counter", r.tokens, r.args.rank, 0, i);
            for (u32 i = 0; i < 2 * kSlotsInAll; ++i)
                if (r.at(r.args.histogram)[(~epoch & 1) * 2 * kSlotsInAll + i] != 0)
                    wrong("the next histogram", r.tokens, r.args.rank, 0, i);
        }
        ++epoch;
    }
    std::printf("%d routes\n", routes);
}
