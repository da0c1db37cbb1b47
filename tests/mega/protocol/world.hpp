// Ranks in one process: sizes, the memory of each, random loads, and what y has to be.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "../host_memory.hpp"
#include "megamoe/comm/order.cuh"
#include "megamoe/comm/protocol.cuh"

using megamoe::comm::Control;
using megamoe::comm::Phase;
using megamoe::comm::Record;
using Waits = megamoe::comm::Waits<HostMemory>;

[[noreturn]] inline void fail(const char* what, u64 seed, u32 a = 0, u32 b = 0, u32 c = 0) {
    std::printf("FAILED seed %llu: %s (%u, %u, %u)\n", seed, what, a, b, c);
    std::fflush(stdout);
    std::_Exit(1);
}

// splitmix64
struct Random {
    u64 state;
    u64 next() {
        u64 z = state += 0x9e3779b97f4a7c15ull;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ z >> 27) * 0x94d049bb133111ebull;
        return z ^ z >> 31;
    }
    u32 below(u32 n) { return next() % n; }
};

inline constexpr u32 kBlockRows = 4, kCopyRows = 2, kBand = 2, kRoles = 5, kStages = 3, kRouteWords = 3, kUnitWords = 6,
                     kNoteWords = kUnitWords + 2 * kBlockRows, kFirstHere = 1u << 31, kNaN = 0x7fff7fff,
                     kPoison = 0xdeadbeef;
inline constexpr u64 kLimit = 1000000000;

enum Field {
    kAbort,
    kHeaderFlags,
    kDoneFlags,
    kOffsets,
    kTargets,
    kArrived,
    kRoutes,
    kRows,
    kResults,
    kReturns,
    kControl,
    kHistogram,
    kSent,
    kTilesDone,
    kCopied,
    kCastsDone,
    kPushes,
    kPool,
    kMid,
    kY,
    kHost,
    kCta,
    kFields
};

// Words of one CTA.
enum CtaWord {
    kCtaAbort,
    kPushCount,
    kActive,
    kUnits,
    kGate,
    kFull = kGate + 2,
    kEmpty = kFull + kStages,
    kPlanned = kEmpty + kStages,
    kReady,
    kSettled = kReady + 2,
    kNotes = kSettled + 2,
    kStage = kNotes + 2 * kNoteWords
};
// Words of one rank's host.
enum HostWord { kRankGate = 0, kStop = 2, kHostWords = 3 };

struct World {
    u64 seed;
    u32 R, S, K, T, U, D, C, lag;  // ranks, slots, top-k, most tokens, up and down tiles, CTAs a rank
    u32 up_kb, down_kb;
    u32 ring, pushed_first;  // blocks of the pool; rows that all roles of a CTA push
    u32 few;                 // routes of a rank that one CTA for each owner sorts
    bool ups_first;          // all tiles of the first GEMM before any of the second
    bool casts;              // activations are cast before the second GEMM, as in fp8_row
    bool partial_sums;       // owners add up a token's rows before they send them back
    u32 finished = 0;        // threads that have made their calls: what comes then is not struck by fate
    u32 blocks, cta_words, rank_words;
    u32 at[kFields];
    std::vector<u32> memory;  // of all ranks, then a gate of all
    std::vector<u64> bases;
    std::vector<Record> records;
    std::unique_ptr<std::atomic<u32>[]> computed;  // how often each unit was, by rank

    explicit World(u64 seed, u32 ranks, u32 ctas) : seed(seed), R(ranks), C(ctas) {
        Random r{seed};
        S = 1 + r.below(3), K = 1 + r.below(3), T = 1 + r.below(R > 16 ? 2 : 6), U = 1 + r.below(3);
        D = 1 + r.below(2), lag = r.below(7), up_kb = 1 + r.below(3), down_kb = 1 + r.below(2);
        blocks = (R * T * K + S * (kBlockRows - 1)) / kBlockRows + 1;
        const u32 least = kBand + r.below(2);  // a ring is never under a band, unless it holds all there is
        ring = blocks < least ? blocks : least, pushed_first = r.below(3);
        ups_first = Random{seed ^ 97}.below(2) == 0;
        partial_sums = Random{seed ^ 96}.below(2) == 0, casts = Random{seed ^ 98}.below(2) == 0,
        few = Random{seed ^ 99}.below(T * K + 2);
        cta_words = kStage + kStages * kBlockRows + 5 * S;
        const u32 sizes[kFields] = {4,
                                    R,
                                    R,
                                    R * (S + 1),
                                    R * S,
                                    R * S,
                                    R * T * K * kRouteWords,
                                    R * T,
                                    T * K * D,
                                    partial_sums ? blocks * kBlockRows * D : 0,
                                    sizeof(Control) / 4,
                                    4 * R * S,
                                    R * S,
                                    2 * blocks,
                                    2 * blocks,
                                    2 * blocks,
                                    T * (R < K ? R : K) * 3,
                                    ring * kBlockRows,
                                    blocks * kBlockRows * U,
                                    T * D,
                                    kHostWords,
                                    C * cta_words};
        rank_words = 0;
        for (u32 f = 0; f < kFields; ++f) at[f] = rank_words, rank_words += sizes[f];
        memory.assign(u64{R} * rank_words + 2, 0);
        for (u32 i = 0; i < R; ++i) bases.push_back(reinterpret_cast<u64>(memory.data() + u64{i} * rank_words));
        records.assign(R, Record{});
        computed = std::make_unique<std::atomic<u32>[]>(u64{R} * blocks * (U + D));
    }

    u32* field(u32 rank, Field f) { return memory.data() + u64{rank} * rank_words + at[f]; }
    u32* cta(u32 rank, u32 c) { return field(rank, kCta) + c * cta_words; }
    u32* world_gate() { return memory.data() + u64{R} * rank_words; }
    Control* control(u32 rank) { return reinterpret_cast<Control*>(field(rank, kControl)); }

    // The load of one call.
    u32 tokens(u32 rank, u32 epoch) const {
        Random r{seed ^ u64{rank + 1} << 32 ^ u64{epoch + 1} << 48};
        const u32 kind = r.below(4);
        return kind == 0 ? 0 : kind == 1 ? T : r.below(T + 1);
    }
    i32 slot(u32 rank, u32 epoch, u32 token, u32 k) const {
        Random shape{seed ^ 77 ^ u64{epoch} << 40};
        Random r{seed ^ u64{rank + 1} << 24 ^ u64{epoch + 1} << 44 ^ u64{token + 1} << 8 ^ k};
        r.next();
        const u32 kind = shape.below(5);
        if (kind == 0) return static_cast<i32>(shape.below(R * S));  // all to one expert
        if (r.below(6) == 0) return -1;
        if (kind == 1) return static_cast<i32>(r.below(1 + R * S / 3));
        return static_cast<i32>(r.below(R * S));
    }
    u32 x(u32 rank, u32 epoch, u32 token) const {
        return Random{seed + 31 * rank + 1009 * epoch + token * 7919}.next();
    }

    static u32 up(u32 v, u32 expert, u32 n) { return v * 3 + expert * 7 + n + 1; }
    static u32 cast(u32 activation) { return activation ^ 0x5a5a5a5a; }  // and back
    static u32 down(u32 sum, u32 expert, u32 n) { return sum * (n + 5) + expert; }
    u32 y(u32 rank, u32 epoch, u32 token, u32 n) const {
        u32 total = 0;
        for (u32 k = 0; k < K; ++k) {
            const i32 s = slot(rank, epoch, token, k);
            if (s < 0) continue;
            u32 sum = 0;
            for (u32 c = 0; c < U; ++c) sum += up(x(rank, epoch, token), s % S, c);
            total += down(sum, s % S, n);
        }
        return total;
    }
};
