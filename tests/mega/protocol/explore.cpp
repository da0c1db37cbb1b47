// explore KIND FIRST_SEED COUNT [RANKS]: runs the protocol under the scheduler. KIND: calm (nobody fails), dies (a rank
// is gone at some step), stalls (a rank or one thread stops for a while, shorter or longer than the limit; then, if
// anybody has given up, reset() and right results again). Prints a line of totals; exits with 1 at the first fault.
#include <cstring>

#include "host.hpp"
#include "scheduler.hpp"

namespace {

struct Totals {
    u64 launches = 0, records = 0, first_hand = 0, recovered = 0;
} totals;

u64 run(World& W, Fate fate, const std::function<void(u32 rank, u32 cta, u32 role)>& body) {
    Scheduler scheduler(W, fate);
    for (u32 rank = 0; rank < W.R; ++rank)
        for (u32 cta = 0; cta < W.C; ++cta)
            for (u32 role = 0; role < kRoles; ++role)
                scheduler.start(rank, [&body, rank, cta, role] { body(rank, cta, role); });
    scheduler.run();
    return scheduler.fate_struck ? scheduler.clock - scheduler.fate_struck : 0;
}

// Every record names the rank that was missing. Returns how many there are.
u32 name(World& W, u32 missing, bool dead) {
    u32 records = 0;
    for (u32 rank = 0; rank < W.R; ++rank) {
        const Record& r = W.records[rank];
        if (r.phase == 0 || (dead && rank == missing)) continue;
        ++records;
        if (r.rank != rank) fail("a record of another rank", W.seed, rank, r.rank);
        if (r.peer != missing) fail("a record names the wrong rank", W.seed, rank, r.phase, r.peer);
        const u32 phase = r.phase == u32(Phase::kPeer) ? r.expected : r.phase;
        const bool own = phase == u32(Phase::kGrid) || phase == u32(Phase::kTiles) || phase == u32(Phase::kCopies) ||
                         phase == u32(Phase::kKept);
        const u32 author = r.phase == u32(Phase::kPeer) ? r.index : rank;
        if (phase == 0 || phase == u32(Phase::kPeer) || phase == u32(Phase::kRing) || (own && author != missing))
            fail("a record of the wrong phase", W.seed, rank, phase, author);
        totals.first_hand += r.phase != u32(Phase::kPeer);
    }
    totals.records += records;
    return records;
}

void calm(World& W, u32 calls_each) {
    run(W, {}, [&](u32 rank, u32 cta, u32 role) { calls(W, rank, cta, role, 0, calls_each, 0); });
    for (u32 rank = 0; rank < W.R; ++rank)
        if (W.records[rank].phase) fail("a wait expired though nobody was late", W.seed, rank, W.records[rank].phase);
    totals.launches += u64{W.R} * calls_each;
}

// About how many accesses a rank makes, so that a fate strikes anywhere among them, or once in a while too late.
u64 length(u64 seed, u32 R, u32 C, u32 n, u32 rank) {
    World W(seed, R, C);
    u64 routes = 0;
    for (u32 e = 0; e < n; ++e) routes += W.tokens(rank, e) * W.K;
    const u64 a_route = W.partial_sums ? 50 : 30;
    return (n * C * (40 + R * (8 + 3 * W.S)) + routes * a_route) * 3 / 2;
}

void dies(World& W, u32 n, Random& r) {
    Fate fate{Fate::kDies, r.below(W.R)};
    fate.at = 1 + r.next() % length(W.seed, W.R, W.C, n, fate.rank);
    const u32 ahead = r.below(3);
    const u64 took = run(W, fate, [&](u32 rank, u32 cta, u32 role) { calls(W, rank, cta, role, 0, n, ahead); });
    name(W, fate.rank, true);
    // Time passes in steps of up to 5/64 of the limit; the most patient waits have half of it more.
    if (took > kLimit * 7 / 4) fail("survivors left late: ms, of", W.seed, took / 1000000, kLimit / 1000000);
    totals.launches += W.R - 1;
}

void stalls(World& W, u32 n, Random& r) {
    Fate fate{Fate::kStalls, r.below(W.R)};
    if (r.below(2)) fate.thread = r.below(W.C * kRoles);
    fate.at = 1 + r.next() % length(W.seed, W.R, W.C, n, fate.rank);
    const bool brief = r.below(3) == 0;
    fate.ns = brief ? kLimit / 2 + r.below(kLimit / 4) : kLimit + r.next() % (2 * kLimit);
    const u32 ahead = r.below(3);
    u32 given_up = 0;
    run(W, fate, [&](u32 rank, u32 cta, u32 role) {
        calls(W, rank, cta, role, 0, n, ahead);
        ++W.finished;
        meet<true>(W.world_gate(), W.R * W.C * kRoles);
        if (rank == 0 && cta == 0 && role == 0) given_up = name(W, fate.rank, false);
        reset(W, rank, cta, role);
        calls(W, rank, cta, role, n, n + 2, 0);
        if (W.records[rank].phase) fail("a wait expired after reset", W.seed, rank, W.records[rank].phase);
    });
    if (brief && given_up) fail("a rank gave up on one that was only late", W.seed, given_up);
    totals.recovered += given_up > 0;
    totals.launches += u64{W.R} * 2;
}

}  // namespace

int main(int, char** argv) {
    const u64 first = std::strtoull(argv[2], nullptr, 10), count = std::strtoull(argv[3], nullptr, 10);
    for (u64 seed = first; seed < first + count; ++seed) {
        Random r{seed * 7919};
        const u32 few[] = {1, 2, 2, 3, 4, 5, 8};
        u32 R = argv[4] ? std::strtoul(argv[4], nullptr, 10) : few[r.below(7)];
        if (R == 1 && std::strcmp(argv[1], "dies") == 0) R = 2;
        World W(seed, R, R >= 16 ? 1 : 1 + r.below(3));
        const u32 n = R >= 16 ? 2 : 2 + r.below(3);
        if (std::strcmp(argv[1], "calm") == 0) calm(W, n);
        if (std::strcmp(argv[1], "dies") == 0) dies(W, n, r);
        if (std::strcmp(argv[1], "stalls") == 0) stalls(W, n, r);
    }
    std::printf("%llu seeds, %llu launches, %llu records, %llu first-hand, %llu resets\n", count, totals.launches,
                totals.records, totals.first_hand, totals.recovered);
}
