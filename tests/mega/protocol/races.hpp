// Finds data races by happens-before, with the scopes of the GPU's memory model: a release that reaches this device
// only orders nothing for a thread of another. Vector clocks, one entry a thread.
#pragma once
#include <unordered_map>

#include "world.hpp"

class Races {
    using Clock = std::vector<u32>;
    struct Message {
        u32 rank;
        Scope scope;
        Clock clock;
    };
    struct Cell {
        u32 writer = 0, written = 0;                // thread and its time; 0 = never
        std::vector<std::pair<u32, u32>> accesses;  // since: reads, and accesses as a word
        std::vector<std::pair<u32, u32>> updates;   // as a word, that change it
    };
    World& W;
    u32 threads;
    std::vector<u32> rank_of;
    std::vector<Clock> now, fence;  // fence: what a thread's later stores release, empty if it has passed no fence
    std::vector<Cell> cells;
    std::unordered_map<const u32*, std::vector<Message>> words;

  public:
    Races(World& W, const std::vector<u32>& ranks)
        : W(W),
          threads(ranks.size()),
          rank_of(ranks),
          now(threads, Clock(threads, 0)),
          fence(threads),
          cells(W.memory.size()) {
        for (u32 t = 0; t < threads; ++t) now[t][t] = 1;
    }

    void data(u32 t, const u32* p, bool write) {
        Cell& cell = cells[p - W.memory.data()];
        behind(t, cell.writer, cell.written, p);
        if (write) {
            for (auto [other, time] : cell.accesses) behind(t, other, time, p);
            cell.accesses.clear(), cell.updates.clear();
            cell.writer = t, cell.written = now[t][t];
        } else {
            for (auto [other, time] : cell.updates) behind(t, other, time, p);
            note(cell.accesses, t);
        }
    }
    void load(u32 t, const u32* p, Effect effect, Scope scope) {
        word(t, p, false);
        if (effect == Effect::kAcquire || effect == Effect::kBoth) acquire(t, p, scope);
    }
    void store(u32 t, const u32* p, Effect effect, Scope scope) {
        word(t, p, true);
        words[p].clear();
        release(t, p, effect, scope);
    }
    // What earlier stores have released stays: updates continue a release.
    void update(u32 t, const u32* p, Effect effect, Scope scope) {
        word(t, p, true);
        if (effect == Effect::kBoth) acquire(t, p, scope);
        release(t, p, effect, scope);
    }
    void pass_fence(u32 t) {
        fence[t] = now[t];
        ++now[t][t];
    }

  private:
    void behind(u32 t, u32 other, u32 time, const u32* p) {
        if (time == 0 || other == t || now[t][other] >= time) return;
        const u32 at = p - W.memory.data();
        u32 f = kFields - 1;
        while (at < u64{W.R} * W.rank_words && W.at[f] > at % W.rank_words) --f;
        fail("a race: field, rank of the reader or writer, rank of the other", W.seed, f, rank_of[t], rank_of[other]);
    }
    void note(std::vector<std::pair<u32, u32>>& list, u32 t) {
        for (auto& [other, time] : list)
            if (other == t) {
                time = now[t][t];
                return;
            }
        list.emplace_back(t, now[t][t]);
    }
    // Words race with plain accesses only.
    void word(u32 t, const u32* p, bool change) {
        if (p < W.memory.data() || p >= W.memory.data() + W.memory.size()) return;  // a record
        Cell& cell = cells[p - W.memory.data()];
        behind(t, cell.writer, cell.written, p);
        note(cell.accesses, t);
        if (change) note(cell.updates, t);
    }
    void acquire(u32 t, const u32* p, Scope scope) {
        for (const Message& m : words[p])
            if (m.rank == rank_of[t] || (m.scope == Scope::kSystem && scope == Scope::kSystem)) join(now[t], m.clock);
    }
    void release(u32 t, const u32* p, Effect effect, Scope scope) {
        if (effect == Effect::kRelease || effect == Effect::kBoth) {
            send(p, {rank_of[t], scope, now[t]});
            ++now[t][t];
        }
        if (!fence[t].empty()) send(p, {rank_of[t], scope, fence[t]});
    }
    void send(const u32* p, Message message) {
        for (Message& m : words[p])
            if (m.rank == message.rank && m.scope == message.scope) return join(m.clock, message.clock);
        words[p].push_back(std::move(message));
    }
    void join(Clock& into, const Clock& from) {
        for (u32 i = 0; i < threads; ++i)
            if (from[i] > into[i]) into[i] = from[i];
    }
};
