// The hosts of the ranks, on threads beside the roles: calls, what is looked at after each, and the reset.
#pragma once
#include "roles.hpp"

// What a rank's host does after a launch that has ended: y must be right, or NaN where a record says so. Returns
// whether the rank stops, as a user does whom check() has raised.
inline bool check(World& W, u32 rank, u32 epoch) {
    HostMemory mem;
    const Record& record = W.records[rank];
    u32 wrong = 0, nan = 0, at = 0;
    const u32 count = W.tokens(rank, epoch) * W.D;
    for (u32 i = 0; i < count; ++i) {
        const u32 v = mem.load(W.field(rank, kY) + i);
        if (v == kNaN)
            ++nan;
        else if (v != W.y(rank, epoch, i / W.D, i % W.D))
            ++wrong, at = i;
        mem.store(W.field(rank, kY) + i, kPoison);
    }
    if (wrong) fail("y is wrong", W.seed, rank, epoch, at);
    if (nan && record.phase == 0) fail("y is NaN without a record", W.seed, rank, epoch);
    u32* computed = reinterpret_cast<u32*>(W.computed.get() + u64{rank} * W.blocks * (W.U + W.D));
    if (record.phase == 0) {
        std::vector<u32> rows(W.S);
        for (u32 s = 0; s < W.R; ++s)
            for (u32 t = 0; t < W.tokens(s, epoch); ++t)
                for (u32 k = 0; k < W.K; ++k)
                    if (const i32 p = W.slot(s, epoch, t, k); p >= 0 && p / W.S == rank) ++rows[p % W.S];
        u32 blocks = 0;
        for (u32 n : rows) blocks += (n + kBlockRows - 1) / kBlockRows;
        for (u32 u = 0; u < W.blocks * (W.U + W.D); ++u)
            if (computed[u] != (u / (W.U + W.D) < blocks)) fail("a tile not computed once", W.seed, rank, epoch, u);
    }
    for (u32 u = 0; u < W.blocks * (W.U + W.D); ++u) computed[u] = 0;
    return record.phase != 0;
}

// One role of one CTA over launches first .. end - 1. `ahead`: launches that the host has queued before it looks.
inline void calls(World& W, u32 rank, u32 cta, u32 role, u32 first, u32 end, u32 ahead) {
    u32* host = W.field(rank, kHost);
    HostMemory mem;
    u32 behind = 0;
    for (u32 epoch = first; epoch < end; ++epoch) {
        Role{{W, rank, cta, role, epoch}}.run();
        meet<false>(host + kRankGate, W.C * kRoles);
        if (cta == 0 && role == 0) {
            behind = check(W, rank, epoch) ? behind + 1 : 0;
            mem.store(host + kStop, behind > ahead);
        }
        meet<false>(host + kRankGate, W.C * kRoles);
        if (mem.load(host + kStop)) return;
    }
}

// All ranks: MegaRunner.reset().
inline void reset(World& W, u32 rank, u32 cta, u32 role) {
    HostMemory mem;
    meet<true>(W.world_gate(), W.R * W.C * kRoles);
    if (cta == 0 && role == 0) {
        for (Field f :
             {kAbort, kHeaderFlags, kDoneFlags, kArrived, kControl, kHistogram, kSent, kTilesDone, kCopied, kCastsDone})
            for (u32 i = W.at[f]; i < W.at[f + 1]; ++i) mem.store(W.field(rank, Field(0)) + i, 0);
        mem.store(W.field(rank, kHost) + kStop, 0);
        W.records[rank] = Record{};
    }
    meet<true>(W.world_gate(), W.R * W.C * kRoles);
}
