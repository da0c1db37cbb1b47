// Runs threads one at a time and decides, before every access to memory, who goes next: at random, or by priorities
// that change at random moments (so that a thread is starved for as long as the others can go on without it). Time is
// virtual: it stands still while anybody can run, but for a few ns an access, and jumps when all wait.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <functional>

#include "races.hpp"

// What befalls one rank, or one of its threads.
struct Fate {
    enum Kind { kNone, kDies, kStalls } kind = kNone;
    u32 rank = 0;
    u32 thread = ~0u;  // of the rank; all of them if ~0
    u64 at = 0;        // accesses of the rank before
    u64 ns = 0;        // how long it stalls
};

class Scheduler final : public Observer {
    static constexpr u32 kStackBytes = 128 * 1024;
    struct Thread {
        ucontext_t context;
        std::unique_ptr<char[]> stack;
        std::function<void()> body;
        u32 rank, priority = 0, pauses = 0;
        bool done = false, parked = false, dead = false;
        u64 asleep = 0;
        std::vector<std::pair<const u32*, u32>> watched;  // loaded since the last pause, in which version
    };
    World& W;
    Fate fate;
    Random random;
    bool by_priority;
    std::vector<Thread> threads;
    std::unordered_map<const u32*, std::pair<u32, std::vector<u32>>> words;  // version, who is parked there
    std::vector<u64> accesses;                                               // of each rank
    std::unique_ptr<Races> races;
    ucontext_t home;
    u32 current = 0;
    bool woken = false;
    u64 last_written = 0;

  public:
    u64 clock = 0, fate_struck = 0;

    Scheduler(World& W, Fate fate)
        : W(W), fate(fate), random{W.seed ^ 0x5eed}, by_priority(random.below(3) > 0), accesses(W.R) {}

    void start(u32 rank, std::function<void()> body) {
        threads.emplace_back();
        threads.back().rank = rank, threads.back().body = std::move(body);
    }

    void run() {
        std::vector<u32> ranks, of_rank(W.R);
        for (Thread& t : threads) ranks.push_back(t.rank);
        races = std::make_unique<Races>(W, ranks);
        // By rank, by role, or each for itself.
        const u32 kind = random.below(3);
        std::vector<u32> class_priority(1024);
        for (u32& p : class_priority) p = random.below(1000);
        for (u32 i = 0; i < threads.size(); ++i) {
            Thread& t = threads[i];
            const u32 in_rank = of_rank[t.rank]++;
            t.priority = kind == 0   ? class_priority[t.rank] * 1000 + random.below(1000)
                         : kind == 1 ? class_priority[in_rank % kRoles] * 1000 + random.below(1000)
                                     : random.below(1000000);
            t.stack = std::make_unique_for_overwrite<char[]>(kStackBytes);
            getcontext(&t.context);
            t.context.uc_stack.ss_sp = t.stack.get(), t.context.uc_stack.ss_size = kStackBytes;
            t.context.uc_link = nullptr;
            makecontext(&t.context, reinterpret_cast<void (*)()>(&Scheduler::enter), 0);
        }
        self = this;
        observer = this;
        current = choose();
        swapcontext(&home, &threads[current].context);
        observer = nullptr;
    }

    void data(const u32* p, bool write) override {
        step();
        races->data(current, p, write);
    }
    void word_load(const u32* p, Effect effect, Scope scope) override {
        step();
        races->load(current, p, effect, scope);
        threads[current].watched.emplace_back(p, words[p].first);
    }
    void word_store(const u32* p, Effect effect, Scope scope) override {
        step();
        races->store(current, p, effect, scope);
        written(p);
    }
    void word_update(const u32* p, Effect effect, Scope scope) override {
        step();
        races->update(current, p, effect, scope);
        written(p);
    }
    void fence() override {
        step();
        races->pass_fence(current);
    }
    u64 now_ns() override { return clock; }

    // Nothing can change for this thread before somebody writes what it has looked at, or time passes.
    void pause() override {
        Thread& t = threads[current];
        bool changed = ++t.pauses < 3;  // a loop looks at all that it looks at in its second round
        for (auto [p, version] : t.watched) changed |= words[p].first != version;
        if (!changed) {
            t.parked = true;
            for (auto [p, version] : t.watched) words[p].second.push_back(current);
        }
        t.watched.clear();
        give_way();
    }

  private:
    static inline Scheduler* self = nullptr;
    static void enter() {
        Scheduler& s = *self;
        s.threads[s.current].body();
        s.threads[s.current].done = true;
        s.give_way();
        std::abort();
    }

    bool ready(const Thread& t) const { return !t.done && !t.parked && !t.dead && t.asleep <= clock; }

    u32 choose() {
        for (;;) {
            u32 best = ~0u, count = 0;
            for (u32 i = 0; i < threads.size(); ++i) {
                if (!ready(threads[i])) continue;
                ++count;
                if (best == ~0u ||
                    (by_priority ? threads[i].priority > threads[best].priority : random.below(count) == 0))
                    best = i;
            }
            if (best != ~0u) return best;
            bool waiting = false;
            for (const Thread& t : threads) waiting |= !t.done && !t.dead;
            if (!waiting) return ~0u;
            if (clock - last_written > 8 * kLimit) fail("somebody waits for ever", W.seed);
            clock += kLimit / 16 + random.below(kLimit / 64);
            for (Thread& t : threads) t.parked = false;
            for (auto& [p, word] : words) word.second.clear();
        }
    }

    void give_way() {
        const u32 before = current, next = choose();
        if (next == before) return;
        if (next == ~0u) setcontext(&home);
        current = next;
        swapcontext(&threads[before].context, &threads[next].context);
    }

    void step() {
        clock += 1 + random.below(40);
        Thread& t = threads[current];
        const u64 n = ++accesses[t.rank];
        if (fate.kind != Fate::kNone && t.rank == fate.rank && n >= fate.at && !fate_struck &&
            W.finished < threads.size())
            strike();
        if (!ready(t)) return give_way();
        if (!by_priority) {
            if (random.below(6) == 0) give_way();
        } else if (random.below(400) == 0) {
            t.priority = random.below(1000000);
            give_way();
        } else if (woken) {
            woken = false;
            give_way();
        }
    }

    void strike() {
        fate_struck = clock;
        u32 in_rank = 0;
        for (Thread& t : threads) {
            if (t.rank != fate.rank) continue;
            if (fate.thread != ~0u && in_rank++ != fate.thread) continue;
            if (fate.kind == Fate::kDies)
                t.dead = true;
            else
                t.asleep = clock + fate.ns;
        }
    }

    void written(const u32* p) {
        threads[current].pauses = 0;
        last_written = clock;
        auto& [version, parked] = words[p];
        ++version;
        for (u32 i : parked) {
            if (!threads[i].parked) continue;
            threads[i].parked = false;
            woken = true;
        }
        parked.clear();
    }
};
