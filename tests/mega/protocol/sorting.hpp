// How a CTA of the model sorts its tokens, tells the owners, and lists the rows that it has to push: what
// mega/dispatch.cuh does, in plain loops.
#pragma once
#include "world.hpp"

namespace comm = megamoe::comm;

// What every role of a CTA knows, and the sort, which one of them does.
struct Sorter {
    World& W;
    u32 rank, cta, role, epoch;
    HostMemory mem{};
    u32* c = W.cta(rank, cta);
    Waits w{mem,
            W.bases.data(),
            W.at[kAbort] * 4,
            c + kCtaAbort,
            kLimit,
            &W.records[rank],
            rank,
            W.R,
            cta,
            mem.load_acquire(&W.control(rank)->epoch)};
    u32 tokens = W.tokens(rank, epoch);

    u64 offset(Field f) const { return W.at[f] * 4; }
    u32 first_token() const { return tokens * cta / W.C; }
    u32 end_token() const { return tokens * (cta + 1) / W.C; }
    u32* pushes() { return W.field(rank, kPushes) + first_token() * (W.R < W.K ? W.R : W.K) * 3; }

    // The first, in the order of slots, of the token's routes to the same owner.
    i32 head(u32 t, u32 k) const {
        i32 best = -1;
        for (u32 j = 0; j < W.K; ++j) {
            const i32 s = W.slot(rank, epoch, t, j);
            if (s < 0 || s / W.S != W.slot(rank, epoch, t, k) / W.S) continue;
            if (best < 0 || s < W.slot(rank, epoch, t, best)) best = j;
        }
        return best;
    }

    // This launch's counters of blocks.
    u32* counters(Field f) { return W.field(rank, f) + w.epoch % 2 * W.blocks; }

    void dispatch() {
        mem.store(c + kPushCount, 0);
        const u32 count = tokens * W.K <= W.few ? sort_alone() : sort_together();
        // The next launch's counters.
        const u32 next = (w.epoch + 1) % 2;
        for (u32 i = cta; i < W.blocks; i += W.C)
            for (const Field f : {kTilesDone, kCopied, kCastsDone})
                mem.store(W.field(rank, f) + next * W.blocks + i, 0);
        for (u32 i = cta; i < 2 * W.R * W.S; i += W.C)
            mem.store(W.field(rank, kHistogram) + next * 2 * W.R * W.S + i, 0);
        mem.store(c + kPushCount, count);
    }

    void list(u32 i, u32 token, u32 row, u32 slot) {
        u32* push = pushes() + i * 3;
        mem.store(push, token), mem.store(push + 1, row), mem.store(push + 2, slot);
    }
    // number_of(k): the number that route k of the token has at the owner.
    template <class NumberOf>
    void send_route(u32 owner, u32 row, u32 t, u32 k, const NumberOf& number_of) {
        u32* route = W.field(owner, kRoutes) + (rank * W.T * W.K + number_of(k)) * kRouteWords;
        mem.store(route, row);
        mem.store(route + 1, t * W.K + k);
        if (!W.partial_sums) return;
        u32 next = kFirstHere;
        for (u32 j = 0; j < W.K; ++j) {
            const i32 s = W.slot(rank, epoch, t, j);
            if (s < 0 || s / W.S != owner || j == k) continue;
            if (j < k) next = 0;
            if (j > k) {
                next |= number_of(j) + 1;
                break;
            }
        }
        mem.store(route + 2, next);
    }
    void tell(u32 owner, const u32* of_routes, const u32* of_rows) {
        comm::tell(w, W.field(owner, kOffsets), W.field(owner, kTargets), W.field(rank, kSent) + owner * W.S, of_routes,
                   of_rows, W.S, 0, 1);
    }
    static void sum_up(u32* values, u32 n) {
        u32 sum = 0;
        for (u32 p = 0; p <= n; ++p) {
            const u32 v = p < n ? values[p] : 0;
            values[p] = sum, sum += v;
        }
    }

    // One CTA for each owner; a token's row has the token's number.
    u32 sort_alone() {
        if (w.aborted()) return 0;
        u32 count = 0;
        for (u32 t = first_token(); t < end_token(); ++t)
            for (u32 k = 0; k < W.K; ++k)
                if (const i32 s = W.slot(rank, epoch, t, k); s >= 0 && head(t, k) == static_cast<i32>(k))
                    list(count++, t, t, s);
        for (u32 owner = cta; owner < W.R; owner += W.C) {
            std::vector<u32> routes(W.S + 1), rows(W.S + 1), place(tokens * W.K);
            auto slot = [&](u32 t, u32 k) { return W.slot(rank, epoch, t, k) - static_cast<i32>(owner * W.S); };
            for (u32 i = 0; i < tokens * W.K; ++i) {
                const u32 t = i / W.K, k = i % W.K, s = slot(t, k);
                if (s >= W.S) continue;
                place[i] = routes[s]++;
                rows[s] += head(t, k) == static_cast<i32>(k);
            }
            sum_up(routes.data(), W.S), sum_up(rows.data(), W.S);
            for (u32 i = 0; i < tokens * W.K; ++i) {
                const u32 t = i / W.K, k = i % W.K, s = slot(t, k);
                if (s < W.S) send_route(owner, t, t, k, [&](u32 j) { return routes[slot(t, j)] + place[t * W.K + j]; });
            }
            tell(owner, routes.data(), rows.data());
            comm::announce_header(w, owner, offset(kHeaderFlags));
        }
        return count;
    }

    // Returns the number of rows that the CTA has to push.
    u32 sort_together() {
        const u32 P = W.R * W.S, bank = w.epoch & 1;
        u32* histogram = W.field(rank, kHistogram);
        std::vector<u32> slice(2 * P), all(2 * (P + 1)), order(P + 1), place(W.T * W.K * 2);
        for (u32 t = first_token(); t < end_token(); ++t)
            for (u32 k = 0; k < W.K; ++k) {
                const i32 s = W.slot(rank, epoch, t, k);
                if (s < 0) continue;
                place[(t * W.K + k) * 2] = slice[s]++;
                if (head(t, k) == static_cast<i32>(k)) place[(t * W.K + k) * 2 + 1] = slice[P + s]++;
            }
        for (u32 p = 0; p < P; ++p) order[p] = slice[P + p];
        for (u32 p = 0; p < 2 * P; ++p)
            if (slice[p] > 0) slice[p] = mem.add_relaxed(histogram + bank * 2 * P + p, slice[p]);
        comm::grid_barrier(w, W.control(rank), W.C);
        if (w.aborted()) return 0;
        for (u32 i = 0; i < 2 * P; ++i) all[i / P * (P + 1) + i % P] = mem.load(histogram + bank * 2 * P + i);
        for (u32* a : {all.data(), all.data() + P + 1, order.data()}) sum_up(a, P);
        const u32 *all_routes = all.data(), *all_rows = all_routes + P + 1;
        for (u32 t = first_token(); t < end_token(); ++t)
            for (u32 k = 0; k < W.K; ++k) {
                const i32 s = W.slot(rank, epoch, t, k);
                if (s < 0) continue;
                const u32 owner = s / W.S, start = owner * W.S, h = head(t, k), hs = W.slot(rank, epoch, t, h);
                const u32 in_order = place[(t * W.K + h) * 2 + 1];
                const u32 row = all_rows[hs] - all_rows[start] + slice[P + hs] + in_order;
                send_route(owner, row, t, k, [&](u32 j) {
                    const u32 other = W.slot(rank, epoch, t, j);
                    return all_routes[other] - all_routes[start] + slice[other] + place[(t * W.K + j) * 2];
                });
                if (h == k) list(order[hs] + in_order, t, row, hs);
            }
        for (u32 owner = cta; owner < W.R; owner += W.C) tell(owner, all_routes + owner * W.S, all_rows + owner * W.S);
        comm::announce_headers(w, W.control(rank), W.C, offset(kHeaderFlags));
        return order[P];
    }
};
