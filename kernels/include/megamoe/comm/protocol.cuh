// The protocol between the ranks of a mega-kernel: who writes which word, who waits for it, and how a wait ends.
// docs/protocol.md draws it. This header is compiled for the GPU (Mem = GpuMemory, comm/gpu_memory.cuh) and, in tests,
// as host C++ over atomics: no PTX, no CUDA word here.
#pragma once
#include "megamoe/common/types.cuh"

namespace megamoe::comm {

// What a wait was for; the host turns it into a sentence (megamoe/mega/record.py).
enum class Phase : u32 { kNone = 0, kGrid = 1, kHeader = 2, kRows = 3, kTiles = 4, kDone = 5, kPeer = 6, kIndex = 7 };

// What the host reads after a wait has expired (host-mapped); phase stays 0 while all is well.
struct Record {
    u32 phase;
    u32 rank;      // who gave up
    u32 peer;      // whom it waited for
    u32 block;     // CTA
    u32 index;     // local expert, or block of rows
    u32 expected;  // value awaited
    u32 seen;
    u32 epoch;
};

// Words of one rank that only its own CTAs touch. Counters return to 0 within a launch, so that any grid may follow.
struct Control {
    u32 arrived;    // CTAs at the grid barrier
    u32 passed;     // epoch + 1 once all have come
    u32 published;  // CTAs whose routes and headers are written
    u32 finished;   // CTAs whose results are written
    u32 exited;     // CTAs that will touch nothing more
    u32 epoch;      // launches completed
    u32 bad_index;  // some index lay outside of [-1, E)
    u32 ticket;     // units of work handed out
};

// One thread's bounded waits.
template <class Mem>
struct Waits {
    Mem mem;
    const u64* bases;         // every rank's symmetric memory, as this rank addresses it
    u64 abort_offset;         // where its abort word stands; any rank may raise it
    volatile u32* cta_abort;  // this CTA's copy
    u64 limit_ns;
    Record* record;
    u32 rank, world, block, epoch;

    MM_DEVICE bool aborted() const { return *cta_abort != 0; }

    // True if the launch is void already, perhaps from the one before.
    MM_DEVICE bool void_from_the_start() {
        if (mem.load_relaxed(abort_word(rank)) == 0) return false;
        *cta_abort = 1;
        return true;
    }

    // True once *word has reached `value`, counting modulo 2^32; false if the launch is void.
    template <bool kSystem>
    MM_DEVICE bool until(const u32* word, u32 value, Phase phase, u32 peer, u32 index) {
        u32 seen = load<kSystem>(word);
        if (static_cast<i32>(seen - value) >= 0) return true;
        const u64 start = mem.now_ns();
        while (!aborted()) {
            mem.pause();
            seen = load<kSystem>(word);
            if (static_cast<i32>(seen - value) >= 0) return true;
            if (mem.load_relaxed(abort_word(rank)) != 0) {
                *cta_abort = 1;
            } else if (mem.now_ns() - start > limit_ns) {
                give_up(Record{static_cast<u32>(phase), rank, peer, block, index, value, seen, epoch});
            }
        }
        return false;
    }

    // The first to raise this rank's word reports, and takes all other ranks along.
    MM_DEVICE void give_up(const Record& r) {
        *cta_abort = 1;
        if (mem.exchange(abort_word(rank), 1) != 0) return;
        *record = r;
        for (u32 peer = 0; peer < world; ++peer) mem.store_relaxed_system(abort_word(peer), 1);
    }

    MM_DEVICE u32* abort_word(u32 peer) const { return reinterpret_cast<u32*>(bases[peer] + abort_offset); }

  private:
    template <bool kSystem>
    MM_DEVICE u32 load(const u32* word) {
        if constexpr (kSystem) return mem.load_acquire_system(word);
        return mem.load_acquire(word);
    }
};

// All CTAs of one rank. By one thread of each CTA, after the CTA's other threads have synchronised with it.
template <class Mem>
MM_DEVICE bool grid_barrier(Waits<Mem>& w, Control* c, u32 ctas) {
    if (w.mem.add(&c->arrived, 1) == ctas - 1) {
        w.mem.store_relaxed(&c->arrived, 0);
        w.mem.store_release(&c->passed, w.epoch + 1);
        return true;
    }
    return w.template until<false>(&c->passed, w.epoch + 1, Phase::kGrid, w.rank, 0);
}

// One thread of each CTA says that the CTA's writes, to whichever rank, are done; the last one tells every rank by
// writing epoch + 1 to its own place among the flags there.
template <class Mem>
MM_DEVICE void announce(Waits<Mem>& w, u32* counter, u32 ctas, u64 flags_offset) {
    w.mem.fence_system();
    if (w.mem.add(counter, 1) != ctas - 1) return;
    w.mem.store_relaxed(counter, 0);
    w.mem.fence_system();  // with the stores after it: a release, once for all peers
    for (u32 peer = 0; peer < w.world; ++peer)
        w.mem.store_relaxed_system(reinterpret_cast<u32*>(w.bases[peer] + flags_offset) + w.rank, w.epoch + 1);
}

// One thread of each CTA, when the CTA will touch nothing more: the last one ends the epoch.
template <class Mem>
MM_DEVICE void leave(Waits<Mem>& w, Control* c, u32 ctas) {
    if (w.mem.add(&c->exited, 1) != ctas - 1) return;
    w.mem.store_relaxed(&c->exited, 0);
    w.mem.store_relaxed(&c->ticket, 0);
    w.mem.store_release(&c->epoch, w.epoch + 1);
}

}  // namespace megamoe::comm
