// The roles of the mega-kernel on a CPU, small: the same protocol, order and ring, tiles that are a sum. What waits,
// signals and orders is the kernel's own header; what is written here follows mega/*.cuh, each role a thread.
#pragma once
#include "sorting.hpp"

// All `parties` meet.
template <bool kSystem>
void meet(u32* gate, u32 parties) {
    HostMemory mem;
    auto load = [&] { return kSystem ? mem.load_acquire_system(gate + 1) : mem.load_acquire(gate + 1); };
    const u32 turn = load();
    if ((kSystem ? mem.add_system(gate, 1) : mem.add(gate, 1)) == parties - 1) {
        mem.store_relaxed(gate, 0);
        if constexpr (kSystem) {
            mem.fence_system();
            mem.store_relaxed_system(gate + 1, turn + 1);
        } else {
            mem.store_release(gate + 1, turn + 1);
        }
    } else {
        while (load() == turn) mem.pause();
    }
}

struct OneLane {
    static constexpr u32 kCount = 1;
    u32 lane() const { return 0; }
    u32 inclusive_sum(u32 v) const { return v; }
    u32 ballot(bool b) const { return b; }
    u32 before(u32) const { return 0; }
    u32 count(u32 mask) const { return mask; }
    u32 last(u32 v) const { return v; }
    void sync() const {}
};

enum RoleOf : u32 { kLoad, kMath, kLead, kCopyFirst, kCopySecond };

// One role of one CTA during one launch. kLoad also sorts and plans, kMath is thread 0 at the end of a launch too.
struct Role : Sorter {
    void meet_cta() { meet<false>(c + kGate, kRoles); }

    void run() {
        if (role == 0) {
            c[kCtaAbort] = 0;
            for (u32 i = kFull; i < kNotes; ++i) mem.store(c + i, 0);
            w.void_from_the_start();
        }
        meet_cta();
        if (role == 0) dispatch();
        meet_cta();
        const u32 count = mem.load(c + kPushCount), first = count < W.pushed_first ? count : W.pushed_first;
        push(role, first, kRoles);
        meet_cta();
        if (role == kLoad) {
            plan();
        } else {
            await_plan();
        }
        if (role == kLoad) load();
        if (role == kMath) math();
        if (role == kLead) lead();
        if (role == kCopySecond) push(first, count, 1);
        if (role == kCopyFirst || role == kCopySecond) Copier{*this}.run();
        meet_cta();
        if (W.partial_sums) {
            if (role == kMath) comm::meet_behind_rows(w, W.control(rank), W.C, false);
            meet_cta();
            send_sums();
            meet_cta();
        }
        if (role == kMath) {
            comm::announce_results(w, W.control(rank), W.C, offset(kDoneFlags), false);
            comm::await_results(w, W.field(rank, kDoneFlags), 0, 1);
        }
        meet_cta();
        combine();
        meet_cta();
        if (role == kMath) comm::leave(w, W.control(rank), W.C);
    }

    // --- push
    void push(u32 first, u32 end, u32 step) {
        for (u32 i = first; i < end && !w.aborted(); i += step) {
            const u32* p = pushes() + i * 3;
            const u32 token = mem.load(p), row = mem.load(p + 1), slot = mem.load(p + 2), owner = slot / W.S;
            mem.store(W.field(owner, kRows) + rank * W.T + row, W.x(rank, epoch, token));
            comm::count_row(mem, W.field(owner, kArrived) + rank * W.S + slot % W.S);
        }
    }

    // --- plan
    comm::Table table() const {
        u32* p = c + kStage + kStages * kBlockRows;
        return {p, p + W.S, p + 2 * W.S, p + 3 * W.S, p + 4 * W.S};
    }
    u32 routes_before(u32 source, u32 expert) {
        return mem.load(W.field(rank, kOffsets) + source * (W.S + 1) + expert);
    }

    void plan() {
        comm::await_headers(w, W.field(rank, kHeaderFlags), 0, 1);
        const comm::Order order{table(), W.U, W.D, W.lag, W.ups_first};
        for (u32 e = 0; e < W.S; ++e) {
            u32 rows = 0;
            if (!w.aborted())
                for (u32 s = 0; s < W.R; ++s) rows += routes_before(s, e + 1) - routes_before(s, e);
            order.table.rows[e] = rows;
        }
        const auto totals = order.compact(OneLane{}, W.S, kBlockRows);
        for (u32 a = 0; a < totals.active; ++a) {
            order.place(a, totals.active);
            if ((W.ups_first || totals.blocks == totals.active) && order.table.down[a] < totals.blocks * W.U)
                fail("a down unit before the last up unit", W.seed, rank, a);
        }
        c[kActive] = totals.active;
        mem.store(c + kUnits, totals.blocks * (W.U + W.D));
        mem.add_release(c + kPlanned, 1);
    }
    void await_plan() { await(kPlanned, 1); }
    comm::Walk walk() { return {table(), mem.load(c + kUnits), c[kActive], W.U, W.D}; }

    // Until a word of the CTA has counted `value` arrivals.
    void await(u32 word, u32 value) {
        while (static_cast<i32>(mem.load_acquire(c + word) - value) < 0) mem.pause();
    }

    // Of row j of the expert: (row of its region, slot), and its source.
    const u32* find_route(u32 expert, u32 j, u32& source) {
        for (source = 0; source < W.R; ++source) {
            const u32 begin = routes_before(source, expert), n = routes_before(source, expert + 1) - begin;
            if (j < n) return W.field(rank, kRoutes) + (source * W.T * W.K + begin + j) * kRouteWords;
            j -= n;
        }
        fail("a row of no source", W.seed, rank, expert, j);
    }

    // --- copy
    struct Copier {
        static constexpr u32 kLook = 3;  // experts
        Role& x;
        u32 complete = 0;

        u32 take() const { return x.mem.add_relaxed(&x.W.control(x.rank)->copy_ticket, 1); }

        void run() {
            comm::GroupWalk walk{x.table(), x.c[kActive], x.W.lag / x.W.U};
            u32 ticket = take();
            for (;;) {
                const u32 after = take();
                const comm::Group g = walk.at<kBlockRows, kCopyRows>(ticket, x.W.casts);
                if (g.rows == 0) break;
                if (g.cast)
                    cast(g);
                else
                    copy(g, walk.a);
                ticket = after;
            }
        }

        void cast(const comm::Group& g) {
            World& W = x.W;
            comm::await_tiles(x.w, x.counters(kTilesDone), g.block, W.U);
            if (x.w.aborted()) return;
            for (u32 i = 0; i < g.rows * W.U; ++i) {
                u32* mid = W.field(x.rank, kMid) + (g.block * kBlockRows + g.first_row % kBlockRows) * W.U + i;
                x.mem.store(mid, World::cast(x.mem.load(mid)));
            }
            comm::count_tile(x.mem, x.counters(kCastsDone) + g.block);
        }

        void copy(const comm::Group& g, u32 active) {
            const u32 block = g.block, expert = g.expert, first = g.first_row, n = g.rows;
            World& W = x.W;
            if (complete <= active) {
                u32 pairs = 0;  // the kernel's lanes ask for them side by side
                while (pairs < kLook * W.R &&
                       comm::rows_there(x.w, W.field(x.rank, kArrived), W.field(x.rank, kTargets), W.S,
                                        x.table().expert, complete, x.c[kActive], pairs))
                    ++pairs;
                complete += pairs / W.R;
            }
            if (complete <= active) {
                comm::await_rows(x.w, W.field(x.rank, kArrived), W.field(x.rank, kTargets), W.S, x.table().expert,
                                 complete, active, 0, 1);
                complete = active + 1;
            }
            if (block >= W.ring) comm::await_tiles(x.w, x.counters(kTilesDone), block - W.ring, W.U);
            if (x.w.aborted()) return;
            for (u32 r = first; r < first + n; ++r) {
                u32 source;
                const u32 row = x.mem.load(x.find_route(expert, r, source));
                x.mem.store(x.pool(block, r % kBlockRows), x.mem.load(W.field(x.rank, kRows) + source * W.T + row));
            }
            comm::count_tile(x.mem, x.counters(kCopied) + block);
        }
    };
    u32* pool(u32 block, u32 row) { return W.field(rank, kPool) + block % W.ring * kBlockRows + row; }

    // --- lead
    u32* note(u32 i) { return c + kNotes + i % 2 * kNoteWords; }

    comm::Unit take(comm::Walk& walk, u32 i) {
        const comm::Unit t = walk.at<kBlockRows, kBand>(mem.add_relaxed(&W.control(rank)->ticket, 1));
        const i32 words[] = {t.down, t.expert, t.n, t.block, t.first_row, t.rows};
        for (u32 j = 0; j < kUnitWords; ++j) mem.store(note(i) + j, words[j]);
        for (i32 r = 0; t.down && r < t.rows; ++r) {
            u32 source;
            const u32* route = find_route(t.expert, t.first_row + r, source);
            mem.store(note(i) + kUnitWords + 2 * r, source);
            mem.store(note(i) + kUnitWords + 2 * r + 1, mem.load(route + 1));
        }
        mem.add_release(c + kReady + i % 2, 1);
        return t;
    }

    void lead() {
        comm::Walk walk = this->walk();
        comm::Unit t = take(walk, 0);
        for (u32 i = 0; t.rows >= 0; ++i) {
            const comm::Unit next = take(walk, i + 1);
            await(kSettled + i % 2, i / 2 + 1);
            if (!t.down && !w.aborted()) comm::count_tile(mem, counters(kTilesDone) + t.block);
            t = next;
        }
    }

    comm::Unit await_ready(u32 i) {
        await(kReady + i % 2, i / 2 + 1);
        i32 words[kUnitWords];
        for (u32 j = 0; j < kUnitWords; ++j) words[j] = mem.load(note(i) + j);
        return {words[0] != 0, words[1], words[2], words[3], words[4], words[5]};
    }

    // --- ring of stages
    u32 position = 0;
    u32* stage() { return c + kStage + position % kStages * kBlockRows; }
    void await_full() { await(kFull + position % kStages, position / kStages + 1); }
    void await_empty() { await(kEmpty + position % kStages, position / kStages); }

    void load() {
        for (u32 i = 0;; ++i) {
            const comm::Unit t = await_ready(i);
            if (t.rows < 0) break;
            if (t.down && !W.casts) {
                comm::await_tiles(w, counters(kTilesDone), t.block, W.U);
            } else {
                const Field groups = t.down ? kCastsDone : kCopied;
                comm::await_copies(w, counters(groups), t.block, (t.rows + kCopyRows - 1) / kCopyRows);
            }
            for (u32 kb = 0; kb < (t.down ? W.down_kb : W.up_kb); ++kb, ++position) {
                await_empty();
                for (i32 r = 0; !w.aborted() && r < t.rows; ++r) mem.store(stage() + r, value(t, r));
                mem.add_release(c + kFull + position % kStages, 1);
            }
        }
    }
    u32 value(const comm::Unit& t, u32 r) {
        if (!t.down) return mem.load(pool(t.block, r));
        u32 sum = 0;
        for (u32 n = 0; n < W.U; ++n) {
            const u32 v = mem.load(W.field(rank, kMid) + (t.block * kBlockRows + r) * W.U + n);
            sum += W.casts ? World::cast(v) : v;
        }
        return sum;
    }

    void math() {
        u32 rows[kBlockRows] = {};
        for (u32 i = 0;; ++i) {
            const comm::Unit t = await_ready(i);
            if (t.rows < 0) break;
            for (u32 kb = 0; kb < (t.down ? W.down_kb : W.up_kb); ++kb, ++position) {
                await_full();
                for (i32 r = 0; !w.aborted() && r < t.rows; ++r) rows[r] = mem.load(stage() + r);
                mem.add_release(c + kEmpty + position % kStages, 1);
            }
            const u32 unit = t.block * (W.U + W.D) + (t.down ? W.U : 0) + t.n;
            W.computed[u64{rank} * W.blocks * (W.U + W.D) + unit].fetch_add(1, std::memory_order_relaxed);
            for (i32 r = 0; !w.aborted() && r < t.rows; ++r) {
                if (t.down) {
                    const u32* to = note(i) + kUnitWords + 2 * r;
                    const u32 source = mem.load(to), slot = mem.load(to + 1);
                    u32* row = W.partial_sums ? W.field(rank, kReturns) + (t.block * kBlockRows + r) * W.D
                                              : W.field(source, kResults) + slot * W.D;
                    mem.store(row + t.n, World::down(rows[r], t.expert, t.n));
                } else {
                    mem.store(W.field(rank, kMid) + (t.block * kBlockRows + r) * W.U + t.n,
                              World::up(rows[r], t.expert, t.n));
                }
            }
            mem.add_release(c + kSettled + i % 2, 1);
        }
    }

    // --- partial sums
    // Of the rows that this rank keeps: that of route `number` of the source.
    const u32* kept(u32 source, u32 number) {
        u32 e = 0;
        while (routes_before(source, e + 1) <= number) ++e;
        u32 position = number - routes_before(source, e), a = 0;
        for (u32 s = 0; s < source; ++s) position += routes_before(s, e + 1) - routes_before(s, e);
        while (table().expert[a] != e) ++a;
        return W.field(rank, kReturns) + (table().block_begin(a) * kBlockRows + position) * W.D;
    }

    void send_sums() {
        u32 source = 0, before = 0;
        for (u32 i = cta * kRoles + role; !w.aborted(); i += W.C * kRoles) {
            while (source < W.R && i - before >= routes_before(source, W.S)) before += routes_before(source++, W.S);
            if (source == W.R) return;
            auto route = [&](u32 n) { return W.field(rank, kRoutes) + (source * W.T * W.K + n) * kRouteWords; };
            u32 number = i - before;
            if (!(mem.load(route(number) + 2) & kFirstHere)) continue;
            const u32 slot = mem.load(route(number) + 1);
            std::vector<u32> sum(W.D);
            for (;;) {
                for (u32 n = 0; n < W.D; ++n) sum[n] += mem.load(kept(source, number) + n);
                const u32 next = mem.load(route(number) + 2) & ~kFirstHere;
                if (next == 0) break;
                number = next - 1;
            }
            for (u32 n = 0; n < W.D; ++n) mem.store(W.field(source, kResults) + slot * W.D + n, sum[n]);
        }
    }

    // With partial sums an owner's stands at the first of the token's routes there.
    bool comes(u32 t, u32 k) const {
        const i32 s = W.slot(rank, epoch, t, k);
        for (u32 j = 0; W.partial_sums && j < k; ++j)
            if (const i32 other = W.slot(rank, epoch, t, j); other >= 0 && s >= 0 && other / W.S == s / W.S)
                return false;
        return s >= 0;
    }

    void combine() {
        for (u32 i = cta * kRoles + role; i < tokens * W.D; i += W.C * kRoles) {
            const u32 t = i / W.D, n = i % W.D;
            u32 total = 0;
            for (u32 k = 0; k < W.K && !w.aborted(); ++k)
                if (comes(t, k)) total += mem.load(W.field(rank, kResults) + (t * W.K + k) * W.D + n);
            mem.store(W.field(rank, kY) + i, w.aborted() ? kNaN : total);
        }
    }
};
